"""An evaluation leaves no trace: bit for bit, also when it is interrupted."""

import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from torch import nn
from torch.utils.data import DataLoader

from traj_merge_callback import CheckpointWindow, HeldOutLoss
from traj_merge_callback.evaluate.untouched.isolation import isolated
from traj_merge_callback.evaluate.weights import installed


class Untidy(nn.Module):
    """Everything a forward can leave behind: buffers, caches, counters, lists, and a metric that accumulates."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(1))
        self.total = torch.zeros(1)
        self.outputs: list[float] = []
        self.cache: dict[str, torch.Tensor] = {}
        self.calls = 0

    def forward(self, x):
        self.seen += 1
        self.total += x.sum()
        self.outputs.append(float(x.sum()))
        self.cache["last"] = x
        self.calls += 1
        random.random(), np.random.random(), torch.rand(1)
        return self.norm(self.drop(self.linear(x)))


def everything(model):
    """All that could carry a trace, as comparable values."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "grad_ids": {name: id(p.grad) for name, p in model.named_parameters()},
        "buffer_ids": {name: id(b) for name, b in model.named_buffers()},
        "modes": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state(),
        "plain": repr({k: v for k, v in vars(model).items() if k in ("outputs", "cache", "calls", "total")}),
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, after[key]), key
        elif isinstance(value, dict):
            assert_same(value, after[key])
        else:
            assert value == after[key], key


def untidy():
    torch.manual_seed(0)
    model = Untidy().train()
    model.drop.eval()  # a mixture of modes, as with a frozen part
    model.linear(torch.randn(2, 4)).sum().backward()
    return model


@pytest.mark.parametrize("failure", [None, ValueError, KeyboardInterrupt])
def test_no_trace_is_left_however_it_ends(failure):
    model = untidy()
    batches = list(torch.randn(8, 2, 4))
    before = everything(model)
    calls = []

    def nll(model, x):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        calls.append(model(x).sum())
        if failure and len(calls) == 3:
            raise failure
        with torch.enable_grad():  # even an evaluation that takes gradients
            model.linear(x).sum().backward()
        return calls[-1], 1

    loss = HeldOutLoss(batches, nll=nll)
    if failure:
        with pytest.raises(failure):
            loss.evaluate(model, "search")
    else:
        loss.evaluate(model, "search")
    assert calls
    assert_same(before, everything(model))


def test_randomness_inside_is_common_to_all_candidates():
    model = nn.Linear(4, 1)
    loss = HeldOutLoss(list(torch.randn(8, 2, 4)), nll=lambda model, x: (torch.rand(1)[0] + random.random(), 1))
    assert loss.evaluate(model, "search").nll.tolist() == loss.evaluate(model, "search").nll.tolist()


@pytest.fixture
def ctrl_c():
    """Python's own handler: a process started in the background is told to ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_a_ctrl_c_at_any_moment_leaves_live_weights_bit_exact(heldout):
    """A real SIGINT, many times, at random moments of installing, evaluating and restoring."""
    model = tiny_llama()
    window = CheckpointWindow(model, 2)
    window.push(model, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    window.push(model, 2)
    loss = HeldOutLoss(DataLoader(heldout, batch_size=4), batches=4)
    before = everything(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    rng = np.random.default_rng(0)
    interrupted = 0
    for _ in range(40):
        timer = threading.Timer(rng.uniform(0, 0.05), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            for _ in range(100):
                with installed(window.layout, model, window.combine([0.5, 0.5])):
                    loss.evaluate(model, "search")
        except KeyboardInterrupt:
            interrupted += 1
        timer.join()
        assert_same(before, everything(model))
        assert pointers == [p.data_ptr() for p in model.parameters()]
    assert interrupted == 40


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_waits_for_the_batch_and_the_second_one_does_not(presses):
    model = nn.Linear(4, 1)
    seen = []

    def nll(model, x):
        for press in range(presses):
            os.kill(os.getpid(), signal.SIGINT)
            seen.append(f"pressed {press + 1}")
        seen.append("end of the batch")
        return model(x).sum(), 1

    with pytest.raises(KeyboardInterrupt):
        HeldOutLoss(list(torch.randn(8, 2, 4)), nll=nll).evaluate(model, "search")
    assert seen == (["pressed 1", "end of the batch"] if presses == 1 else ["pressed 1"])
    assert model.training
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    HeldOutLoss(list(torch.randn(8, 2, 4)), nll=lambda model, x: (0.0, 1)).evaluate(model, "search")  # nothing is left


@pytest.mark.parametrize("compile_all", [True, False])
def test_a_compiled_model_is_evaluated_without_recompiling(heldout, compile_all):
    torch._dynamo.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = tiny_llama(dropout=0.0)
    if compile_all:
        model = torch.compile(model, backend=backend)
    else:
        model.model.layers[0] = torch.compile(model.model.layers[0], backend=backend)
    batch = {"input_ids": heldout.blocks[:4], "labels": heldout.blocks[:4]}
    model(**batch).loss.backward()
    graphs = len(compiled)
    assert graphs > 0
    window = CheckpointWindow(model, 2)
    window.push(model, 1)
    assert not [slot.name for slot in window.layout.slots if "_orig_mod" in slot.name]
    plain = tiny_llama(dropout=0.0)
    loss = HeldOutLoss(DataLoader(heldout, batch_size=4), batches=4)
    with installed(window.layout, model, window.combine([1.0])):
        assert loss.evaluate(model, "search").loss == pytest.approx(loss.evaluate(plain, "search").loss, abs=1e-6)
    model(**batch).loss.backward()
    assert len(compiled) == graphs


def test_autocast_does_not_serve_weights_of_another_candidate(heldout):
    model = tiny_llama()
    window = CheckpointWindow(model, 2)
    window.push(model, 1)
    loss = HeldOutLoss(DataLoader(heldout, batch_size=4), precision=lambda: torch.autocast("cpu", torch.bfloat16))
    old = loss.evaluate(model, "search").loss
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    window.push(model, 2)
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():  # an outer context, whose cache would be stale
        new = loss.evaluate(model, "search").loss
        with installed(window.layout, model, window.combine([1.0, 0.0])):
            assert loss.evaluate(model, "search").loss == old
        assert loss.evaluate(model, "search").loss == new != old


def test_train_and_eval_are_not_called():
    class Stubborn(nn.Linear):
        def train(self, mode=True):
            raise RuntimeError("no modes")

    model = nn.Sequential(Stubborn(2, 2), nn.Dropout())
    with isolated(model):
        assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())
