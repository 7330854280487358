"""Rows in every format and place: what they hold, what they take, and that products with them are right."""

import math

import numpy as np
import pytest
import torch
from conftest import tiny_llama, train_steps
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from traj_merge_callback import CheckpointWindow, HeldOutLoss
from traj_merge_callback.disk.mapped import on_disk
from traj_merge_callback.distributed import Processes
from traj_merge_callback.evaluate.weights import installed
from traj_merge_callback.window.products import Landing
from traj_merge_callback.window.storage import in_memory, rows_of


class Walk(nn.Module):
    """Parameters whose sizes are no multiples of anything, walking at random."""

    def __init__(self, seed, numel=(517, 64, 3)):
        super().__init__()
        self.rng = torch.Generator().manual_seed(seed)
        self.tensors = nn.ParameterList(torch.randn(n, generator=self.rng) for n in numel)

    @torch.no_grad()
    def walk(self):
        for tensor in self.tensors:
            tensor.add_(0.01 * torch.randn(tensor.shape, generator=self.rng))
        return torch.cat([tensor.detach().flatten() for tensor in self.tensors]).double().numpy()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), size=st.integers(2, 5), pushes=st.integers(2, 14), mean=st.booleans())
def test_int8_rows_differ_by_a_small_part_of_what_neighbours_differ(seed, size, pushes, mean):
    model = Walk(seed)
    window = CheckpointWindow(model, size, dtype="int8", mean_rows=mean, groups={"first": ["tensors.0"]})
    pushed = []
    for step in range(pushes):
        pushed.append(model.walk())
        window.push(model, step)
    matrix = np.array(pushed[-size:])
    held = len(matrix)
    rows = np.array([window.combine(np.eye(held)[index]).double().numpy() for index in range(held)])
    # No row is further from the anchor than the window's length in steps of 0.01 (4 standard deviations);
    # a row is rounded when it comes and when the anchor is renewed.
    largest = 0.01 * 4 * math.sqrt(2 * size) * 2
    assert np.abs(rows - matrix).max() <= largest / 254 * 2
    # The products are those of the rows as they are kept, by group as well.
    rng = np.random.default_rng(seed)
    weights, vector = rng.normal(size=held), rng.normal(size=matrix.shape[1]).astype(np.float32)
    np.testing.assert_allclose(window.combine(weights).double().numpy(), weights @ rows, atol=1e-5)
    np.testing.assert_allclose(window.project(torch.from_numpy(vector)), rows @ vector, atol=1e-3)
    deltas = rows - rows[-1]
    np.testing.assert_allclose(window.gram(), deltas @ deltas.T, atol=1e-5)
    by_group = rng.normal(size=(2, held))
    grouped = np.concatenate([by_group[0] @ rows[:, :517], by_group[1] @ rows[:, 517:]])
    np.testing.assert_allclose(window.combine(by_group).double().numpy(), grouped, atol=1e-5)
    products = window.project(torch.from_numpy(vector), grouped=True)
    np.testing.assert_allclose(products[1], rows[:, 517:] @ vector[517:], atol=1e-3)


def test_live_is_exact_however_rows_are_kept():
    for options in ({}, {"dtype": "bfloat16"}, {"dtype": "int8"}, {"mean_rows": True}):
        model = Walk(0)
        window = CheckpointWindow(model, 2, **options)
        for step in range(1, 4):
            live = model.walk()
            window.push(model, step)
        assert np.array_equal(window.combine(None).double().numpy(), live)
    model = tiny_llama().to(torch.bfloat16)
    live = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    for options in ({}, {"dtype": "int8"}, {"mean_rows": True}, {"buffered": True}):
        window = CheckpointWindow(model, 2, **options)
        window.push(model, 1)
        assert torch.equal(window.combine(None), live.float())
        assert torch.equal(window.combine([1.0]), live.float())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("mean_rows", [False, True])
def test_rows_on_disk_are_the_rows_in_memory(tmp_path, dtype, mean_rows):
    windows = []
    for allocate in (None, on_disk(tmp_path, Processes(alone=True))):
        model = Walk(1)
        window = CheckpointWindow(model, 3, dtype=dtype, mean_rows=mean_rows, allocate=allocate)
        for step in range(1, 6):
            model.walk()
            window.push(model, step)
        windows.append(window)
    memory, disk = windows
    weights, vector = [0.5, 0.7, -0.2], torch.randn(584)
    assert torch.equal(memory.combine(weights), disk.combine(weights))
    assert np.array_equal(memory.project(vector), disk.project(vector))
    # Their files have no names, so nobody else can write to them, and nothing is left behind.
    assert list(tmp_path.iterdir()) == []


def test_a_row_takes_what_is_promised():
    model = tiny_llama(hidden_size=128)
    numel = sum(parameter.numel() for parameter in model.parameters())
    for dtype, most in (("float32", 4.0), ("bfloat16", 2.0), ("int8", 1.1)):
        assert CheckpointWindow(model, 8, dtype=dtype).row_nbytes / numel <= most


def test_merges_of_int8_rows_lose_nothing_that_matters(train, heldout):
    model = tiny_llama(dropout=0.0)
    windows = {dtype: CheckpointWindow(model, 8, dtype=dtype) for dtype in ("float32", "int8")}

    def each(step):
        if step % 20 == 0:
            for window in windows.values():
                window.push(model, step)

    train_steps(model, train, 300, each, lr=5e-3)
    loss = HeldOutLoss(DataLoader(heldout, batch_size=8))
    for weights in (np.full(8, 1 / 8), [0, 0, 0, -0.3, 0.2, 0.3, 0.4, 0.4]):
        found = {}
        for dtype, window in windows.items():
            with installed(window.layout, model, window.combine(weights)):
                found[dtype] = loss.evaluate(model, "report").loss
        assert found["int8"] == pytest.approx(found["float32"], abs=3e-4)
    live = loss.evaluate(model, "report").loss
    assert found["float32"] < live  # a real trajectory, on which merging does something


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_window_is_restored_bit_for_bit_and_goes_on_alike(dtype):
    model = Walk(2)
    window = CheckpointWindow(model, 3, dtype=dtype)
    other = CheckpointWindow(model, 3, dtype=dtype)
    for step in range(1, 6):
        model.walk()
        window.push(model, step)
    other.load_state_dict(window.state_dict())
    for step in range(6, 9):
        model.walk()
        window.push(model, step)
        other.push(model, step)
        assert torch.equal(window.combine([0.2, 0.3, 0.5]), other.combine([0.2, 0.3, 0.5]))
    with pytest.raises(ValueError, match="the saved window's rows are"):
        CheckpointWindow(model, 3, dtype="int8" if dtype != "int8" else "float32").load_state_dict(window.state_dict())


def test_columns_copied_to_a_device_share_two_buffers_and_last_for_two_turns():
    kinds = [rows_of(2, 700, dtype, in_memory()) for dtype in ("float32", "bfloat16", "int8")]
    for rows in kinds:
        for index in range(2):
            rows.write(index, torch.randn(700))
    spans = [slice(0, 300), slice(300, 637), slice(637, 700)]
    items = [rows.stored(index, columns) for columns in spans for rows in kinds for index in range(2)]
    landing = Landing(items, torch.device("cpu"))
    before, places = (), set()
    for last, item in zip([(), *items], items, strict=False):
        copies = landing.copy(item)
        for copy, tensor in zip((*before, *copies), (*last, *item), strict=True):
            assert (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(copy, tensor)
        before = copies
        places.add(copies[0].untyped_storage().data_ptr())
    assert len(places) == 2
