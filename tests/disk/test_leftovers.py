"""What a killed run leaves behind goes at the next start, and nothing else does."""

import json
import shutil

import torch
from tiny_run import Run

from traj_merge_callback import find_snapshot

LEFTOVER = "0123456789abcdef" * 2


def killed(tmp_path):
    """A run that was killed at step 8, half-way in several things, after its state of step 4."""
    Run(tmp_path, keep_last=9).steps(1, 4).save()
    run = Run(tmp_path, resume=True, keep_last=9).steps(5, 8)
    merged = tmp_path / "merged"
    left = [merged / f".tmp-step-00000010-{LEFTOVER}", tmp_path / f".tmp-state-{LEFTOVER}"]
    for folder in left:
        folder.mkdir()
        (folder / "half").write_text("half")
    left.append(merged / f".tmp-index.json-{LEFTOVER}")
    left[-1].write_text("{")
    return run, merged, left


def names(merged):
    return sorted(path.name for path in merged.glob("step-*"))


def test_leftovers_and_orphans_go_at_the_first_step_of_a_resumed_run(tmp_path):
    _, merged, left = killed(tmp_path)
    assert names(merged) == [f"step-0000000{step}" for step in (2, 4, 6, 8)]
    mine = [merged / ".tmp-mine", tmp_path / f".tmp-mine-{LEFTOVER}", merged / "step-00000099"]
    for folder in mine:
        folder.mkdir()
    other = merged / "step-00000098"  # of another run
    shutil.copytree(merged / "step-00000008", other)
    merge = json.loads((other / "merge.json").read_text())
    (other / "merge.json").write_text(json.dumps({**merge, "run": "another"}))
    Run(tmp_path, resume=True, keep_last=9).steps(5, 5)
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in [*mine, other])
    assert names(merged) == ["step-00000002", "step-00000004", "step-00000098", "step-00000099"]
    assert find_snapshot(merged, "latest").name == "step-00000004"
    assert (merged / "latest").resolve() == find_snapshot(merged, "latest")


def test_a_new_run_in_the_same_folder_removes_leftovers_and_keeps_snapshots(tmp_path):
    _, merged, left = killed(tmp_path)
    Run(tmp_path, keep_last=9).steps(1, 1)
    assert not any(path.exists() for path in left if path.parent == merged)
    assert names(merged) == [f"step-0000000{step}" for step in (2, 4, 6, 8)]


def test_a_reader_of_best_has_one_snapshots_folder(tmp_path):
    run = Run(tmp_path, keep_last=9).steps(1, 2)
    folder = find_snapshot(tmp_path / "merged", "latest")
    before = torch.frombuffer(bytearray((folder / "model.safetensors").read_bytes()), dtype=torch.uint8)
    run.steps(3, 6)
    after = torch.frombuffer(bytearray((folder / "model.safetensors").read_bytes()), dtype=torch.uint8)
    assert torch.equal(before, after)
    assert not folder.is_symlink()
    assert find_snapshot(tmp_path / "merged", "latest") != folder
