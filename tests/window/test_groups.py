"""Parameter groups: who belongs where, products by group, and the step from one weight vector to one per group."""

import numpy as np
import pytest
import torch
from conftest import evaluation, select, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from traj_merge_callback import CheckpointWindow, Problem
from traj_merge_callback.engine.choose import Selection
from traj_merge_callback.search.evaluation import Gradient
from traj_merge_callback.search.grouped import GroupedSearch
from traj_merge_callback.search.objective import Objective
from traj_merge_callback.window.layout import ParameterLayout, parameter_groups


def grouped_names(model, groups="blocks"):
    layout = ParameterLayout(model)
    found = parameter_groups(layout, groups)
    return {slot.name: found.names[member] for slot, member in zip(layout.slots, found.members)}


def test_blocks_are_what_they_are_in_llama_and_gpt2():
    llama = grouped_names(tiny_llama(tie_word_embeddings=False))
    assert llama["model.embed_tokens.weight"] == "embeddings"
    assert llama["model.layers.1.self_attn.q_proj.weight"] == "block 1 attention"
    assert llama["model.layers.0.mlp.down_proj.weight"] == "block 0 mlp"
    assert {llama["model.layers.0.input_layernorm.weight"], llama["model.norm.weight"]} == {"norms"}
    assert llama["lm_head.weight"] == "head"
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=2, n_head=2, n_positions=8))
    found = grouped_names(gpt2)
    assert {found["transformer.wte.weight"], found["transformer.wpe.weight"]} == {"embeddings"}
    assert found["transformer.h.0.attn.c_proj.weight"] == "block 0 attention"
    assert found["transformer.h.1.mlp.c_proj.bias"] == "block 1 mlp"
    assert {found["transformer.h.1.ln_2.weight"], found["transformer.ln_f.bias"]} == {"norms"}


def test_patterns_of_ones_own_take_what_they_match_first_and_the_rest_is_other():
    found = grouped_names(tiny_llama(), {"first": ["model.layers.0.*"], "projections": ["*_proj.weight"]})
    assert found["model.layers.0.mlp.up_proj.weight"] == "first"
    assert found["model.layers.1.mlp.up_proj.weight"] == "projections"
    assert found["model.norm.weight"] == "other"
    with pytest.raises(ValueError, match=r"groups=\['none'\] match no merged tensor; their names are like model.embed"):
        grouped_names(tiny_llama(), {"none": ["encoder.*"]})


def filled(seed, rows=4):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2, bias=False), nn.Linear(2, 2))
    window = CheckpointWindow(model, rows, groups={"ends": ["0.*", "2.*"], "middle": ["1.*"]})
    matrix = []
    for step in range(rows):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter))
        window.push(model, step)
        matrix.append(torch.cat([p.detach().flatten() for p in model.parameters()]).double().numpy())
    members = np.concatenate([np.zeros(20), np.ones(10), np.zeros(6)]).astype(int)
    return window, np.array(matrix), members


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_products_by_group_are_those_of_the_groups_columns(seed):
    window, matrix, members = filled(seed)
    rng = np.random.default_rng(seed)
    weights, vector = rng.normal(size=(2, 4)), rng.normal(size=matrix.shape[1]).astype(np.float32)
    expected = (weights[members] * matrix.T).sum(axis=1)
    np.testing.assert_allclose(window.combine(weights).numpy(), expected, atol=1e-5)
    by_group = np.array([matrix[:, members == g] @ vector[members == g] for g in range(2)])
    np.testing.assert_allclose(window.project(torch.from_numpy(vector), grouped=True), by_group, atol=1e-5)
    np.testing.assert_allclose(by_group.sum(axis=0), window.project(torch.from_numpy(vector)), atol=1e-5)
    deltas = matrix - matrix[-1]
    grams = np.array([deltas[:, members == g] @ deltas[:, members == g].T for g in range(2)])
    np.testing.assert_allclose(window.gram(grouped=True), grams, atol=1e-4)
    np.testing.assert_allclose(window.gram(), grams.sum(axis=0), atol=1e-4)
    same = np.tile(rng.normal(size=4), (2, 1))
    assert torch.equal(window.combine(same).clone(), window.combine(same[0]))
    with pytest.raises(ValueError, match=r"weights has shape \(3, 4\)"):
        window.combine(np.ones((3, 4)))


