"""One live run writes to an output folder; killed runs leave it to whoever comes next."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import AT_ONCE, tiny_llama, train_steps, warnings_of
from torch.utils.data import DataLoader

from traj_merge_callback import TrajectoryMerger, find_snapshot, read_merge
from traj_merge_callback.disk import output
from traj_merge_callback.disk.output import OutputFolder

OPTIONS = {"window_size": 2, "capture_every": 1, "merge_every": 2, "evaluations": 3, "heldout_batches": 2} | AT_ONCE
HOLDER = """
import sys, time
from pathlib import Path
from traj_merge_callback.disk.output import OutputFolder
import os
os.getpid = lambda: 7  # as in containers, where numbers of processes are equal
folder = OutputFolder(Path(sys.argv[1]))
print(folder.acquire(), flush=True)
time.sleep(120)
"""


def engine(heldout, folder, **options):
    loader = DataLoader(heldout, batch_size=8)
    return TrajectoryMerger(loader, **{**OPTIONS, "output_dir": str(folder), "on_error": "raise", **options})


def test_two_runs_in_turns_keep_their_files_apart(tmp_path, train, heldout, caplog):
    models = [tiny_llama(seed) for seed in (0, 1)]
    mergers = [engine(heldout, tmp_path / "out", search=search) for search in ("ema", "wma")]

    def each(step):
        for merger, model in zip(mergers, models, strict=True):
            merger.step(model, step)

    for model in models:
        train_steps(model, train, 1)
    for step in range(1, 7):
        each(step)
    assert [merger.output_dir for merger in mergers] == [tmp_path / "out", tmp_path / "out-2"]
    for merger, search in zip(mergers, ("ema", "wma"), strict=True):
        merger.close()
        lines = [json.loads(line) for line in (merger.output_dir / "metrics.jsonl").read_text().splitlines()]
        assert [(line["step"], line["search"]) for line in lines] == [(2, search), (4, search), (6, search)]
        assert {read_merge(path)["search"] for path in merger.output_dir.glob("step-*")} == {search}
        assert find_snapshot(merger.output_dir).is_dir()
        assert not list(merger.output_dir.glob(".*"))
    warnings = warnings_of(caplog)
    assert len(warnings) == 1
    assert "another run that is alive writes to" in warnings[0]
    assert warnings[0].endswith(f"this one writes to {tmp_path / 'out-2'}")


def test_a_run_that_was_given_up_leaves_its_folder_to_the_next_of_its_process(tmp_path, train, heldout, caplog):
    model = tiny_llama()
    given_up = engine(heldout, tmp_path / "out")
    train_steps(model, train, 2, lambda step: given_up.step(model, step))
    merger = engine(heldout, tmp_path / "out")  # as a notebook's cell that is run again makes it
    train_steps(model, train, 2, lambda step: merger.step(model, step))
    assert merger.output_dir == tmp_path / "out"
    assert not warnings_of(caplog)
    # If it goes on after all, it does not write over the other one's files.
    with pytest.raises(OSError, match="was taken over by another run"):
        train_steps(model, train, 6, lambda step: given_up.step(model, step), start=2)
    assert read_merge(find_snapshot(tmp_path / "out"))["step"] == 2


@pytest.mark.skipif(sys.platform == "win32", reason="there only times tell")
def test_another_process_is_alive_until_it_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline().strip() == str(tmp_path / "out")
        second = OutputFolder(tmp_path / "out")
        assert second.acquire() == tmp_path / "out-2"
        second.release()
        assert not (tmp_path / "out-2").exists()
    finally:
        holder.kill()
        holder.wait()
    started = time.monotonic()
    resumed = OutputFolder(tmp_path / "out")
    assert resumed.acquire() == tmp_path / "out"
    assert time.monotonic() - started < 5
    resumed.release()


def hold(folder, ready):
    first = OutputFolder(folder)
    first.acquire()
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True).start()
    ready.set()
    time.sleep(60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_workers_of_a_killed_run_do_not_keep_the_lock(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=hold, args=(tmp_path / "out", ready))
    holder.start()
    assert ready.wait(60)
    holder.kill()
    holder.join()
    resumed = OutputFolder(tmp_path / "out")
    assert resumed.acquire() == tmp_path / "out"
    resumed.release()


@pytest.mark.parametrize(("beats", "old"), [(True, False), (False, False), (False, True)])
def test_a_run_on_another_machine_is_alive_as_long_as_it_renews_its_lock(tmp_path, monkeypatch, beats, old):
    monkeypatch.setattr(output, "_PATIENCE_S", 1.0)
    lock = tmp_path / "out" / output.LOCK
    lock.parent.mkdir()
    lock.write_text(json.dumps({"host": "elsewhere", "process": os.getpid(), "machine": "another", "uuid": "x"}))
    if old:
        os.utime(lock, (1, 1))
    if beats:
        sleep = time.sleep
        monkeypatch.setattr(time, "sleep", lambda seconds: (sleep(seconds), os.utime(lock)))
    folder = OutputFolder(tmp_path / "out")
    assert folder.acquire() == tmp_path / ("out-2" if beats else "out")
    folder.release()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"uuid": 3, "host": {}}'])
def test_a_lock_that_says_nothing_is_an_old_one(tmp_path, monkeypatch, content):
    monkeypatch.setattr(output, "_PATIENCE_S", 0.3)
    (tmp_path / output.LOCK).write_bytes(content)
    folder = OutputFolder(tmp_path)
    assert folder.acquire() == tmp_path
    assert json.loads((tmp_path / output.LOCK).read_text())["process"] == os.getpid()
    folder.release()


def test_a_folder_that_was_removed_is_made_again(tmp_path):
    folder = OutputFolder(tmp_path / "out")
    folder.acquire()
    (tmp_path / "out" / output.LOCK).unlink()
    (tmp_path / "out").rmdir()
    folder.check()
    assert (tmp_path / "out" / output.LOCK).is_file()
    folder.release()
    assert not Path(tmp_path / "out").exists()
