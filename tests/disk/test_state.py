"""Merging states and sharded snapshots: read by other numbers of ranks, whole or refused, and never unpickled."""

import itertools
import json
import pickle

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from traj_merge_callback import CheckpointWindow, consolidate_snapshot
from traj_merge_callback.disk.checksums import checksums_of, with_checksums
from traj_merge_callback.disk.parts import PartsIndex, Range
from traj_merge_callback.disk.state import RunState, Saved, load_state, save_state
from traj_merge_callback.distributed import Processes

ALONE = Processes(alone=True)


def saved_window(folder, model, **options):
    window = CheckpointWindow(model, 3, **options)
    for step in range(1, 6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        window.push(model, step)
    index = PartsIndex.of(window.layout.slots, ALONE)
    save_state(folder, window.state_dict(), index, Saved(RunState(5), None, "digest", []), ALONE)
    return window


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "bfloat16"}, {"dtype": "int8"}, {"mean_rows": True}, {"average_rate": lambda step: 0.1}]
)
def test_a_state_comes_back_bit_for_bit(tmp_path, options):
    model = tiny_llama()
    window = saved_window(tmp_path / "state", model, **options)
    other = CheckpointWindow(model, 3, **options)
    assert load_state(tmp_path / "state", other, 5) == Saved(RunState(5), None, "digest", [])
    assert other.steps == window.steps == (3, 4, 5)
    weights = np.linspace(-0.2, 0.7, window.num_weights)
    assert torch.equal(other.combine(weights), window.combine(weights))
    assert torch.equal(other.combine(None), window.combine(None))


def test_int8_rows_stay_int8_on_disk(tmp_path):
    model = tiny_llama()
    window = saved_window(tmp_path / "state", model, dtype="int8")
    row = load_file(tmp_path / "state" / "row-00.rank-00000.safetensors")
    assert row["deltas"].dtype is torch.int8
    rows = [path.stat().st_size for path in (tmp_path / "state").glob("row-*")]
    assert len(rows) == 3
    assert max(rows) < 1.1 * window.layout.numel


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a file that was read executed code')",))


