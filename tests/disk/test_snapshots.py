"""Snapshots are whole or absent, can be found, and load as what was measured."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import same_weights, tiny_llama
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from traj_merge_callback import find_snapshot, load_merged, read_merge
from traj_merge_callback.disk.model_files import _read_shards, _write_shards, collect_weights, weights_format
from traj_merge_callback.disk.snapshots import SnapshotStore
from traj_merge_callback.disk.untrusted import damage_of
from traj_merge_callback.window.layout import ParameterLayout


def publish(store, step, loss, model=None):
    model = model or nn.Linear(2, 2)
    layout = ParameterLayout(model)
    merge = {"weights_format": weights_format(model), "merged_tensors": [slot.name for slot in layout.slots]}
    return store.publish(step, loss, 9.0 - loss, collect_weights(model, layout), merge)


def folders(path):
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.is_symlink())


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "expected"),
    [
        (2, True, ["step-00000002", "step-00000004", "step-00000005"]),
        (1, False, ["step-00000005"]),
        (0, True, ["step-00000002"]),
        (7, False, [f"step-0000000{step}" for step in range(1, 6)]),
    ],
)
def test_pruning_keeps_the_last_and_the_best(tmp_path, keep_last, keep_best, expected):
    store = SnapshotStore(tmp_path / "out", keep_last=keep_last, keep_best=keep_best)
    for step, loss in enumerate([3.0, 1.0, 2.0, 1.5, 1.2], start=1):
        publish(store, step, loss)
    assert folders(tmp_path / "out") == expected
    if keep_best:
        assert find_snapshot(tmp_path / "out").name == "step-00000002"
        assert (tmp_path / "out" / "best").resolve() == find_snapshot(tmp_path / "out")
    assert find_snapshot(tmp_path / "out", "latest").name == expected[-1]


def test_a_failed_write_leaves_nothing(tmp_path):
    store = SnapshotStore(tmp_path, keep_last=2, keep_best=True)

    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        store.publish(1, 1.0, 1.0, write, {})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="no merged snapshot"):
        find_snapshot(tmp_path)


def test_a_step_published_again_is_replaced(tmp_path):
    store = SnapshotStore(tmp_path, keep_last=2, keep_best=True)
    publish(store, 7, 1.0)
    model = nn.Linear(2, 2)
    publish(store, 7, 0.5, model)
    assert folders(tmp_path) == ["step-00000007"]
    other = nn.Linear(2, 2)
    load_merged(find_snapshot(tmp_path), other)
    assert same_weights(model, other)


PUBLISHER = """
import sys
import torch
from pathlib import Path
from traj_merge_callback.disk.snapshots import SnapshotStore
from traj_merge_callback.window.layout import ParameterLayout
from traj_merge_callback.disk.model_files import collect_weights
store = SnapshotStore(Path(sys.argv[1]), keep_last=2, keep_best=True)
model = torch.nn.Linear(1500, 1500)
layout = ParameterLayout(model)
merge = {"weights_format": "state_dict", "merged_tensors": ["weight", "bias"]}
for step in range(1, 10**6):
    torch.nn.init.constant_(model.weight, step)
    written = {**merge, "step": step}
    store.publish(step, 1 / step if step % 3 else 1.0, 0.0, collect_weights(model, layout), written)
    print(step, flush=True)
