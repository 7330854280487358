"""Under DDP, with two real processes: training is untouched, and only the first process merges."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).parent / "ddp_program.py"
IMPORTED = [str(PROGRAM.parent), str(PROGRAM.parents[1] / "examples")]


@pytest.mark.parametrize("kind", ["transformers", "lightning"])
def test_two_processes_train_bit_identically_and_publish_once(tmp_path, kind):
    weights = {}
    for mode in ("plain", "merging"):
        folder = tmp_path / mode
        folder.mkdir()
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        process = subprocess.run(
            [*launch, str(PROGRAM), kind, mode, str(folder)],
            capture_output=True,
            text=True,
            timeout=200,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(IMPORTED)},
            check=False,
        )
        assert process.returncode == 0, process.stderr[-3000:]
        weights[mode] = [torch.load(folder / f"weights-{rank}.pt") for rank in range(2)]
    for plain, merging in zip(weights["plain"], weights["merging"], strict=True):
        assert all(torch.equal(plain[name], merging[name]) for name in plain)
    lines = (tmp_path / "merging" / "merged" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8]
    assert not list((tmp_path / "merging" / "merged").glob(".tmp-*"))