def test_nothing_that_is_read_is_unpickled(tmp_path):
    model = nn.Linear(3, 2)
    saved_window(tmp_path / "state", model)
    for name in (".metadata", "state.pkl", "row-00.rank-00000.safetensors"):
        (tmp_path / "state" / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(Exception, match=r"(?i)header|safetensor|damaged"):
        load_state(tmp_path / "state", CheckpointWindow(model, 3), 5)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / ".metadata").write_bytes(pickle.dumps(Trap()))
    (snapshot / "weights.rank-00000.safetensors").write_bytes(pickle.dumps(Trap()))
    tensors = {"weight": {"shape": [3], "front": 0, "dtype": "float32"}}
    merge = {"version": 1, "sharded": {"tensors": tensors, "parts": {"0": [["weight", 0, 3]]}}}
    (snapshot / "merge.json").write_text(json.dumps(merge))
    with pytest.raises(Exception, match=r"(?i)header|safetensor|damaged"):
        consolidate_snapshot(snapshot, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_folders_of_earlier_formats_are_refused_by_name(tmp_path):
    model = nn.Linear(3, 2)
    saved_window(tmp_path / "state", model)
    document = json.loads((tmp_path / "state" / "state.json").read_text())
    (tmp_path / "state" / "state.json").write_text(json.dumps({**document, "version": 1}))
    with pytest.raises(ValueError, match="format version 1; this version of traj-merge-callback reads 4"):
        load_state(tmp_path / "state", CheckpointWindow(model, 3), 5)
    (tmp_path / "merge.json").write_text(json.dumps({"version": 1, "sharded": {"weight": {"shape": [2], "front": 0}}}))
    with pytest.raises(ValueError, match="written in parts by an earlier version"):
        consolidate_snapshot(tmp_path, tmp_path / "model")


def test_a_missing_part_and_a_damaged_index_are_errors(tmp_path):
    model = nn.Linear(3, 2)
    saved_window(tmp_path / "state", model)
    path = tmp_path / "state" / "state.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "index": {**document["index"], "parts": {"0": [["weight", 0]]}}}))
    with pytest.raises(ValueError, match=r"state\.json is damaged .*the index of parts is not valid"):
        load_state(tmp_path / "state", CheckpointWindow(model, 3), 5)
    crafted = {**document, "index": {**document["index"], "parts": {"0": [["weight", 0, 6]]}}}
    del crafted["checksum"]
    path.write_text(json.dumps(with_checksums(crafted, document["checksums"])))
    with pytest.raises(ValueError, match="the files hold no 'bias' from number 0 on"):
        load_state(tmp_path / "state", CheckpointWindow(model, 3), 5)
    path.write_text(json.dumps(document))
    (tmp_path / "state" / "row-01.rank-00000.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "state", CheckpointWindow(model, 3), 5)


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    writers=st.integers(1, 5),
    readers=st.integers(1, 5),
)
def test_any_number_of_ranks_reads_what_any_other_number_wrote(sizes, writers, readers):
    whole = np.arange(sum(sizes))
    begins = np.concatenate([[0], np.cumsum(sizes)])

    def divided(ranks):
        """The ranges of each rank, if the columns are divided evenly."""
        share = -(-len(whole) // ranks)
        found = []
        for rank in range(ranks):
            first, last = min(rank * share, len(whole)), min((rank + 1) * share, len(whole))
            bounds = [(max(first, b), min(last, e)) for b, e in itertools.pairwise(begins)]
            found.append(
                tuple(Range(f"t{i}", int(lo - begins[i]), int(hi - lo)) for i, (lo, hi) in enumerate(bounds) if lo < hi)
            )
        return found, share

    written, share = divided(writers)
    tensors = {f"t{i}": {"shape": [size], "front": 0, "dtype": "float32"} for i, size in enumerate(sizes)}
    index = PartsIndex(tensors, {rank: ranges for rank, ranges in enumerate(written) if ranges})
    assert PartsIndex.from_json(json.loads(json.dumps(index.to_json()))) == index
    parts = [whole[rank * share : (rank + 1) * share] for rank in range(writers)]
    wanted, share = divided(readers)
    for rank, ranges in enumerate(wanted):
        target = np.full(sum(one.count for one in ranges), -1)
        begin = 0
        for one in ranges:
            for copy in index.copies(one):
                target[begin : begin + one.count][copy.target] = parts[copy.rank][copy.columns]
            begin += one.count
        np.testing.assert_array_equal(target, whole[rank * share : (rank + 1) * share])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.busy_s", "x"),
        ("run.last_step", "x"),
        ("run.last_merge_step", None),
        ("run.wall_s", None),
        ("run.history", [["a", "b"]]),
        ("run.history", [[1, 2, 3]]),
        ("run.search", {}),
        ("run.search.previous", "abc"),
        ("run.search.memory", [1]),
        ("run.search.row_losses", {"8": "x"}),
        ("run", None),
        ("merging", "x"),
        ("snapshots", 5),
        ("snapshots", [{"a": 1}]),
        ("snapshots", [{"name": "../elsewhere", "step": 1, "search_loss": 1.0, "merged_loss": 1.0}]),
        ("window.spans", [[8, 8, 1], [6, 6, 1], [4, 4, 1]]),
        ("window.spans", [[1, 4, 0]]),
        ("window.spans", [[1, 4], [6, 8, 2]]),
        ("run.search.spans", [[1, 2]]),
        ("window.pushed", 2.5),
        ("window.sampled", None),
        ("index", {}),
        ("version", None),
    ],
)
def test_a_damaged_state_restores_nothing_and_says_where(tmp_path, key, value):
    model = nn.Linear(3, 2)
    saved_window(tmp_path / "state", model)
    path = tmp_path / "state" / "state.json"
    document = json.loads(path.read_text())
    *owners, name = key.split(".")
    owner = document
    for one in owners:
        owner = owner[one]
    owner[name] = value
    path.write_text(json.dumps(document))
    window = CheckpointWindow(model, 3)
    with pytest.raises(ValueError, match=r"state\.json is damaged|format version None"):
        load_state(tmp_path / "state", window, 5)
    assert window.steps == ()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"'])
def test_a_state_that_is_no_state_is_an_error_with_its_path(tmp_path, text):
    model = nn.Linear(3, 2)
    saved_window(tmp_path / "state", model)
    (tmp_path / "state" / "state.json").write_text(text)
    with pytest.raises(ValueError, match=r"state\.json is damaged"):
        load_state(tmp_path / "state", CheckpointWindow(model, 3), 5)


def test_a_damaged_part_names_the_folder(tmp_path):
    model = nn.Linear(3, 2)
    saved_window(tmp_path / "state", model)
    path = tmp_path / "state" / "row-01.rank-00000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"row-01\.rank-00000\.safetensors is damaged"):
        load_state(tmp_path / "state", CheckpointWindow(model, 3), 5)
    save_file({"row": load_file(path.with_name("row-00.rank-00000.safetensors"))["row"].half()}, path)
    document = json.loads((tmp_path / "state" / "state.json").read_text())
    del document["checksum"]
    checksums = {name: one for name, one in checksums_of(tmp_path / "state").items() if name != "state.json"}
    (tmp_path / "state" / "state.json").write_text(json.dumps(with_checksums(document, checksums)))
    with pytest.raises(ValueError, match=r"dtype torch\.float16"):
        load_state(tmp_path / "state", CheckpointWindow(model, 3), 5)


def test_rows_may_be_kept_elsewhere_after_resuming(tmp_path):
    model = nn.Linear(3, 2)
    window = saved_window(tmp_path / "state", model)
    other = CheckpointWindow(model, 3, buffered=True)
    load_state(tmp_path / "state", other, 5)
    assert torch.equal(other.combine(None), window.combine(None))
    assert torch.equal(other.combine([0.2, 0.3, 0.5]), window.combine([0.2, 0.3, 0.5]))
