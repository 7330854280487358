"""Captures made while training goes on hold the weights of exactly one step."""

import threading
import time

import pytest
import torch
from conftest import same_weights, tiny_llama, train_steps
from torch import nn

from traj_merge_callback import CheckpointWindow


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def held_up(window):
    """Keep the window's worker from copying until the event returned is set."""
    event = threading.Event()
    window._capture._worker.submit(event.wait, 20)
    return event


@pytest.fixture
def window():
    torch.manual_seed(0)
    model = nn.Linear(40, 30)
    window = CheckpointWindow(model, 2, asynchronous=True)
    window.model = model
    yield window
    window.close()


def backward(model):
    model(torch.randn(5, 40)).square().sum().backward()


@pytest.mark.parametrize("foreach", [False, True])
def test_the_optimizer_does_not_write_what_is_still_being_read(window, foreach):
    model, optimizer = window.model, torch.optim.AdamW(window.model.parameters(), lr=0.1, foreach=foreach)
    event = held_up(window)
    expected = flat(model)
    window.push(model, 1)
    backward(model)
    threading.Timer(0.3, event.set).start()
    optimizer.step()
    # Had the step not waited, the row would hold what it wrote, or some of it.
    assert event.is_set()
    assert not torch.equal(flat(model), expected)
    assert torch.equal(window.combine([1.0]), expected)
    assert window.waited_s > 0


def test_every_row_of_a_real_run_is_of_its_step(train):
    model = tiny_llama()
    window = CheckpointWindow(model, 8, asynchronous=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    expected = {}

    def each(step):
        window.push(model, step)
        expected[step] = flat(model)

    train_steps(model, train, 12, each, optimizer=optimizer)
    for index, step in enumerate(window.steps):
        weights = torch.eye(8)[index].numpy()
        assert torch.equal(window.combine(weights), expected[step])
    window.close()
    plain = tiny_llama()
    train_steps(plain, train, 12, optimizer=torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True))
    assert same_weights(plain, model)


def test_an_optimizer_with_a_closure_waits_after_it(window):
    model, optimizer = window.model, torch.optim.SGD(window.model.parameters(), lr=0.1)
    event = held_up(window)
    expected = flat(model)
    window.push(model, 1)

    def closure():
        optimizer.zero_grad()
        backward(model)
        event.set()  # waiting before the closure would have taken 20 seconds
        return torch.zeros(())

    started = time.perf_counter()
    optimizer.step(closure)
    assert time.perf_counter() - started < 10
    assert torch.equal(window.combine([1.0]), expected)


def test_other_optimizers_may_write_before_their_closure(window):
    class Ascending(torch.optim.Optimizer):
        def step(self, closure):
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    parameter.add_(1.0)
            return closure()

    event = held_up(window)
    expected = flat(window.model)
    window.push(window.model, 1)
    threading.Timer(0.2, event.set).start()
    Ascending(window.model.parameters(), {}).step(lambda: None)
    assert torch.equal(window.combine([1.0]), expected)


def test_what_a_forward_pass_writes_is_copied_at_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(50, 8, max_norm=0.5)  # renormalized as it is read
            self.norm = nn.BatchNorm1d(8)
            self.head = nn.Linear(8, 1)

        def forward(self, tokens):
            return self.head(self.norm(self.embedding(tokens)))

    torch.manual_seed(0)
    model = Net()
    window = CheckpointWindow(model, 2, asynchronous=True)
    event = held_up(window)
    expected = torch.cat([tensor.detach().flatten().clone() for tensor in window.layout.tensors(model)])
    window.push(model, 1)
    model(torch.arange(50))
    event.set()
    assert not torch.equal(model.embedding.weight.flatten(), expected[:400])
    assert torch.equal(window.combine([1.0]), expected)
    window.close()


def test_neighbouring_buffers_are_copied_as_one(monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Embedding(5, 8, max_norm=0.5)
            self.linear = nn.Linear(8, 8)
            self.last = nn.Embedding(3, 8, max_norm=0.5)
            for index in range(100):
                dtype = torch.float64 if index == 50 else torch.float32
                self.register_buffer(f"running_{index}", torch.randn(index % 7, 2, dtype=dtype))

    torch.manual_seed(0)
    model = Net()
    window = CheckpointWindow(model, 2)
    copies, begin = [], window._capture.begin
    monkeypatch.setattr(window._capture, "begin", lambda pairs, *rest: (copies.extend(pairs), begin(pairs, *rest)))
    tensors = window.layout.tensors(model)
    window.push(model, 1)
    assert torch.equal(window.combine([1.0]), torch.cat([tensor.detach().flatten().float() for tensor in tensors]))
    # The first embedding, the bias (no copy), the last embedding with half of the buffers, the odd one, the other half.
    assert [len(source) for _, source in copies if source.dim() == 1] == [40, 8, 24 + 294, 2, 294]


def test_a_capture_that_fails_is_no_business_of_the_optimizer(window):
    window.push(window.model, 1)
    window.settle()

    def broken(*args, **kwargs):
        raise OSError("disk full")

    window._ring.rows.row = lambda index: torch.zeros(3)  # copies into a row of the wrong length fail
    with pytest.raises(RuntimeError):
        window.push(window.model, 2)
    window._capture.begin([], broken)
    torch.optim.SGD(window.model.parameters(), lr=0.1).step()
    with pytest.raises(OSError, match="disk full"):
        window.settle()


@pytest.mark.parametrize("pushes", [1, 4])
def test_a_row_that_could_not_be_captured_is_not_in_the_window(monkeypatch, pushes):
    model = nn.Linear(3, 2)
    window = CheckpointWindow(model, 3, dtype="int8", asynchronous=True)

    def push(step):
        model.weight.data.fill_(step)  # by hand, which no hook waits before
        window.push(model, step)
        window.settle()

    for step in range(1, pushes + 1):
        push(step)
    before = window.steps
    monkeypatch.setattr(window._ring.rows, "write", lambda *args, **options: 1 / 0)
    window.push(model, 9)
    with pytest.raises(ZeroDivisionError):
        window.settle()
    monkeypatch.undo()
    # The oldest row of a full window made room for it.
    assert window.steps == before[-2:]
    push(10)
    push(11)
    assert window.steps == (*before[-1:], 10, 11)
    for index, step in enumerate(window.steps):
        assert torch.allclose(window.combine(torch.eye(3)[index].numpy())[:6], torch.full((6,), float(step)))
    window.close()


def test_a_window_that_is_gone_watches_no_optimizer():
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    before = len(_global_optimizer_pre_hooks)
    window = CheckpointWindow(nn.Linear(2, 2), 2, asynchronous=True)
    assert len(_global_optimizer_pre_hooks) == before + 1
    window.close()
    assert len(_global_optimizer_pre_hooks) == before


def test_a_row_that_code_without_an_optimizer_wrote_into_is_dropped(window):
    window.push(window.model, 1)
    window.settle()
    event = held_up(window)
    window.push(window.model, 2)
    with torch.no_grad():
        window.model.weight.add_(1.0)
    event.set()
    with pytest.raises(RuntimeError, match=r"Call settle\(\) before"):
        window.settle()
    assert window.steps == (1,)
