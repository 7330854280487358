"""The window's two products against plain matrix products, and what it accepts."""

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from traj_merge_callback import CheckpointWindow
from traj_merge_callback.evaluate.weights import installed


class Net(nn.Module):
    """Tied weights, float and integer buffers, a frozen layer, and a buffer outside the state dict."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.tied = nn.Linear(width, width)
        self.tied.weight = self.first.weight
        self.norm = nn.BatchNorm1d(width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def filled(rows: int, size: int, seed: int = 0, **options):
    """A window with random checkpoints pushed, and the matrix it should hold."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2, bias=False))
    window = CheckpointWindow(model, size, **options)
    expected = []
    for step in range(1, rows + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter))
        window.push(model, step)
        expected.append(torch.cat([p.detach().flatten() for p in model.parameters()]).double().numpy())
    return window, np.array(expected[-size:])


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 12), size=st.integers(2, 6), seed=st.integers(0, 99))
def test_combine_and_project_are_the_matrix_products(rows, size, seed):
    window, matrix = filled(rows, size, seed)
    assert window.steps == tuple(range(max(1, rows - size + 1), rows + 1))
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=len(window))
    np.testing.assert_allclose(window.combine(weights).double().numpy(), weights @ matrix, atol=1e-5)
    vector = rng.normal(size=matrix.shape[1])
    projected = window.project(torch.from_numpy(vector))
    np.testing.assert_allclose(projected, matrix @ vector.astype(np.float32), atol=1e-5)


def test_products_are_right_over_several_chunks():
    torch.manual_seed(0)
    model = nn.Embedding(700, 900)  # 630 000 numbers, more than two chunks
    window = CheckpointWindow(model, 3)
    rows = []
    for step in range(1, 4):
        with torch.no_grad():
            model.weight.add_(0.01 * torch.randn_like(model.weight))
        window.push(model, step)
        rows.append(model.weight.detach().flatten().double())
    matrix = torch.stack(rows)
    weights = torch.tensor([0.2, 0.3, 0.5]).double()
    torch.testing.assert_close(window.combine(weights.numpy()).double(), weights @ matrix, atol=1e-6, rtol=0)
    vector = torch.randn(matrix.shape[1])
    np.testing.assert_allclose(window.project(vector), matrix @ vector.double(), atol=1e-2)


def test_project_keeps_the_small_differences_of_near_rows():
    # The rows differ in the seventh digit; float32 products of them would differ by rounding alone.
    torch.manual_seed(0)
    model = nn.Linear(1000, 100, bias=False)
    vector = torch.randn(100_000)
    window = CheckpointWindow(model, 2)
    window.push(model, 1)
    before = model.weight.detach().double().flatten().clone()
    with torch.no_grad():
        model.weight.add_(1e-7 * torch.randn_like(model.weight))
    window.push(model, 2)
    exact = float((model.weight.detach().double().flatten() - before) @ vector.double())
    old, new = window.project(vector)
    assert new - old == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_of_one_gives_its_row_exactly(dtype):
    window, matrix = filled(3, 3, dtype=dtype)
    kept = torch.from_numpy(matrix[1]).to(getattr(torch, dtype)).float()
    assert torch.equal(window.combine([0, 1, 0]), kept)


def test_auto_dtype_loses_nothing():
    model = nn.Linear(4, 4)
    assert CheckpointWindow(model, 2).dtype == "float32"
    assert CheckpointWindow(model.to(torch.bfloat16), 2).dtype == "bfloat16"
    assert CheckpointWindow(nn.Linear(4, 4).half(), 2).dtype == "float32"


def test_rows_hold_trainable_parameters_once_and_float_buffers():
    model = Net()
    names = [slot.name for slot in CheckpointWindow(model, 2).layout.slots]
    assert names == [
        "first.weight",
        "first.bias",
        "tied.bias",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
    ]
    everything = CheckpointWindow(model, 2, trainable_only=False)
    assert "frozen.weight" in [slot.name for slot in everything.layout.slots]


def test_installed_weights_compute_like_a_model_that_has_them_and_leave_the_live_ones_alone():
    torch.manual_seed(0)
    model = Net()
    window = CheckpointWindow(model, 2)
    window.push(model, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pointers = {name: value.data_ptr() for name, value in model.named_parameters()}
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(1)
    window.push(model, 2)
    live = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), installed(window.layout, model, window.combine([1.0, 0.0])):
        assert torch.equal(model.first.weight, before["first.weight"])
        assert model.tied.weight is model.first.weight
        assert torch.equal(model.norm.running_mean, before["norm.running_mean"])
        # Integer buffers are the newest, frozen weights the live ones.
        assert model.norm.num_batches_tracked == live["norm.num_batches_tracked"]
        assert torch.equal(model.frozen.weight, live["frozen.weight"])
        raise KeyboardInterrupt
    assert all(torch.equal(value, live[name]) for name, value in model.state_dict().items())
    assert pointers == {name: value.data_ptr() for name, value in model.named_parameters()}


@pytest.mark.parametrize("change", ["name", "shape"])
def test_a_model_that_changed_is_a_clear_error(change):
    model = nn.Sequential(nn.Linear(3, 3))
    window = CheckpointWindow(model, 2)
    window.push(model, 1)
    if change == "name":
        model.append(nn.Linear(3, 3))
    else:
        model[0] = nn.Linear(3, 4)
    with pytest.raises(ValueError, match="parameters changed") as error:
        window.push(model, 2)
    assert ("1.weight is new" if change == "name" else "0.weight was (3, 3), is (4, 3)") in str(error.value)


