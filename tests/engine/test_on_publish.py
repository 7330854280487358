"""Published snapshots are given to a command or a function, in processes of their own beside training."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import AT_ONCE, same_weights, tiny_llama, train_steps, warnings_of

from traj_merge_callback import MergeConfig, TrajectoryMerger, find_snapshot

OPTIONS = {"window_size": 3, "capture_every": 1, "merge_every": 2, "evaluations": 3, "heldout_batches": 2} | AT_ONCE
# Writes what lm-evaluation-harness does, in a folder below, and looks into the snapshot.
LIKE_LM_EVAL = """
import json, pathlib, sys
snapshot, out = map(pathlib.Path, sys.argv[1:])
step = json.loads((snapshot / "merge.json").read_text())["step"]
(out / "model").mkdir()
results = {"arc": {"alias": "arc", "acc,none": step / 100, "acc_stderr,none": "N/A", "f1,strict": 0.5, "seen": True}}
(out / "model" / "results.json").write_text(json.dumps({"results": results, "config": {"batch_size": 8}}))
print("done with", step)
"""


def run(loader, train, folder, on_publish, steps=4, each=None, **options):
    model, evals = tiny_llama(), []
    options = {**OPTIONS, "on_error": "raise", **options}
    merger = TrajectoryMerger(loader, output_dir=folder, on_publish=on_publish, log_eval=evals.append, **options)

    def after(step):
        merger.step(model, step)
        if each is not None:
            each(step, merger)

    train_steps(model, train, steps, after)
    merger.finish(model)
    return model, merger, evals


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def script(folder, text):
    """A command that runs this program with the snapshot as its argument."""
    path = folder / "program.py"
    path.write_text(text)
    return f"{sys.executable} {path} {{snapshot}}"


def wait_until(condition, seconds=60.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_numbers_of_a_command_come_back_to_the_line_and_the_log_of_their_merge(tmp_path, loader, train):
    plain = train_steps(tiny_llama(), train, 2)
    folder = tmp_path / "my merged"
    model, merger, evals = run(loader, train, folder, f"{script(tmp_path, LIKE_LM_EVAL)} {{out}}", steps=2)
    assert same_weights(model, plain)
    numbers = {"arc/acc": 0.02, "arc/f1/strict": 0.5}
    assert [line["eval"] for line in lines_of(folder)] == [numbers]
    assert [record.eval for record in merger.records] == [record.eval for record in evals] == [numbers]
    expected = {"merge/eval/arc/acc": 0.02, "merge/eval/arc/f1/strict": 0.5, "merge/eval/step": 2}
    assert evals[0].eval_scalars() == expected
    assert (folder / "eval" / "step-00000002" / "output.txt").read_text() == "done with 2\n"


def count_bytes(snapshot: Path):
    return {"bytes": (snapshot / "model.safetensors").stat().st_size, "rank": int(os.environ.get("RANK", -1))}


def test_a_function_runs_in_a_process_of_its_own_that_is_no_rank(tmp_path, loader, train, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    here = os.getpid()

    def closure(snapshot):
        gpus = len(os.environ["CUDA_VISIBLE_DEVICES"])
        return {**count_bytes(snapshot), "elsewhere": os.getpid() != here, "gpus": gpus}

    for function in (count_bytes, closure):
        folder = tmp_path / function.__name__
        _, merger, _ = run(loader, train, folder, function, steps=2)
        size = (find_snapshot(folder) / "model.safetensors").stat().st_size
        found = merger.records[-1].eval
        assert (found["bytes"], found["rank"], found.get("gpus", 0)) == (size, -1, 0)
    assert (folder / "eval" / "step-00000002" / "returned.json").read_text().count('"elsewhere": true') == 1


def test_the_last_printed_object_counts_where_there_is_no_file(tmp_path, loader, train):
    program = script(tmp_path, 'print("{}"); print(\'{"loss": 1.5}\'); print("that was it")')
    _, merger, _ = run(loader, train, tmp_path / "merged", program, steps=2)
    assert merger.records[0].eval == {"loss": 1.5}


WAITS = """
import pathlib, sys, time
while not pathlib.Path({go!r}).exists():
    time.sleep(0.02)
