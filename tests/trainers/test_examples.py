"""Every example runs as a user would run it, at a tiny size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRAMS = ["plain_loop", "nanogpt_loop", "accelerate_loop", "transformers_pretrain", "lightning_pretrain", "demo"]


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*PROGRAMS, "realtext"}


def run(folder, name, **options):
    """Run an example; the lines of its metrics.jsonl, and what it printed."""
    options = {"steps": 12, "width": 16, "capture-every": 2, "merge-every": 12, "output-dir": folder / "out", **options}
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    process = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    lines = (folder / "out" / "merged" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], process.stdout


def test_the_plain_loop_resumes(tmp_path):
    run(tmp_path, "plain_loop", **{"merge-every": 6, "save-every": 8})
    lines, _ = run(tmp_path, "plain_loop", **{"merge-every": 6, "steps": 18, "resume": "out/checkpoint-8"})
    # The merge of step 12 was made again, of a window with rows from before.
    assert [line["step"] for line in lines] == [6, 12, 18]
    assert lines[1]["row_spans"][0][0] <= 8
    assert len({line["run"] for line in lines}) == 1


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_example_runs(tmp_path, name):
    lines, printed = run(tmp_path, name)
    merged = tmp_path / "out" / "merged"
    assert [line["step"] for line in lines] == [12]
    assert (merged / "best" / "merge.json").exists()
    if name not in ("plain_loop", "nanogpt_loop"):
        found = [EventAccumulator(str(path.parent)).Reload() for path in (tmp_path / "out").rglob("events*")]
        scalars = {tag for board in found for tag in board.Tags()["scalars"]}
        assert any(tag.endswith("merge/loss") for tag in scalars)
    if name == "demo":
        assert "Best snapshot" in printed
        assert (tmp_path / "out" / "demo.png").stat().st_size > 10_000
