"""With several ranks one of them runs the command, which is no rank itself, and all of them know what it found."""

import json

import torch
from test_distributed import records, run_ranks, same_weights

ON_PUBLISH = """sh -c 'echo "{{\\"rank\\": ${{RANK:--1}}, \\"ranks\\": ${{WORLD_SIZE:--1}}}}"; : {snapshot}'"""
OPTIONS = {"on_publish": ON_PUBLISH, "keep_last": 1, "keep_best": False}
RUNS = [
    {"name": "ddp", "strategy": "ddp", **OPTIONS},
    {"name": "plain", "strategy": "ddp", "merging": False},
    {"name": "parts", "strategy": "fsdp2", "snapshot_files": "sharded", **OPTIONS},
]


def test_all_ranks_know_what_was_found(tmp_path):
    run_ranks("loop.py", 2, str(tmp_path), json.dumps(RUNS))
    assert same_weights(tmp_path / "ddp", tmp_path / "plain")
    for run in ("ddp", "parts"):
        mine, theirs = records(tmp_path, run), records(tmp_path, run, rank=1)
        assert [record["step"] for record in mine] == [6, 12]
        assert [record["eval"] for record in mine] == [record["eval"] for record in theirs]
        assert mine[-1]["eval"] == {"rank": -1, "ranks": -1}
        assert [path.name for path in (tmp_path / run / "merged").glob("step-*")] == ["step-00000012"]
        lines = (tmp_path / run / "merged" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["eval"] for line in lines] == [record["eval"] for record in mine]
    assert torch.isfinite(next(iter(torch.load(tmp_path / "parts" / "weights.pt").values()))).all()