"""


@pytest.mark.parametrize("delay_ms", [0, 7, 19, 31, 47, 61])
def test_sigkill_leaves_whole_snapshots_and_an_index_that_leads_to_them(tmp_path, delay_ms):
    process = subprocess.Popen([sys.executable, "-c", PUBLISHER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    time.sleep(delay_ms / 1000)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    model = nn.Linear(1500, 1500)
    snapshots = [path for path in tmp_path.glob("step-*") if not path.is_symlink()]
    assert snapshots
    for path in [*snapshots, find_snapshot(tmp_path), find_snapshot(tmp_path, "latest")]:
        load_merged(path, model)
        step = int(path.name.removeprefix("step-"))
        assert (model.weight == step).all()
    json.loads((tmp_path / "index.json").read_text())
    # The next run in this folder clears away what was half-written.
    publish(SnapshotStore(tmp_path, keep_last=1, keep_best=False), 10**7, 1.0)
    assert not list(tmp_path.glob(".tmp-*"))


def test_whoever_reads_best_while_the_run_goes_on_never_mixes_two_snapshots(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", PUBLISHER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    model, loaded, until = nn.Linear(1500, 1500), set(), time.monotonic() + 60.0
    try:
        while len(loaded) < 8 and time.monotonic() < until:
            for folder in (tmp_path / "best", tmp_path / "latest"):
                try:
                    step = load_merged(folder, model)["step"]
                except FileNotFoundError:  # it was pruned meanwhile
                    continue
                assert (model.weight == step).all()
                loaded.add(step)
    finally:
        process.kill()
        process.wait()
    assert len(loaded) >= 8


def test_a_file_that_is_pruned_while_it_is_opened_is_missing_and_not_damaged(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(FileNotFoundError, match="removed while it was read"), damage_of(path):
        # safetensors reads the header, and has torch open the file once more.
        path.unlink()
        torch.UntypedStorage.from_file(str(path), shared=False, nbytes=8)


def test_large_weights_are_sharded_and_read_back(tmp_path):
    state = {f"layer.{i}": torch.full((10,), float(i)) for i in range(5)}
    _write_shards(tmp_path, state, shard_bytes=90)
    assert len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == 3
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == 200
    found = _read_shards(tmp_path)
    assert all(torch.equal(found[name], value) for name, value in state.items())


class Tied(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(8, 4)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight


def test_a_plain_module_round_trips_with_ties_buffers_and_frozen_parts(tmp_path):
    model, other = Tied(0), Tied(1)
    model.norm(torch.randn(5, 4))
    frozen = other.frozen.weight.clone()
    load_merged(publish(SnapshotStore(tmp_path, keep_last=1, keep_best=True), 1, 1.0, model), other)
    assert torch.equal(other.head.weight, model.embed.weight)
    assert torch.equal(other.norm.running_mean, model.norm.running_mean)
    assert other.norm.num_batches_tracked == 1
    assert torch.equal(other.frozen.weight, frozen)


def test_a_hugging_face_model_loads_with_from_pretrained_and_in_place(tmp_path):
    model = tiny_llama(seed=3)
    folder = publish(SnapshotStore(tmp_path, keep_last=1, keep_best=True), 1, 1.0, model)
    assert same_weights(AutoModelForCausalLM.from_pretrained(folder), model)
    other = tiny_llama(seed=4)
    load_merged(tmp_path / "best", other)
    assert same_weights(other, model)


def test_a_snapshot_that_does_not_fit_names_the_tensors_and_changes_nothing(tmp_path):
    folder = publish(SnapshotStore(tmp_path, keep_last=1, keep_best=True), 1, 1.0, nn.Linear(2, 2))
    other = nn.Linear(2, 3)
    before = other.weight.clone()
    with pytest.raises(ValueError, match=r"weight is \(2, 2\) in the snapshot, \(3, 2\) in the model"):
        load_merged(folder, other)
    assert torch.equal(other.weight, before)
    with pytest.raises(ValueError, match="is not in the model"):
        load_merged(folder, nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(FileNotFoundError, match=r"no merge\.json"):
        load_merged(tmp_path / "nothing", other)
    with pytest.raises(ValueError, match="which='newest'"):
        find_snapshot(tmp_path, "newest")


def test_a_newer_format_is_refused(tmp_path):
    folder = publish(SnapshotStore(tmp_path, keep_last=1, keep_best=True), 1, 1.0)
    merge = json.loads((folder / "merge.json").read_text())
    (folder / "merge.json").write_text(json.dumps({**merge, "version": 99}))
    with pytest.raises(ValueError, match="format version 99"):
        read_merge(folder)
