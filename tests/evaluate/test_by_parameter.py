"""Merges that weigh each parameter by itself, against their papers' formulas computed here in another way."""

import gc
import weakref

import numpy as np
import pytest
import torch
from conftest import AT_ONCE, tiny_llama, train_steps
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import realtext
from traj_merge_callback import CheckpointWindow, HeldOutLoss, TrajectoryMerger
from traj_merge_callback.evaluate.by_parameter.fisher import FisherInformation
from traj_merge_callback.evaluate.by_parameter.regmean import RegressionMean
from traj_merge_callback.evaluate.candidate import Candidates, weights_in
from traj_merge_callback.evaluate.parking import Parking
from traj_merge_callback.window.memory import NoRoom
from traj_merge_callback.window.pieces import finish

ROWS = 3


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=realtext.VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=64))


def fisher(window, model, parking):
    return FisherInformation(window, ROWS, parking)


class Case:
    """A window of three checkpoints of a run, and merges of it by what is learnt of them."""

    def __init__(self, model, train, loader, make):
        self.model, self.window, self.states = model, CheckpointWindow(model, ROWS), []

        def capture(step):
            self.window.push(model, step)
            self.states.append({name: value.detach().clone() for name, value in model.state_dict().items()})

        train_steps(model, train, ROWS, capture, lr=3e-2)
        self.heldout = HeldOutLoss(loader, batches=2)
        self.parking = Parking(torch.device("cpu"), self.window.processes)
        weights = weights_in(model, self.window, 0, self.parking)
        self.candidates = Candidates(weights, self.window, self.heldout, make(self.window, model, self.parking))
        finish(self.candidates.prepare())
        self.cost = finish(self.candidates.learn())

    def merged(self, weights):
        finish(self.candidates.load(np.array(weights)))
        return {name: view.clone() for name, view in self.window.layout.views(self.candidates.weights.row).items()}

    @property
    def batches(self):
        """What is learnt from: one part of the search split."""
        return [self.heldout._batches["search"][index].data for index in self.heldout._parts[0]]


@pytest.mark.parametrize("make", [lambda: tiny_llama(dropout=0.0), tiny_gpt2], ids=["llama", "gpt2"])
def test_fisher_weighs_each_parameter_by_the_squares_of_its_gradients(make, train, loader):
    case = Case(make(), train, loader, fisher)
    model, live = case.model, {name: value.clone() for name, value in case.model.state_dict().items()}
    information = []
    for state in case.states:
        model.load_state_dict(state)
        model.eval()
        squares = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
        for batch in case.batches:
            model.zero_grad()
            tokens = batch["labels"][:, 1:].numel()
            (model(**batch).loss * tokens).backward()
            for name, value in model.named_parameters():
                squares[name] += value.grad.square()
        information.append(squares)
    model.load_state_dict(live)
    for coefficients in ([1 / 3, 1 / 3, 1 / 3], [0.0, 0.2, 0.8], [0.6, 0.3, 0.1], [0.0, 0.2, 0.8]):
        merged, looked_at = case.merged(coefficients), 0
        for name in information[0]:
            shares = torch.stack([c * f[name] for c, f in zip(coefficients, information, strict=True)])
            known = shares.sum(dim=0) > 1e-6  # elsewhere nearly nothing is known
            rows = torch.stack([state[name] for state in case.states])
            expected = (shares * rows).sum(dim=0) / shares.sum(dim=0)
            torch.testing.assert_close(merged[name][known], expected[known], atol=2e-4, rtol=1e-2)
            looked_at += int(known.sum())
        assert looked_at > 1000
    assert case.cost == pytest.approx(3 * ROWS / case.heldout.parts)


def test_embeddings_of_tokens_that_the_heldout_text_has_not_are_the_weighted_mean(train, loader):
    model = tiny_llama(dropout=0.0, tie_word_embeddings=False)
    case = Case(model, train, loader, fisher)
    there = torch.cat([batch["input_ids"].flatten() for batch in case.batches]).unique()
    absent = [token for token in range(realtext.VOCABULARY) if token not in there]
    name, coefficients = "model.embed_tokens.weight", (0.5, 0.25, 0.25)
    merged = case.merged(coefficients)
    mean = sum(c * state[name] for c, state in zip(coefficients, case.states, strict=True))
    assert len(absent) > 100
    torch.testing.assert_close(merged[name][absent], mean[absent])
    assert not torch.allclose(merged[name][there], mean[there])