def test_project_is_the_gradient_through_the_merge_weights():
    # Against autograd: the merged model as a function of the weights, one vector per group.
    window, matrix, members = filled(0)
    rows = torch.from_numpy(matrix).float()
    weights = torch.full((2, 4), 0.25, requires_grad=True)
    inputs = torch.randn(7, 3)

    def loss_of(row):
        first, bias, second, third, last = torch.split(row, [15, 5, 10, 4, 2])
        hidden = torch.tanh(inputs @ first.view(5, 3).T + bias)
        return ((hidden @ second.view(2, 5).T) @ third.view(2, 2).T + last).square().mean()

    merged = (weights[torch.from_numpy(members)] * rows.T).sum(dim=1)
    loss_of(merged).backward()
    point = window.combine(np.full((2, 4), 0.25)).clone().requires_grad_(True)
    loss_of(point).backward()
    np.testing.assert_allclose(window.project(point.grad, grouped=True), weights.grad.numpy(), atol=1e-5)
    np.testing.assert_allclose(window.project(point.grad), weights.grad.sum(dim=0).numpy(), atol=1e-5)


class TwoGroups:
    """A quadratic loss whose best weights differ between two groups, seen through noisy parts."""

    def __init__(self, seed, difference, noise=0.9e-3, k=5, size=40, tokens=4000.0):
        self.rng = np.random.default_rng(seed)
        self.rows = np.cumsum(self.rng.normal(size=(2, k, size)), axis=1)
        best = np.full(k, 1 / k)
        towards = np.zeros(k)
        towards[0], towards[-1] = -difference, difference
        self.best = np.array([best + towards, best - towards])
        self.tokens = tokens
        # Gradients of parts differ as those of a likelihood do: their covariance is the Hessian over the tokens.
        self.tilts = noise * self.rng.normal(size=(4, 2, size))
        deltas = self.rows - self.rows[:, -1:]
        self.gram = np.einsum("gks,gls->gkl", deltas, deltas)

    def true(self, weights):
        away = np.einsum("gk,gks->gs", weights - self.best, self.rows)
        return 1.0 + 0.5 * self.scale * float(np.square(away).sum())

    scale = 4e-4

    def select(self, evaluations=GroupedSearch.cost):
        start = np.full(5, 0.2)
        tiled = np.tile(start, (2, 1))
        seen = []

        def measure(weights, with_gradient, parts, abandon):
            seen.append(weights)
            away = np.einsum("gk,gks->gs", weights - self.best, self.rows)
            moved = np.einsum("gk,gks->gs", weights - tiled, self.rows)
            losses = np.array([self.true(weights) + float((tilt * moved).sum()) for tilt in self.tilts])
            slopes = np.array([np.einsum("gks,gs->gk", self.rows, self.scale * away + tilt) for tilt in self.tilts])
            share = np.full(4, self.tokens / 4)
            gradient = Gradient(slopes * share[:, None, None], share, ("",) * 4)
            return evaluation(*losses), gradient if with_gradient else None

        live = evaluation(*[self.true(tiled) + 1.0] * 4)
        objective = Objective.of(live, [""])
        objective = Objective(objective.components, objective.weights, objective.live, np.array([self.tokens]))
        problem = Problem((1, 2, 3, 4, 5), evaluations, objective, gram=self.gram, batches=4, parts=4)
        found = select(GroupedSearch(problem, start), problem, measure, Selection(start, self.true(tiled), live), {})
        return found, seen, self.true(tiled)


def test_groups_that_differ_get_weights_of_their_own():
    gains = []
    for seed in range(10):
        landscape = TwoGroups(seed, difference=0.3)
        chosen, _, before = landscape.select()
        assert chosen.forward_equivalents - 1 <= GroupedSearch.cost
        assert chosen.weights.shape == (2, 5)
        np.testing.assert_allclose(chosen.weights.sum(axis=1), 1.0)
        gains.append((before - landscape.true(chosen.weights)) / (before - 1.0))
    assert np.median(gains) > 0.5


def test_more_steps_gain_more_until_only_noise_is_left():
    one, many, most = [], [], 0
    for seed in range(10):
        landscape = TwoGroups(seed, difference=0.3)
        one.append(landscape.true(landscape.select()[0].weights))
        landscape = TwoGroups(seed, difference=0.3)
        chosen, _, _ = landscape.select(evaluations=100)
        many.append(landscape.true(chosen.weights))
        most = max(most, chosen.forward_equivalents)
    assert np.mean(many) < np.mean(one)
    assert most < 60


def test_noise_alone_moves_the_groups_little():
    # Where the best weights are those of the whole model, a gradient is all noise, and the step is shrunk away.
    harm = []
    for seed in range(20):
        landscape = TwoGroups(seed, difference=0.0)
        chosen, _, before = landscape.select(evaluations=100)
        unshrunk = 0.5 * np.square(landscape.tilts.mean(axis=0)).sum() / landscape.scale
        harm.append(
            (landscape.true(chosen.weights if chosen.weights.ndim == 2 else np.tile(chosen.weights, (2, 1))) - before)
            / unshrunk
        )
    assert np.mean(harm) < 0.15