print('{{"files": %d}}' % len(list(pathlib.Path(sys.argv[1]).iterdir())))
"""


def test_the_newest_waiting_snapshot_is_next_and_none_is_pruned_while_it_is_read(tmp_path, loader, train, caplog):
    go, folder = tmp_path / "go", tmp_path / "merged"

    def each(step, merger):
        merger.wait()
        if step == 8:
            # Of four snapshots the first is read and the newest waits; one would be kept otherwise.
            assert {path.name for path in folder.glob("step-*")} == {"step-00000002", "step-00000008"}
            go.touch()

    program = script(tmp_path, WAITS.format(go=str(go)))
    _, merger, evals = run(loader, train, folder, program, 8, each, keep_last=1, keep_best=False)
    assert [record.step for record in evals] == [2, 8]
    assert all(record.eval["files"] >= 3 for record in evals)
    assert [path.name for path in folder.glob("step-*")] == ["step-00000008"]
    assert [bool(record.eval) for record in merger.records] == [True, False, False, True]
    assert len([message for message in warnings_of(caplog) if "left out" in message]) == 1
    assert "the snapshot of step 4 is left out" in caplog.text


@pytest.mark.parametrize(
    ("program", "limit", "said"),
    [
        ("import sys; print('no such task'); sys.exit(3)", 60.0, "ended with exit status 3 for step-00000002, see"),
        ("import time; time.sleep(600)", 0.5, "took longer than on_publish_timeout=0.5 s and was ended"),
    ],
)
def test_a_command_that_fails_or_hangs_is_one_warning(tmp_path, loader, train, caplog, program, limit, said):
    plain = train_steps(tiny_llama(), train, 4)

    def each(step, merger):
        if step == 2:
            wait_until(lambda: merger._recorder.take_found(step, merger._writer) is False)

    folder, command = tmp_path / "merged", script(tmp_path, program)
    model, _, evals = run(loader, train, folder, command, each=each, on_error="warn", on_publish_timeout=limit)
    assert same_weights(model, plain)
    assert evals == []
    assert [line["eval"] for line in lines_of(folder)] == [{}, {}]
    (warning,) = [message for message in warnings_of(caplog) if not message.startswith("2 failures while merging")]
    assert said in warning
    assert "Training goes on" in warning


KILLED = """
import sys, time
sys.path[:0] = [{tests!r}, {examples!r}]
from conftest import *
import realtext
from torch.utils.data import DataLoader
from traj_merge_callback import TrajectoryMerger
blocks = realtext.Blocks(realtext.split_blocks(realtext.python_source()[:20], LENGTH)[1][:32])
command = "sh -c 'echo $$ > {pids}; sleep 600 & echo $! >> {pids}; echo {{snapshot}}; wait'"
merger = TrajectoryMerger(DataLoader(blocks, batch_size=8), output_dir={folder!r}, on_publish=command, window_size=2,
                          capture_every=1, merge_every=2, evaluations=2, schedule="blocking")
model = tiny_llama()
train_steps(model, blocks, 2, lambda step: merger.step(model, step))
time.sleep(600)
"""


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_command_dies_with_the_run_and_with_it_all_that_it_started(tmp_path):
    pids = tmp_path / "pids"
    tests = Path(__file__).parents[1]
    script = KILLED.format(
        tests=str(tests), examples=str(tests.parent / "examples"), pids=pids, folder=str(tmp_path / "merged")
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    try:
        wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
        found = pids.read_text().split()
        assert all(map(is_alive, found))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_until(lambda: not any(map(is_alive, found)))


def test_closing_ends_the_command(tmp_path, loader, train):
    model = tiny_llama()
    sleeps = script(tmp_path, "import time; time.sleep(600)")
    with TrajectoryMerger(loader, output_dir=tmp_path / "merged", on_publish=sleeps, **OPTIONS) as merger:
        train_steps(model, train, 2, lambda step: merger.step(model, step))
        process = merger._recorder.on_publish._running.process
    assert process.poll() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_publish": "lm_eval"}, r"on_publish='lm_eval': must be a command such as .*it has the fields \[\]"),
        ({"on_publish": "sh {snapshot} {output}"}, r"it has the fields \['output', 'snapshot'\]"),
        ({"on_publish": "sh '{snapshot}"}, "on_publish=.*No closing quotation"),
        ({"on_publish": "no_such_program {snapshot}"}, "there is no program 'no_such_program'"),
        ({"on_publish": "sh {snapshot}", "keep_last": 0, "keep_best": False}, "on_publish needs snapshots"),
        ({"on_publish_timeout": 0.0}, "on_publish_timeout=0.0: must be a positive number"),
    ],
)
def test_bad_commands_are_named_before_training(options, message):
    with pytest.raises(ValueError, match=message):
        MergeConfig(**options)
    with pytest.raises(TypeError, match="on_publish=3: must be a function, of a snapshot's folder"):
        MergeConfig(on_publish=3)


@pytest.mark.parametrize(("status", "ends"), [(0, "well"), (3, "badly")])
def test_what_a_command_leaves_behind_ends_with_it(loader, train, tmp_path, status, ends):
    pids = tmp_path / "pids"
    leaving = (
        "import os, subprocess, sys\n"
        f"print(subprocess.Popen(['sleep', '1000']).pid, file=open({str(pids)!r}, 'a'))\n"
        f"sys.exit({status})\n"
    )
    run(loader, train, tmp_path / "merged", script(tmp_path, leaving), on_error="warn")
    found = [int(pid) for pid in pids.read_text().split()]
    assert len(found) == 2
    assert not any(is_alive(pid) for pid in found), ends


def test_numbers_that_are_long_or_named_like_ours_and_much_that_is_printed(loader, train, tmp_path):
    writing = (
        "import json, pathlib, sys\n"
        "text = json.dumps({'acc': 0.5, 'seed': 2**70, 'step': 7, 'huge': 10**400, 'results': {}})\n"
        "pathlib.Path(sys.argv[2], 'found.json').write_bytes(b'\\xef\\xbb\\xbf' + text.encode())\n"
        "print('x' * 3 * 2**24)\n"
    )
    _, merger, evals = run(loader, train, tmp_path / "merged", script(tmp_path, writing) + " {out}")
    assert merger.records[-1].eval == {"acc": 0.5, "seed": 2.0**70, "step": 7.0}
    assert evals[-1].eval_scalars()["merge/eval/acc"] == 0.5
    printing = "import sys\nprint('y' * 3 * 2**24)\nprint('{\"last\": 2}')\n"
    _, merger, _ = run(loader, train, tmp_path / "again", script(tmp_path, printing))
    assert merger.records[-1].eval == {"last": 2.0}
