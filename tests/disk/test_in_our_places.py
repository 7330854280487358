"""Links, pipes and folders of others where files of ours belong; rows that are gone; times of the trainer's folders."""

import json
import os

import pytest
import torch
from tiny_run import Run

from traj_merge_callback import find_snapshot
from traj_merge_callback.disk.atomic import shared_folder
from traj_merge_callback.disk.checksums import check_files
from traj_merge_callback.distributed import Processes


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
@pytest.mark.parametrize("name", [".traj-merge.lock", "metrics.damaged.txt", "index.json"])
def test_what_is_no_file_of_ours_is_set_aside(tmp_path, kind, name):
    run = Run(tmp_path).steps(1, 4).save()
    run.merger.close()
    victim = tmp_path / "victim.txt"
    if name != ".traj-merge.lock":
        victim.write_text("mine\n")
    with (tmp_path / "merged" / "metrics.jsonl").open("a") as file:
        file.write("no record\n")
    path = tmp_path / "merged" / name
    path.unlink(missing_ok=True)
    {"link": lambda: path.symlink_to(victim), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    resumed = Run(tmp_path, resume=True).steps(5, 8)
    resumed.merger.close()
    assert victim.read_text() == "mine\n" if victim.exists() else name == ".traj-merge.lock"
    lines = (tmp_path / "merged" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6, 8]
    assert find_snapshot(tmp_path / "merged", "latest").name == "step-00000008"


def test_checksums_open_no_file_outside_of_the_folder(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "victim.txt").write_text("mine")
    for name in ("../victim.txt", str(tmp_path / "victim.txt"), "/proc/self/pagemap"):
        with pytest.raises(ValueError, match="damaged"):
            check_files(tmp_path / "inside", {"checksums": {name: "0" * 64}})


def test_a_run_that_is_rewound_in_the_same_process_saves_its_own_rows(tmp_path):
    run = Run(tmp_path).steps(1, 4).save()
    run.steps(5, 8)
    run.merger.save_state(tmp_path / "first")
    run.merger.load_state(tmp_path / "state", run.model, 4)
    with torch.no_grad():
        run.model.weight.fill_(7.0)
    run.steps(5, 8)
    run.merger.save_state(tmp_path / "second")
    run.merger.wait()
    other = Run(tmp_path / "other")
    other.merger.load_state(tmp_path / "second", other.model, 8)
    assert torch.equal(other.merger.window.combine([0.0, 1.0])[:9].view(3, 3), run.model.weight)
    lines = (tmp_path / "merged" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6, 8]


def test_a_window_that_comes_late_does_not_make_an_old_checkpoint_new(tmp_path):
    checkpoint = tmp_path / "checkpoint-10"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"x")
    os.utime(checkpoint, ns=(10**18, 10**18))
    target = checkpoint / "traj_merge"
    with shared_folder(target, Processes(alone=True), tmp_path / "merged", describe=lambda found: None) as temporary:
        (temporary / "state.json").write_text("{}")
    assert (target / "state.json").is_file()
    assert checkpoint.stat().st_mtime_ns == 10**18
