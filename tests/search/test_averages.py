"""Recipes that average over steps: equal to the running averages of their sources, and right for rows of any span."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from traj_merge_callback import Problem
from traj_merge_callback.search import recipes, resolve_search
from traj_merge_callback.search.objective import Objective
from traj_merge_callback.search.spans import Span

RECIPES = {
    "tail-ema": recipes.tail_ema,
    "half-life": recipes.half_life,
    "mean-of-steps": recipes.mean_of_steps,
    "posthoc-ema": recipes.posthoc_ema,
}
lengths = st.lists(st.integers(2, 60), min_size=2, max_size=8)


def every_step(steps):
    """Rows that are the checkpoints of every step from the first on."""
    return [Span(step, step, 1) for step in range(1, steps + 1)]


def spans_of(lengths, first=1):
    ends = np.cumsum([first - 1, *lengths])
    return [Span(int(a) + 1, int(b), int(b - a)) for a, b in itertools.pairwise(ends)]


def with_live(spans):
    return [*spans, Span(spans[-1].last, spans[-1].last, 1)]


def recursion(rates):
    """Weights of ``average_t = (1 - rate_t) average_{t-1} + rate_t theta_t``, without what is left of its start."""
    weights = np.zeros(len(rates))
    for index, rate in enumerate(rates):
        weights *= 1.0 - rate
        weights[index] += rate
    return weights / weights.sum()


@settings(deadline=None)
@given(steps=st.integers(2, 300), fraction=st.floats(0.01, 0.9))
def test_half_life_is_torchtitans_running_average(steps, fraction):
    brute = recursion([1.0 - 2.0 ** (-1.0 / (fraction * step)) for step in range(1, steps + 1)])
    np.testing.assert_allclose(recipes.half_life(every_step(steps), fraction=fraction), brute, atol=1e-9)
    assert recipes.half_life_rate(steps, fraction=fraction) == 1.0 - 2.0 ** (-1.0 / (fraction * steps))


def test_half_of_the_weight_is_on_the_last_twentieth_of_a_long_run():
    weights = recipes.half_life(every_step(10_000))
    assert weights[-500:].sum() == pytest.approx(0.5, abs=0.02)


@settings(deadline=None)
@given(steps=st.integers(2, 300), tau=st.floats(1.0, 400.0), share=st.floats(0.01, 1.0))
def test_tail_ema_is_live_blended_with_the_running_average(steps, tau, share):
    brute = share * recursion([1.0 / tau] * steps)
    brute[-1] += 1.0 - share
    np.testing.assert_allclose(recipes.tail_ema(every_step(steps), tau=tau, lambda_=share), brute, atol=1e-9)


@settings(deadline=None)
@given(steps=st.integers(2, 300), length=st.floats(0.02, 0.28))
def test_posthoc_ema_of_every_checkpoint_is_the_power_function_average(steps, length):
    weights = recipes.posthoc_ema(every_step(steps), length=length)
    # The recursion with decay (1 - 1/t)^(gamma + 1), for the gamma that has this length.
    low, high = 0.0, 1e6
    for _ in range(100):
        gamma = (low + high) / 2
        wide = math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2) > length
        low, high = (gamma, high) if wide else (low, gamma)
    brute = recursion([1.0 - (1.0 - 1.0 / step) ** (gamma + 1) for step in range(1, steps + 1)])
    np.testing.assert_allclose(weights, brute, atol=1e-7)


@pytest.mark.parametrize("length", [0.05, 0.1, 0.25])
def test_the_length_of_posthoc_ema_is_its_standard_deviation_relative_to_the_run(length):
    weights, steps = recipes.posthoc_ema(every_step(2000), length=length), np.arange(1, 2001)
    mean = weights @ steps
    assert math.sqrt(weights @ np.square(steps - mean)) / 2000 == pytest.approx(length, rel=0.01)


@settings(deadline=None)
@given(found=lengths, length=st.floats(0.03, 0.28), first=st.integers(1, 40), live=st.booleans())
def test_posthoc_ema_is_the_nearest_profile_that_the_rows_can_make(found, length, first, live):
    spans = spans_of(found, first)
    now = spans[-1].last
    # What rows are averages of, step by step. The oldest row's first step belongs to it.
    profiles = [
        [1.0 / span.samples if span.first <= s <= span.last else 0.0 for s in range(1, now + 1)] for span in spans
    ]
    if live:
        spans = with_live(spans)
        profiles.append([0.0] * (now - 1) + [1.0])
    wanted = recipes.posthoc_ema(every_step(now), length=length)
    rows = np.array(profiles)

    def distance(weights):
        off = weights @ rows - wanted
        return now * float(off @ off), 2.0 * now * rows @ off

    best = minimize(
        distance,
        np.full(len(spans), 1 / len(spans)),
        jac=True,
        method="SLSQP",
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1.0, "jac": np.ones_like},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    weights = recipes.posthoc_ema(spans, length=length)
    assert weights.sum() == pytest.approx(1)
    assert distance(weights)[0] <= distance(best.x)[0] + 1e-9


@given(found=lengths, live=st.booleans())
def test_rows_that_are_means_have_the_weight_of_all_their_steps(found, live):
    spans = spans_of(found)
    rows = with_live(spans) if live else spans
    for recipe, options in [(recipes.half_life, {}), (recipes.tail_ema, {"lambda_": 1.0}), (recipes.mean_of_steps, {})]:
        steps = recipe(every_step(spans[-1].last), **options)
        expected = [steps[span.first - 1 : span.last].sum() for span in spans]
        np.testing.assert_allclose(recipe(rows, **options), [*expected, 0.0] if live else expected, atol=1e-9)


@given(found=lengths, every=st.integers(1, 9))
def test_rows_of_every_nth_checkpoint_have_the_weights_of_rows_of_all(found, every):
    spans = spans_of(found)
    sparse = [Span(every * (span.first), every * span.last, span.samples) for span in spans]
    dense = [Span(every * (span.first - 1) + 1, every * span.last, every * span.samples) for span in spans]
    for recipe in (recipes.half_life, recipes.tail_ema, recipes.posthoc_ema):
        np.testing.assert_allclose(recipe(sparse), recipe(dense), atol=1e-9)
    last = every * spans[-1].samples  # whole rows
    np.testing.assert_allclose(recipes.mean_of_steps(sparse, last=last), recipes.mean_of_steps(dense, last=last))


@given(
    name=st.sampled_from(sorted(RECIPES)),
    steps=st.lists(st.integers(1, 10**6), min_size=2, max_size=30, unique=True).map(sorted),
)
def test_single_checkpoints_at_any_steps_get_weights_on_the_simplex(name, steps):
    weights = RECIPES[name]([Span(step, step, 1) for step in steps])
    assert weights.shape == (len(steps),)
    assert weights.sum() == pytest.approx(1)
    assert weights.min() >= -1e-9


def test_mean_of_steps_counts_the_checkpoints_of_its_steps():
    spans = with_live([Span(1, 200, 200), Span(201, 300, 100), Span(310, 350, 5), Span(360, 400, 5)])
    np.testing.assert_allclose(recipes.mean_of_steps(spans, last=90), [0, 0, 4 / 9, 5 / 9, 0])
    np.testing.assert_allclose(recipes.mean_of_steps(spans, last=150), [0, 50 / 60, 5 / 60, 5 / 60, 0])
    np.testing.assert_allclose(recipes.mean_of_steps(spans, last=1), [0, 0, 0, 1, 0])
    single = [Span(step, step, 1) for step in (100, 250, 300, 350, 400)]
    np.testing.assert_allclose(recipes.mean_of_steps(single, last=100), [0, 0, 0, 0.5, 0.5])
    np.testing.assert_allclose(recipes.mean_of_steps(single, last=9999), np.full(5, 0.2))


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_search_by_name_has_the_weights_of_the_recipe(name):
    spans = tuple(with_live([Span(1, 200, 8), Span(201, 300, 4), Span(301, 350, 2)]))
    means = Problem(tuple(span.last for span in spans), 1, Objective.single(2.0), spans=spans)
    single = Problem((50, 100, 150), 1, Objective.single(2.0))
    for problem, rows in ((means, spans), (single, [Span(step, step, 1) for step in single.steps])):
        search = resolve_search(name)(problem)
        np.testing.assert_array_equal(search.ask(), RECIPES[name](rows))
        assert search.ask() is None
    assert resolve_search(name).closed_form
    assert resolve_search(name).multiscale


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tail-ema", {"tau": 0.5}, "tau=0.5: must be at least 1 optimizer step"),
        ("tail-ema", {"lambda_": 0}, "lambda_=0: must be a share"),
        ("half-life", {"fraction": 1.0}, "fraction=1.0: must be a share"),
        ("mean-of-steps", {"last": 0}, "last=0: must be at least 1"),
        ("posthoc-ema", {"length": 0.3}, "length=0.3: must be a share"),
        ("posthoc-ema", {"gamma": 5}, "do not fit search='posthoc-ema'"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        resolve_search(name, options)
