"""Bayesian optimisation over many rows of which few matter: first which, then their weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import minimize
from skopt.acquisition import gaussian_ei
from skopt.learning import GaussianProcessRegressor
from skopt.learning.gaussian_process.kernels import RBF, ConstantKernel

from ..checks import integer
from ..problem import Observed, Problem, Search
from ..recipes import ema, lawa

# Scale of the half-Cauchy prior of inverse squared length scales. In SAASBO the scale has a prior itself, a half-Cauchy
# distribution of this scale.
_SHRINKAGE = 0.1
# Variance of a loss's error, relative to that of the losses: all are of the same held-out data.
_NOISE = 1e-4
# Rows that have a share of a sparse candidate, on average.
_FEW = 3.0
# Candidates among which the one of the highest expected improvement is found, of each of two kinds.
_POOL = 1000


class SparseSearch(Search):
    """Two stages: which few of 20 to 30 rows matter, then a search over their weights (GimmBO, arXiv 2601.18585).

    A Gaussian process models the loss over the simplex of merge weights, with one length scale for each row. These have
    SAASBO's prior (arXiv 2103.00349), a half-Cauchy distribution of the inverse square, which takes rows for irrelevant
    until losses show that they matter; their most probable values are used.

    1. The uniform average, EMA and the last merge's weights are evaluated; then, until half of the budget is spent,
       candidates of the highest expected improvement, with weights on all rows.
    2. The rows with the shortest length scales are those that matter. Candidates differ from the best one in their
       weights alone; the other rows have what is left, in the same proportions as in the best one.

    GimmBO asks people which of several images is better; here losses are known. How candidates are drawn, that the
    budget is halved, and that rows which do not matter keep a share are ours.

    Args:
        problem: the merge's problem.
        active: the most rows that matter.

    Raises:
        ValueError: ``active`` below 1.
    """

    def __init__(self, problem: Problem, *, active: int = 5) -> None:
        self.check_options(active=active)
        super().__init__(problem)
        self._active = active
        previous = [] if problem.previous is None else [np.maximum(problem.previous, 0.0)]
        self._first = [lawa(problem.size), ema(problem.size), *[one / one.sum() for one in previous]]
        self._seen = [problem.live]
        self._losses = [problem.live_loss]
        self._rng = np.random.default_rng(problem.seed)

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Raise a ValueError or TypeError if ``active`` is no integer of at least 1."""
        integer("active", options.get("active", 1), 1)

    def ask(self) -> np.ndarray | None:
        if self._first:
            return self._first.pop(0)
        seen, losses = np.array(self._seen), self._finite_losses()
        model = _fitted(seen, losses)
        most_relevant = np.argsort(model.kernel_.k2.length_scale, kind="stable")
        is_first_stage = len(seen) <= self.problem.evaluations // 2
        pool = self._pool(seen[np.argmin(losses)], most_relevant[: None if is_first_stage else self._active])
        with warnings.catch_warnings():
            # Of variances that rounding makes negative, which scikit-learn sets to 0.
            warnings.simplefilter("ignore")
            return pool[int(np.argmax(gaussian_ei(pool, model, float(losses.min()), xi=0.0)))]

    def tell(self, weights: np.ndarray, loss: float, observed: Observed) -> None:
        self._seen.append(weights)
        self._losses.append(loss)

    def _finite_losses(self) -> np.ndarray:
        """Losses of all candidates; for those that are not finite the largest that is, as a model needs numbers."""
        losses = np.array(self._losses)
        finite = np.isfinite(losses)
        return np.where(finite, losses, losses[finite].max() if finite.any() else 0.0)

    def _pool(self, best: np.ndarray, free: np.ndarray) -> np.ndarray:
        """Candidates to choose from, shape ``(2 * _POOL, size)``.

        Args:
            best: merge weights, shape ``(size,)``.
            free: indices of the rows whose weights may change; the others keep their proportions to each other.
        """
        rest = best.copy()
        rest[free] = 0.0
        # Candidates are merges of corners: the free rows, and the others together.
        corners, shares = np.eye(len(best))[free], best[free]
        if rest.sum() > 0.0:
            corners, shares = np.concatenate([corners, rest[None] / rest.sum()]), np.append(shares, rest.sum())
        # Merges of few corners and those on the way to them; and the best candidate with all shares changed.
        few = self._rng.dirichlet(np.full(len(shares), min(1.0, _FEW / len(shares))), _POOL)
        way = self._rng.beta(0.5, 0.5, (_POOL, 1))
        change = self._rng.uniform(0.0, 1.0, (_POOL, 1)) * self._rng.normal(size=(_POOL, len(shares)))
        changed = np.maximum(shares, 1e-6) * np.exp(change)
        pool = np.concatenate([(1.0 - way) * shares + way * few, changed / changed.sum(axis=1, keepdims=True)])
        return pool @ corners


def _fitted(points: np.ndarray, losses: np.ndarray) -> GaussianProcessRegressor:
    """A Gaussian process with the most probable length scales.

    Args:
        points: merge weights, shape ``(n, size)``.
        losses: shape ``(n,)``, finite.
    """
    kernel = ConstantKernel(1.0, (1e-3, 1e3)) * RBF(np.ones(points.shape[1]), (1e-2, 1e2))
    model = GaussianProcessRegressor(kernel, alpha=_NOISE, optimizer=_most_probable, normalize_y=True)
    with warnings.catch_warnings():
        # Of hyperparameters at their bounds: where rows do not matter that is what is asked for.
        warnings.simplefilter("ignore")
        return model.fit(points, losses)


def _most_probable(
    objective: Callable[[np.ndarray], tuple[float, np.ndarray]], start: np.ndarray, bounds: np.ndarray
) -> tuple[np.ndarray, float]:
    """The hyperparameters of the highest posterior, as an optimizer of scikit-learn.

    Args:
        objective: minus the log likelihood and its gradient.
        start: logarithms of the hyperparameters: variance, length scales.
        bounds: of these logarithms, shape ``(hyperparameters, 2)``.
    """
    scales = slice(1, None)

    def posterior(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = objective(theta)
        squares = np.exp(-4.0 * theta[scales]) / _SHRINKAGE**2
        gradient = gradient.copy()
        gradient[scales] -= 4.0 * squares / (1.0 + squares)
        return value + float(np.log1p(squares).sum()), gradient

    found = minimize(posterior, start, jac=True, method="L-BFGS-B", bounds=bounds)
    return found.x, float(found.fun)
