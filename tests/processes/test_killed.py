"""The short form of ``benchmarks/crash.py``: real runs, killed at random moments and started again."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_kills_tear_nothing_and_change_no_training(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "crash.py"), "--kills", "6", "--attempts", "2"]
    command += ["--strategies", "loop", "lightning", "fsdp2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    output = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    found = json.loads(output.splitlines()[-1])
    assert found["kills"] >= 6
    bad = ("torn", "mismatched", "orphans", "final_weights_differ", "no_merge_at_the_end", "metrics", "failed")
    assert not any(found[name] for name in (*bad, "failures_logged")), output
