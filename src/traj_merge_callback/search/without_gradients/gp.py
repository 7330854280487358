"""Bayesian optimisation of the merge weights with scikit-optimize's Gaussian process."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import numpy as np
from skopt import Optimizer

from ..problem import Observed, Problem, Search
from ..recipes import ema, lawa


class _BayesianSearch(Search):
    """Given first candidates, then scikit-optimize's: a Gaussian process with GP-Hedge over EI, PI and UCB.

    Args:
        problem: the merge's problem.
        box: lower and upper end of each coordinate that the Gaussian process works in.
        first: the first candidates.
    """

    def __init__(self, problem: Problem, box: list[tuple[float, float]], first: Iterable[np.ndarray]) -> None:
        super().__init__(problem)
        self._first = list(first)
        self._points: list[list[float]] = []
        self._losses: list[float] = []
        self._box = box
        self._told = 0
        seed = problem.seed % 2**32  # the largest that scikit-learn takes is one less
        self._optimizer = Optimizer(
            box, "GP", n_initial_points=0, acq_func="gp_hedge", acq_optimizer="sampling", random_state=seed
        )
        self._live_loss = problem.live_loss
        self._observe(problem.live, problem.live_loss)

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
            # skopt warns of points evaluated before; the engine answers those from memory.
            warnings.simplefilter("ignore")
            if self._told < len(self._points):
                self._optimizer.tell(self._points[self._told :], self._losses[self._told :])
                self._told = len(self._points)
            return self._to_weights(self._optimizer.ask())

    def tell(self, weights: np.ndarray, loss: float, observed: Observed) -> None:
        self._observe(weights, loss)

    def _observe(self, weights: np.ndarray, loss: float) -> None:
        # A Gaussian process cannot be fitted to an infinite loss; the largest finite one stands for it.
        finite = [value for value in self._losses if np.isfinite(value)]
        self._losses.append(loss if np.isfinite(loss) else max([*finite, self._live_loss]))
        point = self._to_point(weights)
        self._points.append([min(max(x, low), high) for x, (low, high) in zip(point, self._box, strict=True)])


class GaussianProcessSearch(_BayesianSearch):
    """Bayesian optimisation over the whole simplex of merge weights (arXiv 2403.19390's idea in k - 1 dimensions).

    First candidates: live, the uniform average, EMA and the last merge's weights. The simplex is parametrised by stick
    breaking from the newest row on: ``v_0`` is the newest row's weight, ``v_1`` the next older row's share of what is
    left, and so on; every face of the simplex is reached with ``v`` in the unit box.
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


class DynamicFisherSearch(GaussianProcessSearch):
    """Bayesian optimisation of one coefficient a row, with Fisher information as weights (DF-Merge, arXiv 2504.18992).

    Coefficients are on the simplex, as there is no base model here whose differences to the rows could be scaled. The
    information is that of each row, learnt once; the paper's is taken anew at each candidate, at k backward passes.
    """

    weighing = "fisher"


class ReachSearch(_BayesianSearch):
    """Bayesian optimisation over two numbers: how far the merge reaches back and how sharply it ends.

    The merge duration matters more than anything else (WSM, arXiv 2507.17634), and a Gaussian process needs far fewer
    evaluations in two dimensions than in k - 1. Candidates are stretched exponentials of a row's age i (0 is the
    newest), ``a_i ~ exp(-(i / tau)^p)``: EMA for p = 1, nearly the average of the newest tau rows for large p, the
    uniform average for large tau, the newest row for small tau. First candidates: uniform, EMA, half the window, the
    newest few rows, and the last merge's weights. The family and its bounds are ours.
    """

    def __init__(self, problem: Problem) -> None:
        self._ages = np.arange(problem.size - 1, -1, -1.0)
        longest = 4.0 * problem.size
        self._points_of: dict[bytes, list[float]] = {}
        box = [(np.log(0.4), np.log(longest)), (np.log(0.5), np.log(4.0))]
        # As (tau, p); the second is EMA with a decay of 0.8.
        family = [(longest, 2.0), (-1 / np.log(0.8), 1.0), (problem.size / 2, 2.0), (1.5, 1.0)]
        first = [self._to_weights([float(np.log(tau)), float(np.log(power))]) for tau, power in family]
        super().__init__(problem, box, first if problem.previous is None else [*first, problem.previous])

    def _to_weights(self, point: list[float]) -> np.ndarray:
        weights = self._family(*point)
        self._points_of[weights.tobytes()] = list(point)
        return weights

    def _family(self, log_tau: float, log_power: float) -> np.ndarray:
        weights = np.exp(-((self._ages / np.exp(log_tau)) ** np.exp(log_power)))
        return weights / weights.sum()

    def _to_point(self, weights: np.ndarray) -> list[float]:
        if known := self._points_of.get(weights.tobytes()):
            return known
        # Weights that are not of the family (live, the last merge's) get the grid point with the nearest weights.
        axes = [np.linspace(low, high, 25) for low, high in self._box]
        grid = [(float(tau), float(power)) for tau in axes[0] for power in axes[1]]
        return list(min(grid, key=lambda point: float(np.square(self._family(*point) - weights).sum())))


class PairwiseSearch(_BayesianSearch):
    """Bayesian optimisation of ``lambda theta_t + (1 - lambda) theta_{t-1}`` of the two newest rows (arXiv 2403.19390).

    Args:
        problem: the merge's problem.
        alpha: smallest weight of the newest row: ``lambda in [alpha, 1]``.

    Raises:
        ValueError: ``alpha`` not in [0, 1).
    """

    def __init__(self, problem: Problem, *, alpha: float = 0.5) -> None:
        self.check_options(alpha=alpha)
        self._size = problem.size
        middle = self._to_weights([(1.0 + alpha) / 2.0])
        super().__init__(problem, [(alpha, 1.0)], [middle, self._to_weights([alpha])])

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Raise a ValueError if ``alpha`` is not in [0, 1)."""
        alpha = options.get("alpha", 0.0)
        if not 0.0 <= alpha < 1.0:
            raise ValueError(f"alpha={alpha}: must be in [0, 1)")

    def _to_weights(self, point: list[float]) -> np.ndarray:
        weights = np.zeros(self._size)
        weights[-1], weights[-2] = point[0], 1.0 - point[0]
        return weights

    def _to_point(self, weights: np.ndarray) -> list[float]:
        return [float(weights[-1])]
