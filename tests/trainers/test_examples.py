"""Every example runs as a user would run it, at a tiny size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRAMS = ["plain_loop", "accelerate_loop", "transformers_pretrain", "lightning_pretrain", "demo"]


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*PROGRAMS, "realtext"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_example_runs(tmp_path, name):
    options = {"steps": 12, "width": 16, "capture-every": 2, "merge-every": 12, "output-dir": tmp_path / "out"}
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    process = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    merged = tmp_path / "out" / "merged"
    lines = [json.loads(line) for line in (merged / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [12]
    assert (merged / "best" / "merge.json").exists()
    if name != "plain_loop":
        found = [EventAccumulator(str(path.parent)).Reload() for path in (tmp_path / "out").rglob("events*")]
        scalars = {tag for board in found for tag in board.Tags()["scalars"]}
        assert any(tag.endswith("merge/loss") for tag in scalars)
    if name == "demo":
        assert "Best snapshot" in process.stdout
        assert (tmp_path / "out" / "demo.png").stat().st_size > 10_000
