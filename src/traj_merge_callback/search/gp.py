"""Bayesian optimisation of the merge weights with scikit-optimize's Gaussian process."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np
from skopt import Optimizer

from ..recipes import ema, lawa, suffix_average
from . import Problem


class _BayesianSearch(ABC):
    """First points, then scikit-optimize: a Gaussian process with GP-Hedge over EI, PI and UCB in a unit box."""

    def __init__(self, problem: Problem, box: list[tuple[float, float]], first: Iterable[np.ndarray]) -> None:
        self._first = list(first)
        self._points: list[list[float]] = []
        self._losses: list[float] = []
        self._box = box
        self._told = 0
        self._optimizer = Optimizer(
            box, "GP", n_initial_points=0, acq_func="gp_hedge", acq_optimizer="sampling", random_state=problem.seed
        )
        self.tell(problem.row(age=0), problem.live_loss)

    @abstractmethod
    def _to_weights(self, point: list[float]) -> np.ndarray:
        """The candidate at a point of the box."""

    @abstractmethod
    def _to_point(self, weights: np.ndarray) -> list[float]:
        """The point of the box for a candidate."""

    def ask(self) -> np.ndarray | None:
        if self._first:
            return self._first.pop(0)
        with warnings.catch_warnings():
            # "The objective has been evaluated at this point before": harmless, the engine answers from its cache.
            warnings.simplefilter("ignore")
            if self._told < len(self._points):
                self._optimizer.tell(self._points[self._told :], self._losses[self._told :])
                self._told = len(self._points)
            return self._to_weights(self._optimizer.ask())

    def tell(self, weights: np.ndarray, loss: float) -> None:
        # A Gaussian process cannot hold an infinite loss: the worst finite one says "not here" well enough.
        finite = [value for value in self._losses if np.isfinite(value)]
        self._losses.append(loss if np.isfinite(loss) else max(finite, default=0.0))
        point = self._to_point(weights)
        self._points.append([min(max(x, low), high) for x, (low, high) in zip(point, self._box, strict=True)])


class GaussianProcessSearch(_BayesianSearch):
    """Bayesian optimisation over the whole simplex of merge weights (arXiv 2403.19390's idea in k - 1 dimensions).

    First points: live, the uniform average, EMA and the last merge's weights; then the Gaussian process. The simplex is
    parametrised by stick breaking from the newest row on: ``v_0`` is its share of the whole, ``v_1`` the next older
    row's share of the rest, and so on, which has every face of the simplex inside the box.
    """

    def __init__(self, problem: Problem) -> None:
        self._size = problem.size
        super().__init__(problem, [(0.0, 1.0)] * (problem.size - 1), self._first_points(problem))

    def _first_points(self, problem: Problem) -> list[np.ndarray]:
        previous = [] if problem.previous is None else [problem.previous]
        return [lawa(problem.size), ema(problem.size), *previous]

    def _to_weights(self, point: list[float]) -> np.ndarray:
        weights, rest = np.zeros(self._size), 1.0
        for age, share in enumerate(point):
            weights[self._size - 1 - age] = share * rest
            rest *= 1.0 - share
        weights[0] = rest
        return weights / weights.sum()

    def _to_point(self, weights: np.ndarray) -> list[float]:
        point, rest = [], 1.0
        for age in range(self._size - 1):
            weight = float(weights[self._size - 1 - age])
            point.append(weight / rest if rest > 1e-12 else 1.0)
            rest -= weight
        return point


class AutoSearch(GaussianProcessSearch):
    """The default: ``gp``, whose first points also hold averages over shorter durations.

    The merge duration matters more than the shape of the weights (WSM, arXiv 2507.17634), so the averages of the newest
    half and quarter of the window come before the Gaussian process takes over.
    """

    def _first_points(self, problem: Problem) -> list[np.ndarray]:
        shorter = sorted({problem.size // 2, problem.size // 4} - {0, 1, problem.size}, reverse=True)
        return [*super()._first_points(problem), *(suffix_average(problem.size, count) for count in shorter)]


class PairwiseSearch(_BayesianSearch):
    """The published search: ``lambda theta_t + (1 - lambda) theta_{t-1}`` of the two newest rows (arXiv 2403.19390).

    Args:
        problem: the merge's problem.
        alpha: lower end of the search space, ``lambda in [alpha, 1]``.

    Raises:
        ValueError: ``alpha`` not in [0, 1).
    """

    def __init__(self, problem: Problem, *, alpha: float = 0.5) -> None:
        self.check_options(alpha=alpha)
        self._size = problem.size
        middle = self._to_weights([(1.0 + alpha) / 2.0])
        super().__init__(problem, [(alpha, 1.0)], [middle, self._to_weights([alpha])])

    @staticmethod
    def check_options(*, alpha: float = 0.5) -> None:
        """Raise a ValueError if ``alpha`` is not in [0, 1)."""
        if not 0.0 <= alpha < 1.0:
            raise ValueError(f"alpha={alpha}: must be in [0, 1)")

    def _to_weights(self, point: list[float]) -> np.ndarray:
        weights = np.zeros(self._size)
        weights[-1], weights[-2] = point[0], 1.0 - point[0]
        return weights

    def _to_point(self, weights: np.ndarray) -> list[float]:
        return [float(weights[-1])]
