"""metrics.jsonl holds whole records, whatever was in it before and whatever the disk does."""

import json
import os
import resource
import signal

import pytest
from conftest import warnings_of
from tiny_run import Run


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.fixture
def metrics(tmp_path):
    Run(tmp_path).steps(1, 4).save()
    path = tmp_path / "merged" / "metrics.jsonl"
    assert steps_in(path) == [2, 4]
    return path


DAMAGE = {
    "a half line": (b'{"step": 6, "cut o', 0),
    "half a character": (b'{"step": 6, "\xc3', 0),
    "a record of a step made again": (b'{"step": 6}\n', 0),
    "no UTF-8": (b"\xff\xfe\x00{}\n", 1),
    "no record": (b"[1]\n3\n{}\nhello }\n", 4),
    "a step that is no integer": (b'{"step": "2"}\n{"step": true}\n{"step": 2.5}\n{"step": null}\n', 4),
    "a step of many digits": (b'{"step": ' + b"9" * 5000 + b"}\n", 1),
    "a key twice": (b'{"step": 2, "step": 3}\n', 1),
    "deep nesting": (b'{"step": 2, "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", 1),
    "zeros, as file systems leave them after a crash": (b"\0" * 4096, 0),
    "empty lines": (b"\n\n \n", 0),
    "a whole record without its end of line": (b'{"step": 3}', 0),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_repaired_when_a_run_resumes(metrics, tmp_path, caplog, damage):
    data, lines = DAMAGE[damage]
    whole = metrics.read_bytes()
    metrics.write_bytes(whole + data)
    caplog.set_level("INFO", "traj_merge_callback")
    run = Run(tmp_path, resume=True, on_error="raise").steps(5, 8).save()
    extra = [3] if damage.startswith("a whole record") else []
    assert steps_in(metrics) == [2, 4, *extra, 6, 8]
    assert metrics.read_bytes().startswith(whole)
    warnings = warnings_of(caplog)
    assert len(warnings) == bool(lines)
    aside = tmp_path / "merged" / "metrics.damaged.txt"
    assert aside.exists() == bool(lines)
    if lines:
        assert f"{lines} lines of" in warnings[0]
        assert aside.read_bytes() == data
    assert run.merger._failures.counts.total() == 0


def test_a_full_disk_leaves_no_half_line_and_its_records_come_later(metrics, tmp_path, caplog):
    run = Run(tmp_path, resume=True, search="lawa", keep_last=0, keep_best=False).steps(5, 6)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (metrics.stat().st_size + 10, limit[1]))
    try:
        run.resume = False
        run.steps(7, 9)
        assert steps_in(metrics) == [2, 4, 6]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    run.steps(10, 11).save()
    assert steps_in(metrics) == [2, 4, 6, 8, 10]
    assert (tmp_path / "state" / "state.json").exists()
    assert [what for what in run.merger._failures.counts if not what.startswith("writing metrics.jsonl failed")] == []
    assert sum("writing metrics.jsonl failed" in record.getMessage() for record in caplog.records) == 1


def test_a_line_cut_off_by_others_while_training_is_not_glued_to_the_next(tmp_path):
    run = Run(tmp_path).steps(1, 2)
    path = tmp_path / "merged" / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - 20)
    run.steps(3, 4)
    _, record = path.read_text().splitlines()
    assert json.loads(record)["step"] == 4


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_what_is_no_file_of_ours_is_set_aside(tmp_path, kind):
    merged, elsewhere = tmp_path / "merged", tmp_path / "elsewhere"
    merged.mkdir()
    elsewhere.write_text("mine")
    path = merged / "metrics.jsonl"
    {"folder": path.mkdir, "link": lambda: path.symlink_to(elsewhere), "pipe": lambda: os.mkfifo(path)}[kind]()
    run = Run(tmp_path)
    run.steps(1, 4)
    assert steps_in(path) == [2, 4]
    assert os.path.lexists(merged / "metrics.1.jsonl")
    assert elsewhere.read_text() == "mine"