def test_misuse_is_named():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="size=1"):
        CheckpointWindow(model, 1)
    with pytest.raises(ValueError, match="dtype='int4'"):
        CheckpointWindow(model, 2, dtype="int4")
    with pytest.raises(ValueError, match="no parameter that requires gradients"):
        CheckpointWindow(nn.Linear(2, 2).requires_grad_(False), 2)
    window = CheckpointWindow(model, 2)
    window.push(model, 5)
    with pytest.raises(ValueError, match="step=5 is not after"):
        window.push(model, 5)
    with pytest.raises(ValueError, match="weights has shape"):
        window.combine([0.5, 0.5])
    with pytest.raises(ValueError, match="not all finite"):
        window.combine([np.nan])
    with pytest.raises(ValueError, match="vector has shape"):
        window.project(torch.zeros(3))


def test_memory_is_the_rows_and_one_staging_row():
    model = tiny_llama()
    parameters = sum(p.numel() for p in model.parameters())
    assert CheckpointWindow(model, 8).nbytes == 9 * 4 * parameters
    assert CheckpointWindow(model.to(torch.bfloat16), 8).nbytes == (8 * 2 + 4) * parameters


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"dtype": "int8"}, {"mean_rows": True}])
def test_a_bad_row_cannot_spoil_a_merge_without_it(options):
    model = nn.Linear(2, 2)
    window = CheckpointWindow(model, 3, **options)
    torch.nn.init.constant_(model.weight, 0.5)
    good = model.weight.detach().clone()
    for step, value in enumerate((0.5, 0.5, 0.5, float("nan"), 0.5)):
        torch.nn.init.constant_(model.weight, value)
        window.push(model, step)
    for weights in ([1.0, 0.0, 0.0], [0.0, 0.0, 1.0]):
        assert torch.equal(window.combine(weights)[:4].view(2, 2), good)


def test_mean_rows_are_the_means_of_what_was_sampled():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    window = CheckpointWindow(model, 2, mean_rows=True)
    assert window.nbytes == (2 + 1 + 1 + 1) * 15 * 4
    expected = []
    for row in range(3):
        sampled = []
        for sample in range(4):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.randn_like(parameter))
            sampled.append(torch.cat([p.detach().flatten() for p in model.parameters()]).clone())
            if sample < 3:
                window.sample(model, 10 * row + 2 * sample + 1)
        window.push(model, 10 * row + 10)
        expected.append(torch.stack(sampled).mean(dim=0))
    assert window.steps == (20, 30, 30)
    assert window.spans == ((11, 20, 4), (21, 30, 4), (30, 30, 1))
    torch.testing.assert_close(window.combine([1.0, 0.0, 0.0]).clone(), expected[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(window.combine([0.0, 1.0, 0.0]).clone(), expected[2], atol=1e-6, rtol=0)
    assert torch.equal(window.combine([0.0, 0.0, 1.0]), sampled[-1])
    # A row that was begun goes with the state, and is finished elsewhere.
    window.sample(model, 33)
    begun = torch.cat([p.detach().flatten() for p in model.parameters()]).clone()
    other = CheckpointWindow(model, 2, mean_rows=True)
    other.load_state_dict(window.state_dict())
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    other.push(model, 40)
    torch.testing.assert_close(other.combine([0.0, 1.0, 0.0]), begun / 2)
    with pytest.raises(ValueError, match="rows are means and this one's are not"):
        CheckpointWindow(model, 2).load_state_dict(window.state_dict())
    with pytest.raises(ValueError, match="construct it with mean_rows=True"):
        CheckpointWindow(model, 2).sample(model, 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2), ("int8", 2e-2)])
def test_multiscale_rows_are_the_means_of_their_spans_and_reach_far_back(dtype, tolerance):
    torch.manual_seed(0)
    model = nn.Linear(40, 30)
    window = CheckpointWindow(model, 4, mean_rows=True, multiscale=True, dtype=dtype)
    checkpoints = []
    for step in range(1, 121):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        checkpoints.append(torch.cat([p.detach().flatten() for p in model.parameters()]).clone())
        if step % 5:
            window.sample(model, step)
        else:
            window.push(model, step)
        if step == 60:  # resumed in the middle of a span
            window.sample(model, step)
            state = window.state_dict()
            window = CheckpointWindow(model, 4, mean_rows=True, multiscale=True, dtype=dtype)
            window.load_state_dict(state)
            window.forget_samples()
    for row, span in enumerate(window.spans):
        mean = torch.stack(checkpoints[span.first - 1 : span.last]).mean(dim=0)
        torch.testing.assert_close(window.combine(np.eye(5)[row]), mean, atol=tolerance, rtol=0)
    assert window.spans[0].first <= 0.5 * 120
    lengths = [span.samples for span in window.spans]
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) >= 4
    with pytest.raises(ValueError, match="need mean_rows=True"):
        CheckpointWindow(model, 4, multiscale=True)
    # Live stays what it was at the last push, however many samples there are since.
    live = window.combine(None).clone()
    window.sample(model, 121)
    assert torch.equal(window.combine(None), live)