@pytest.mark.parametrize("make", [lambda: tiny_llama(dropout=0.0), tiny_gpt2], ids=["llama", "gpt2"])
def test_regmean_is_the_least_squares_of_each_layer_on_the_rows_inputs(make, train, loader):
    case = Case(make(), train, loader, RegressionMean)
    model, live = case.model, {name: value.clone() for name, value in case.model.state_dict().items()}
    layers = {
        name: one
        for name, one in model.named_modules()
        if (isinstance(one, nn.Linear) and name != "lm_head") or type(one).__name__ == "Conv1D"
    }
    assert len(layers) >= 4
    merged = case.merged([1 / 3, 1 / 3, 1 / 3])
    grams = {name: [] for name in layers}
    for state in case.states:
        model.load_state_dict(state)
        model.eval()
        inputs = {name: [] for name in layers}
        hooks = [
            one.register_forward_pre_hook(lambda _, given, seen=inputs[name]: seen.append(given[0].flatten(0, -2)))
            for name, one in layers.items()
        ]
        with torch.no_grad():
            for batch in case.batches:
                model(**batch)
        for hook in hooks:
            hook.remove()
        for name, seen in inputs.items():
            x = torch.cat(seen).double()
            gram = x.T @ x
            grams[name].append(0.9 * gram + 0.1 * torch.diag(gram.diagonal()))
    model.load_state_dict(live)
    for name, one in layers.items():
        key, total = f"{name}.weight", sum(grams[name])
        rows = [
            state[key].double() if not isinstance(one, nn.Linear) else state[key].double().T for state in case.states
        ]
        expected = torch.linalg.solve(total, sum(g @ w for g, w in zip(grams[name], rows, strict=True)))
        found = merged[key].double() if not isinstance(one, nn.Linear) else merged[key].double().T
        assert (found - expected).norm() < 1e-3 * expected.norm()
        mean = sum(rows) / ROWS
        assert (found - mean).norm() > 10 * (found - expected).norm()  # it is not merely the mean
    norm = next(name for name in merged if "norm" in name or "ln_" in name)
    torch.testing.assert_close(merged[norm], sum(state[norm] for state in case.states) / ROWS)
    assert case.cost == pytest.approx(ROWS / case.heldout.parts)


@pytest.mark.parametrize("make", [fisher, RegressionMean])
def test_a_row_alone_is_that_row_and_live_is_untouched(make, train, loader):
    case = Case(tiny_llama(), train, loader, make)
    assert all(torch.equal(value, case.states[-1][name]) for name, value in case.model.state_dict().items())
    assert not any(value.grad is not None for value in case.model.parameters())
    merged = case.merged([0.0, 1.0, 0.0])
    assert all(torch.equal(merged[name], case.states[1][name]) for name in merged)


def test_what_cannot_be_is_said(train, loader):
    case = Case(tiny_llama(), train, loader, fisher)
    with pytest.raises(ValueError, match="at least 0"):
        case.merged([-0.5, 0.5, 1.0])
    with pytest.raises(NoRoom, match=r"the Fisher information of 1000000000 rows takes .* GB of memory"):
        FisherInformation(case.window, 10**9, None)
    case = Case(tiny_llama(), train, loader, RegressionMean)
    with pytest.raises(ValueError, match="equal weights"):
        case.merged([0.5, 0.25, 0.25])
    with pytest.raises(ValueError, match="merges linear layers, and the model has none"):
        RegressionMean(CheckpointWindow(nn.LayerNorm(3), 2), nn.LayerNorm(3), None)


@pytest.mark.parametrize("search", ["fisher", "regmean"])
def test_a_merge_holds_nothing_on_the_device_when_it_is_done(train, loader, tmp_path, search):
    held = []

    class Watched(Parking):
        def hold(self, tensor):
            held.append(weakref.ref(tensor))
            return super().hold(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("traj_merge_callback.engine.merge.Parking", Watched)
        model, options = tiny_llama(), {"capture_every": 1, "merge_every": 3, "window_size": 3, "on_error": "raise"}
        with TrajectoryMerger(loader, output_dir=tmp_path, search=search, **options, **AT_ONCE) as merger:
            train_steps(model, train, 3, lambda step: merger.step(model, step))
            assert len(merger.records) == 1
            gc.collect()
            # The window's own row for a merge stays.
            assert len({one().data_ptr() for one in held if one() is not None}) <= 1


@pytest.mark.parametrize("make", [fisher, RegressionMean])
def test_the_training_loops_autocast_rounds_nothing(make, train, loader):
    exact = Case(tiny_llama(dropout=0.0), train, loader, make).merged([1 / 3, 1 / 3, 1 / 3])
    case = Case(tiny_llama(dropout=0.0), train, loader, make)
    model = case.candidates.weights.model
    case.heldout = HeldOutLoss(loader, batches=2, precision=lambda: torch.autocast("cpu", enabled=False))
    case.candidates = Candidates(
        case.candidates.weights, case.window, case.heldout, make(case.window, model, case.parking)
    )
    with torch.autocast("cpu", torch.bfloat16):
        finish(case.candidates.learn())
        merged = case.merged([1 / 3, 1 / 3, 1 / 3])
    assert all(torch.equal(merged[name], exact[name]) for name in exact)
