"""Recipes against their closed forms and against brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from traj_merge_callback.search import recipes

sizes = st.integers(2, 30)
losses = st.lists(st.floats(0.5, 10.0), min_size=2, max_size=20)


@given(
    k=sizes, decay=st.floats(0.05, 1.0), profile=st.sampled_from(sorted(recipes.WSM_PROFILES)), power=st.floats(0, 9)
)
def test_every_recipe_sums_to_one_on_the_simplex(k, decay, profile, power):
    steps = list(range(50, 50 * (k + 1), 50))
    found = [
        recipes.lawa(k),
        recipes.ema(k, decay=decay),
        recipes.wma(k),
        recipes.wsm(k, profile=profile),
        recipes.mwa_step(steps, power=power),
        recipes.mwa_loss([1 + 0.1 * i for i in range(k)], power=power),
        recipes.perplexity([1 + 0.1 * i for i in range(k)]),
    ]
    for weights in found:
        assert weights.shape == (k,)
        assert weights.min() >= 0
        assert weights.sum() == pytest.approx(1)


@given(k=sizes, decay=st.floats(0.05, 1.0))
def test_ema_is_the_recursion_of_a_running_average_without_its_start(k, decay):
    # EMA_t = decay EMA_{t-1} + (1 - decay) theta_t from zero, divided by the sum of its weights.
    weights = np.zeros(k)
    for i in range(k):
        weights *= decay
        weights[i] += 1.0
    np.testing.assert_allclose(recipes.ema(k, decay=decay), weights / weights.sum())


@given(k=sizes, profile=st.sampled_from(sorted(recipes.WSM_PROFILES)))
def test_wsm_weights_give_each_update_the_profile_of_its_decay(k, profile):
    # Merging checkpoints equals applying the update between i-1 and i with the learning rate scaled by w_i.
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(k, 3))
    a = recipes.wsm(k, profile=profile)
    w = np.array([a[i:].sum() for i in range(k)])
    decayed = rows[0] + sum(w[i] * (rows[i] - rows[i - 1]) for i in range(1, k))
    np.testing.assert_allclose(a @ rows, decayed)
    assert w[0] == pytest.approx(1)
    assert (np.diff(w) <= 1e-12).all()
    expected = recipes.WSM_PROFILES[profile](np.arange(1, k) / k, 4.0)
    np.testing.assert_allclose(w[1:], expected, atol=1e-12)


def test_linear_wsm_is_the_uniform_average():
    np.testing.assert_allclose(recipes.wsm(7, profile="linear"), recipes.lawa(7))


def test_wma_grows_linearly():
    np.testing.assert_allclose(recipes.wma(4), [0.1, 0.2, 0.3, 0.4])


@given(values=losses, power=st.floats(0, 5))
def test_mwa_loss_is_inverse_power_of_the_loss(values, power):
    brute = np.array([value**-power for value in values])
    np.testing.assert_allclose(recipes.mwa_loss(values, power=power), brute / brute.sum(), rtol=1e-9)


def test_mwa_step_is_power_of_the_step():
    np.testing.assert_allclose(recipes.mwa_step([100, 200, 300], power=2), np.array([1, 4, 9]) / 14)


@given(values=losses, temperature=st.floats(0.05, 2))
def test_perplexity_weights_are_powers_of_perplexity(values, temperature):
    ppl = np.exp(np.array(values) - min(values))
    brute = ppl ** (-1 / temperature)
    np.testing.assert_allclose(recipes.perplexity(values, temperature=temperature), brute / brute.sum(), rtol=1e-7)


def test_a_huge_power_neither_overflows_nor_underflows():
    np.testing.assert_allclose(recipes.mwa_loss([1.0, 2.0], power=5000), [1, 0])


@given(k=sizes, step=st.integers(1, 10**6))
def test_bema_weights_are_the_papers_formula(k, step):
    rng = np.random.default_rng(step)
    theta_0, average, *rows = rng.normal(size=(k + 2, 4))
    alpha = (10 + step) ** -0.2
    merged = recipes.bema(k, step) @ np.array([theta_0, average, *rows])
    np.testing.assert_allclose(merged, alpha * (rows[-1] - theta_0) + average)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recipes.ema(3, decay=0), "decay=0"),
        (lambda: recipes.wsm(3, profile="cubic"), "profile='cubic'"),
        (lambda: recipes.wsm(3, steepness=-1), "steepness=-1"),
        (lambda: recipes.mwa_loss([1.0, -1.0]), "positive losses"),
        (lambda: recipes.perplexity([1.0], temperature=0), "temperature=0"),
    ],
)
def test_bad_options_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
