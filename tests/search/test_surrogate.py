"""The search that takes gradients: its model against known quadratics, its search on trajectories of known shape."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_search import run

from traj_merge_callback.search.quadratic import Observation, Prior, design, posterior, quadratic
from traj_merge_callback.search.space import within_bounds


def landscape(seed, k=8, alpha=0.6, coupling=0.05, gain=0.1, cubic=0.0):
    """A loss over merge weights like those measured: rows of a random walk, Hessian nearly diagonal in their axes."""
    rng = np.random.default_rng(seed)
    rows = np.cumsum(rng.normal(size=(k, 40)), axis=0)
    deltas = rows - rows[-1]
    gram = deltas @ deltas.T
    centering = np.eye(k) - 1 / k
    w, v = np.linalg.eigh(centering @ gram @ centering)
    w, axes = w[1:], v[:, 1:] / np.sqrt(w[1:])
    curvature = (w / w.mean()) ** -alpha * rng.uniform(0.6, 1.4, size=k - 1)
    mixing = coupling * rng.normal(size=(k - 1, k - 1)) * np.sqrt(np.outer(curvature, curvature))
    to_point = (axes * w).T
    best = rng.dirichlet(np.linspace(0.2, 3, k))
    away = to_point @ (np.eye(k)[-1] - best)
    hessian = np.diag(curvature) + (mixing + mixing.T) / 2
    hessian *= 2 * gain / float(away @ hessian @ away)

    def loss(weights):
        z = to_point @ (np.asarray(weights) - best)
        q = float(z @ hessian @ z)
        return 1.5 + 0.5 * q + cubic * q**1.5

    def gradient(weights):
        z = to_point @ (np.asarray(weights) - best)
        q = float(z @ hessian @ z)
        return to_point.T @ (hessian @ z) * (1 + 3 * cubic * np.sqrt(q)) + 123.0  # a constant no merge feels

    return loss, gradient, gram, best


def test_it_recovers_nearly_all_of_the_gain_within_nine_forward_equivalents():
    recovered = []
    for seed in range(60):
        k, alpha = 3 + seed % 10, (0.2, 0.4, 0.6, 0.8)[seed % 4]
        loss, gradient, gram, best = landscape(seed, k, alpha, cubic=0.2)
        chosen, _ = run("surrogate", loss, 9, steps=tuple(range(1, k + 1)), gram=gram, gradient=gradient)
        live = loss(np.eye(k)[-1])
        recovered.append((live - chosen.loss) / (live - loss(best)))
        assert chosen.forward_equivalents <= 9
    assert np.median(recovered) > 0.99
    assert min(recovered) > 0.9


def test_it_beats_the_gaussian_process_with_far_more_evaluations():
    for seed in range(2):
        loss, gradient, gram, _ = landscape(seed, cubic=0.3)
        mine, _ = run("surrogate", loss, 12, gram=gram, gradient=gradient)
        theirs, _ = run("gp", loss, 24)
        assert mine.loss < theirs.loss


def test_it_stops_when_little_is_left_to_win():
    loss, gradient, gram, best = landscape(3)
    chosen, seen = run("surrogate", loss, 50, gram=gram, gradient=gradient, previous=best)
    assert len(seen) <= 3
    assert chosen.forward_equivalents <= 8
    np.testing.assert_array_equal(seen[0], best)


@pytest.mark.parametrize("evaluations", [2, 3, 4, 5, 8, 12])
def test_the_budget_counts_gradients_as_three_passes(evaluations):
    loss, gradient, gram, _ = landscape(1)
    chosen, _ = run("surrogate", loss, evaluations, gram=gram, gradient=gradient)
    assert chosen.forward_equivalents <= evaluations
    assert chosen.loss <= loss(np.eye(8)[-1])


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_proposed_weights_sum_to_one_and_stay_within_bounds(seed):
    rng = np.random.default_rng(seed)
    rows = np.cumsum(rng.normal(size=(8, 5)), axis=0)  # fewer dimensions than rows: a degenerate Gram matrix
    gram = (rows - rows[-1]) @ (rows - rows[-1]).T
    _, seen = run("surrogate", lambda w: 1 + rng.normal(), 20, gram=gram, gradient=lambda w: 10 * rng.normal(size=8))
    for weights in seen:
        assert weights.sum() == pytest.approx(1)
        assert -1.01 <= weights.min() <= weights.max() <= 2.01


def test_equal_rows_leave_nothing_to_search_for():
    chosen, seen = run("surrogate", lambda w: 1.0, 12, gram=np.zeros((8, 8)), gradient=lambda w: np.zeros(8))
    assert seen == []
    assert chosen.weights is None


def test_a_loss_that_is_not_finite_ends_the_search():
    _, gradient, gram, _ = landscape(0)
    losses = iter([1.0] + [np.nan] * 20)
    chosen, seen = run("surrogate", lambda w: next(losses), 12, gram=gram, gradient=gradient)
    assert len(seen) == 1
    assert chosen.weights is None


def test_the_posterior_of_enough_gradients_is_the_true_quadratic():
    rng = np.random.default_rng(0)
    curvatures = np.array([1.0, 0.5, 0.2])
    root = rng.normal(size=(3, 3)) * 0.03
    hessian = np.diag(curvatures * [1.2, 0.8, 1.1]) + root + root.T
    best = np.array([0.01, -0.02, 0.015])
    observations = []
    for point in 0.05 * np.vstack([np.eye(3), -np.eye(3), np.zeros(3)]):
        z = point - best
        observations.append(Observation(point, 2.0 + 0.5 * z @ hessian @ z, hessian @ z))
    found = posterior(observations, Prior(curvatures, 10 * curvatures), np.zeros(3), design(observations))
    model = quadratic(found.mean, curvatures)
    np.testing.assert_allclose(model.hessian, hessian, atol=5e-3)
    np.testing.assert_allclose(model.minimum(), best, atol=1e-3)
    fall = model.value(np.zeros(3)) - model.value(model.minimum())
    assert fall == pytest.approx(0.5 * best @ hessian @ best, rel=0.05)
    # What is known is certain; without observations of the slope it is not.
    draws = found.samples(20, np.random.default_rng(0))
    assert np.std([draw.minimum() for draw in draws], axis=0).max() < 2e-3


def test_without_evidence_the_posterior_is_the_prior():
    curvatures = np.array([3.0, 1.0])
    observations = [Observation(np.zeros(2), 1.0)]
    found = posterior(observations, Prior(curvatures, curvatures), np.zeros(2), design(observations))
    np.testing.assert_allclose(quadratic(found.mean, curvatures).hessian, np.diag(curvatures))
    slopes = [draw.slope for draw in found.samples(400, np.random.default_rng(0))]
    np.testing.assert_allclose(np.std(slopes, axis=0), np.sqrt(curvatures), rtol=0.15)


@settings(deadline=None)
@given(weights=st.lists(st.floats(-5, 5), min_size=2, max_size=8), bounds=st.sampled_from([(-1.0, 2.0), (0.0, 1.0)]))
def test_the_nearest_weights_within_bounds(weights, bounds):
    given_weights = np.array(weights) + (1.0 - sum(weights)) / len(weights)
    found = within_bounds(given_weights, bounds)
    assert found.sum() == pytest.approx(1.0, abs=1e-9)
    assert bounds[0] <= found.min() <= found.max() <= bounds[1]
    # Of the nearest point of a convex set: no other point of it lies in the direction of the given one.
    for corner in np.eye(len(found)):
        assert (given_weights - found) @ (corner - found) <= 1e-6


def test_the_last_merges_weights_come_first_even_if_rounding_puts_them_beyond_a_bound():
    loss, gradient, gram, _ = landscape(0, 5)
    previous = np.array([0.1, np.nextafter(-1.0, -2.0), 0.2, 1.6, 0.1])
    _, seen = run("surrogate", loss, 9, steps=tuple(range(5)), gram=gram, gradient=gradient, previous=previous)
    np.testing.assert_allclose(seen[0], previous, atol=1e-12)
    joined = np.array([-1.7, 0.9, 0.1, 1.6, 0.1])
    _, seen = run("surrogate", loss, 9, steps=tuple(range(5)), gram=gram, gradient=gradient, previous=joined)
    np.testing.assert_allclose(seen[0], [-1.0, 0.725, -0.075, 1.425, -0.075])
