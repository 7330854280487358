"""Two runs that go on in turns in one folder: each keeps its own records and snapshots, and none of the other's."""

import json

import pytest
from tiny_run import Run

from traj_merge_callback import find_snapshot, read_merge

OPTIONS = {"keep_last": 9, "on_error": "raise"}


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def runs_of(merged):
    return {path.name: read_merge(path)["run"] for path in merged.glob("step-*")}


def test_a_run_that_is_resumed_after_another_keeps_both_apart(tmp_path):
    (tmp_path / "b").mkdir()
    merged = tmp_path / "merged"
    first = Run(tmp_path, **OPTIONS).steps(1, 4).save()
    first.merger.close()
    other = Run(tmp_path / "b", output_dir=str(merged), **OPTIONS).steps(1, 8).save()
    other.merger.close()
    mine, its = (run.merger.records[0].run for run in (first, other))
    assert "" not in (mine, its)
    assert mine != its
    for folder, run, last in ((tmp_path, mine, 4), (tmp_path / "b", its, 8), (tmp_path, mine, 6)):
        options = {**OPTIONS, "output_dir": str(merged)}
        again = Run(folder, resume=True, **options).steps(last + 1, last + 2).save()
        again.merger.close()
        steps = list(range(2, last + 3, 2))
        assert [(one["step"], one["run"]) for one in records(merged / "metrics.jsonl")] == [(s, run) for s in steps]
        index = json.loads((merged / "index.json").read_text())
        assert [entry["step"] for entry in index["snapshots"]] == steps
        assert {read_merge(merged / entry["name"])["run"] for entry in index["snapshots"]} == {run}
        assert read_merge(find_snapshot(merged))["run"] == run
    assert sorted(runs_of(merged).values()).count(its) == 5


def test_a_run_without_its_state_takes_nothing_of_another(tmp_path):
    merged = tmp_path / "merged"
    Run(tmp_path, **OPTIONS).steps(1, 6).merger.close()
    run = Run(tmp_path, resume=True, keep_last=9).steps(5, 8)  # there is no state
    run.merger.close()
    assert [one["step"] for one in records(merged / "metrics.1.jsonl")] == [2, 4, 6]
    assert [one["step"] for one in records(merged / "metrics.jsonl")] == [6, 8]
    assert (merged / "step-00000006.1" / "merge.json").is_file()


def test_lines_of_another_run_in_one_file_are_moved_to_another(tmp_path):
    Run(tmp_path, **OPTIONS).steps(1, 4).save().merger.close()
    path = tmp_path / "merged" / "metrics.jsonl"
    line = json.dumps({**records(path)[0], "run": "another", "step": 6})
    path.write_text(path.read_text() + line + "\n")
    Run(tmp_path, resume=True, **OPTIONS).steps(5, 8).merger.close()
    assert [one["step"] for one in records(path)] == [2, 4, 6, 8]
    assert [one["run"] for one in records(path.with_name("metrics.1.jsonl"))] == ["another"]


@pytest.mark.parametrize("same", [True, False])
def test_snapshots_measured_on_other_data_stay(tmp_path, same):
    Run(tmp_path, **OPTIONS).steps(1, 4).save().merger.close()
    for step in (5, 6):
        options = {**OPTIONS, "merge_every": 8, "merge_at_end": False, "seed": 0 if same else 7}
        Run(tmp_path, resume=True, **options).steps(step, step).save().merger.close()
        assert sorted(runs_of(tmp_path / "merged")) == ["step-00000002", "step-00000004"]
