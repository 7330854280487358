"""The trajectory surrogate on losses that are known: exact where the loss is quadratic, careful where it is not."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_search import run, weights_of

from traj_merge_callback.search.objective import Objective
from traj_merge_callback.search.space import PrincipalAxes, best_point
from traj_merge_callback.search.trajectory import fill_by_trapezoid, trajectory_quadratic


class QuadraticModel:
    """A loss that is quadratic in the parameters, and a trajectory of checkpoints on it."""

    def __init__(self, seed, k=6, size=30, noise=0.0):
        self.rng = np.random.default_rng(seed)
        root = self.rng.normal(size=(size, size))
        self.hessian = root @ root.T / size + 0.1 * np.eye(size)
        self.center = self.rng.normal(size=size)
        self.rows = 3.0 + np.cumsum(0.3 * self.rng.normal(size=(k, size)), axis=0)
        self.noise = noise
        deltas = self.rows - self.rows[-1]
        self.gram = deltas @ deltas.T

    def loss(self, weights):
        away = np.asarray(weights) @ self.rows - self.center
        return 1.0 + 0.5 * float(away @ self.hessian @ away) + self.noise * self.rng.normal()

    def gradient(self, weights):
        gradient = self.hessian @ (np.asarray(weights) @ self.rows - self.center)
        return self.rows @ (gradient + self.noise * self.rng.normal(size=len(gradient)))

    def best_affine(self):
        """The best weights that sum to 1, from the normal equations."""
        k = len(self.rows)
        matrix = np.block(
            [[self.rows @ self.hessian @ self.rows.T, np.ones((k, 1))], [np.ones((1, k)), np.zeros((1, 1))]]
        )
        return np.linalg.solve(matrix, np.append(self.rows @ self.hessian @ self.center, 1.0))[:k]

    def observed(self):
        """Losses and products at each row, known only towards rows that were there then."""
        eye = np.eye(len(self.rows))
        losses = np.array([self.loss(row) for row in eye])
        full = np.array([self.gradient(row) for row in eye])
        return losses, full, np.where(np.tri(len(eye), dtype=bool), full, np.nan)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), k=st.integers(2, 9))
def test_the_trapezoid_rule_gives_the_missing_products_of_a_quadratic_exactly(seed, k):
    losses, full, known = QuadraticModel(seed, k).observed()
    # A gradient's products are known up to a constant, so differences are what must agree.
    filled = fill_by_trapezoid(losses, known)
    own = np.diag(full)[:, None]
    np.testing.assert_allclose(filled - np.diag(filled)[:, None], full - own, atol=1e-8 * np.abs(full).max())


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), k=st.integers(2, 9))
def test_the_surrogate_of_a_quadratic_loss_has_its_optimum(seed, k):
    model = QuadraticModel(seed, k)
    losses, _, known = model.observed()
    axes = PrincipalAxes(model.gram)
    surrogate = trajectory_quadratic(losses, fill_by_trapezoid(losses, known), axes)
    best = axes.to_weights(best_point([surrogate], Objective.single(0.0), axes, (-1e9, 1e9), np.zeros(k - 1)))
    assert best.sum() == pytest.approx(1)
    np.testing.assert_allclose(best, model.best_affine(), atol=1e-6 * max(1.0, np.abs(best).max()))
    assert surrogate.value(axes.to_point(best)) == pytest.approx(model.loss(best), abs=1e-6)


def test_the_search_finds_the_optimum_of_a_quadratic_from_the_rows_alone():
    for seed in range(5):
        model = QuadraticModel(seed, k=6)
        bounds = (-50.0, 50.0)
        chosen, seen = run(
            "trajectory", model.loss, 30, steps=tuple(range(6)), gram=model.gram, gradient=model.gradient, bounds=bounds
        )
        assert len(seen) == 7  # each row, and the optimum: what is expected to be left is less than nothing
        np.testing.assert_allclose(chosen.weights, model.best_affine(), atol=1e-6)


def test_rows_are_remembered_while_they_are_in_the_window():
    model, memory = QuadraticModel(0, k=7), {}
    options = {"gram": model.gram[:6, :6], "memory": memory, "bounds": (-50.0, 50.0)}
    pad = lambda weights: np.append(weights, 0.0)  # noqa: E731
    run(
        "trajectory",
        lambda w: model.loss(pad(w)),
        30,
        steps=(1, 2, 3, 4, 5, 6),
        gradient=lambda w: model.gradient(pad(w))[:6],
        **options,
    )
    later = model.rows[1:] - model.rows[-1]
    shift = lambda weights: np.append(0.0, weights)  # noqa: E731
    chosen, seen = run(
        "trajectory",
        lambda w: model.loss(shift(w)),
        8,
        steps=(2, 3, 4, 5, 6, 7),
        gradient=lambda w: model.gradient(shift(w))[1:],
        **{**options, "gram": later @ later.T},
    )
    assert len(seen) == 2  # the new row, and the optimum: 6 passes, and live's
    assert chosen.forward_equivalents <= 8
    model.rows = model.rows[1:]
    np.testing.assert_allclose(chosen.weights, model.best_affine(), atol=1e-6)
    assert sorted(memory["rows"]) == ["2", "3", "4", "5", "6", "7"]


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), noise=st.floats(0.01, 30.0))
@example(seed=1695, noise=21.1875)  # its Hessian is singular when rounded
def test_noise_never_makes_a_merge_that_was_not_evaluated_or_is_worse_than_live(seed, noise):
    model = QuadraticModel(seed, noise=noise)
    told = []

    def loss(weights):
        told.append(model.loss(weights))
        return told[-1]

    chosen, seen = run("trajectory", loss, 30, steps=tuple(range(6)), gram=model.gram, gradient=model.gradient)
    assert chosen.loss == min(told)
    assert any(np.array_equal(weights_of(chosen, 6), weights) for weights in [np.eye(6)[-1], *seen])
    for weights in seen:
        assert weights.sum() == pytest.approx(1)
        assert -1.001 <= weights.min() <= weights.max() <= 2.001


def test_a_budget_too_small_for_all_rows_goes_to_the_newest():
    model = QuadraticModel(1)
    _, seen = run("trajectory", model.loss, 12, steps=tuple(range(6)), gram=model.gram, gradient=model.gradient)
    rows = [weights for weights in seen if weights.max() == 1.0]
    assert [int(weights.argmax()) for weights in rows] == [5, 4, 3]
    assert all(np.count_nonzero(weights[:3]) == 0 for weights in seen)


@pytest.mark.parametrize("name", ["surrogate", "trajectory"])
def test_the_simplex_is_kept_where_it_is_asked_for(name):
    model = QuadraticModel(3)
    options = {"steps": tuple(range(6)), "gram": model.gram, "gradient": model.gradient}
    chosen, seen = run(name, model.loss, 40, space="simplex", **options)
    assert min(weights.min() for weights in seen) >= -1e-9
    # No other point of the simplex is better: against many random ones and all pairs of vertices' midpoints.
    others = np.vstack([np.random.default_rng(0).dirichlet(np.full(6, 0.3), size=4000), np.eye(6)])
    best = min(model.loss(weights) for weights in others)
    live = model.loss(np.eye(6)[-1])
    assert live - chosen.loss >= 0.98 * (live - best)


def test_bad_spaces_and_bounds_are_named():
    for name in ("surrogate", "trajectory", "auto"):
        for options, message in (
            ({"space": "ball"}, "space='ball' is not one of"),
            ({"bounds": (0.1, 0.5)}, r"bounds=\(0.1, 0.5\): must include 0 and 1"),
            ({"space": "simplex", "bounds": (-1, 1)}, "space='simplex' has bounds of its own"),
        ):
            from traj_merge_callback.search import resolve_search

            with pytest.raises(ValueError, match=message):
                resolve_search(name, options)
