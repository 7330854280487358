"""The trajectory surrogate: a quadratic model of the loss from one gradient at each row of the window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from .objective import Objective
from .problem import GRADIENT_COST, Observed, Problem, Search
from .quadratic import Quadratic
from .space import PrincipalAxes, best_point, check_space

# Eigenvalues of the Hessian are raised to at least this share of the largest one.
_SMALLEST_CURVATURE = 1e-9
# An expected fall of the loss, in nats, below this is a rounding error.
_ROUNDING = 1e-7


def fill_by_trapezoid(losses: np.ndarray, products: np.ndarray) -> np.ndarray:
    """Fill in the inner products of gradients and rows that could not be computed when the gradient was taken.

    The gradient at a row is taken once and then multiplied with the rows of the window at that time, so that products
    with later rows are missing. For row i older than row j the trapezoid rule, exact for a quadratic, gives them::

        L_j - L_i = (g_i + g_j) . (theta_j - theta_i) / 2
        =>  G[i,j] = 2 (L_j - L_i) + G[i,i] - G[j,j] + G[j,i]

    Args:
        losses: losses of the rows, shape ``(k,)``, oldest first.
        products: ``G[i, j] = <gradient at row i, row j>``, shape ``(k, k)``, nan where unknown (``j > i``).

    Returns:
        The products, shape ``(k, k)``, without nan.
    """
    own = np.diag(products)
    filled = 2.0 * (losses[None, :] - losses[:, None]) + own[:, None] - own[None, :] + products.T
    return np.where(np.isnan(products), filled, products)


def trajectory_quadratic(losses: np.ndarray, products: np.ndarray, axes: PrincipalAxes) -> Quadratic:
    """The quadratic in the window's principal axes that fits the gradients at its rows; exact for a quadratic loss.

    If the loss is quadratic, the gradient at a merge is the same merge of the rows' gradients. So in merge weights the
    gradient at the uniform average is the mean of ``products`` over its rows, and the Hessian is ``products`` itself,
    as a bilinear form on directions that keep the sum of the weights. Its symmetric part is taken, and eigenvalues that
    are not positive are raised.

    Args:
        losses: losses of the rows, shape ``(k,)``, nats per token.
        products: ``G[i, j] = <gradient at row i, row j>`` without nan, shape ``(k, k)``. A constant added to all
            entries of one of its rows changes nothing.
        axes: the principal axes of the window.
    """
    hessian = axes.axes.T @ products @ axes.axes
    values, vectors = np.linalg.eigh((hessian + hessian.T) / 2.0)
    lifted = np.maximum(values, max(_SMALLEST_CURVATURE * float(values[-1]), np.finfo(float).tiny))
    model = Quadratic(0.0, axes.axes.T @ products.mean(axis=0), (vectors * lifted) @ vectors.T)
    rows = [axes.to_point(row) for row in np.eye(len(losses))]
    constant = float(np.mean([loss - model.value(row) for loss, row in zip(losses, rows, strict=True)]))
    return replace(model, constant=constant)


class TrajectorySearch(Search):
    """Quadratic programming on the trajectory surrogate, then quasi-Newton steps from the candidates evaluated.

    1. Rows are evaluated alone with their gradients, newest first, as the budget allows; what was measured is kept in
       ``problem.memory`` as long as the row is in the window. Rows without a gradient get weight 0.
    2. :func:`trajectory_quadratic` of these rows gives the first model.
    3. The model's minimum is evaluated with its gradient, which updates its Hessian (BFGS), and so on, until the
       expected fall of the loss is below the standard error of the difference or the budget is spent.

    With several domains the weighted mean of their losses is modelled.

    Args:
        problem: the merge's problem, with its Gram matrix.
        space: "affine" or "simplex".
        bounds: smallest and largest weight; by default (-1, 2) and (0, 1).

    Raises:
        ValueError: as :func:`.space.check_space`.
    """

    needs_gradients = True

    def __init__(self, problem: Problem, *, space: str = "affine", bounds: tuple[float, float] | None = None) -> None:
        super().__init__(problem)
        self._bounds = check_space(space, bounds)
        self._budget = float(problem.evaluations)
        # For each row measured, by name: its loss, and its gradient's products with the rows of that time, by name too.
        known = problem.memory.get("rows", {})
        self._rows = problem.memory["rows"] = {key: row for key, row in known.items() if key in problem.names}
        unknown = [name for name in reversed(problem.names) if name not in self._rows]
        # One pass is kept for a candidate.
        self._unknown = unknown[: max(0, int((self._budget - 1) // GRADIENT_COST))]
        self._axes: PrincipalAxes | None = None
        self._next: np.ndarray | None = None
        self.wants_gradient = True
        if not self._unknown:
            self._begin()

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Raise a ValueError for an unknown space or wrong bounds."""
        check_space(**options)

    def ask(self) -> np.ndarray | None:
        if self._unknown:
            return self.problem.row(age=len(self.problem.names) - 1 - self.problem.names.index(self._unknown[0]))
        return self._next

    def tell(self, weights: np.ndarray, loss: float, observed: Observed) -> None:
        self._next = None
        if observed.gradients is None or not (np.isfinite(loss) and np.isfinite(observed.gradients).all()):
            self._unknown = []
            return
        gradient = np.tensordot(self.problem.objective.weights, observed.gradients, axes=1)
        self._budget -= GRADIENT_COST
        if self._unknown:
            loss = float(self.problem.objective.weights @ observed.losses)
            slopes = dict(zip(self.problem.names, gradient[-len(self.problem.names) :].tolist(), strict=True))
            self._rows[self._unknown.pop(0)] = {"loss": loss, "slopes": slopes}
            if not self._unknown:
                self._begin()
        else:
            self._refine(weights, loss, gradient, observed)

    def _begin(self) -> None:
        """Build the model from the rows whose gradients are known, and propose its minimum; nothing if they are < 2."""
        names = [name for name in self.problem.names if name in self._rows]
        assert self.problem.gram is not None
        if len(names) < 2:
            return
        self._members = [self.problem.size - len(self.problem.names) + self.problem.names.index(n) for n in names]
        self._axes = PrincipalAxes(self.problem.gram[np.ix_(self._members, self._members)])
        if self._axes.degenerate:
            return
        losses = np.array([self._rows[name]["loss"] for name in names])
        slopes = [self._rows[name]["slopes"] for name in names]
        products = np.array([[towards.get(name, np.nan) for name in names] for towards in slopes])
        self._model = trajectory_quadratic(losses, fill_by_trapezoid(losses, products), self._axes)
        self._best, self._best_loss = np.zeros(len(names) - 1), np.inf
        self._gradients: list[tuple[np.ndarray, np.ndarray]] = []
        self._propose()

    def _refine(self, weights: np.ndarray, loss: float, gradient: np.ndarray, observed: Observed) -> None:
        assert self._axes is not None
        assert observed.parts is not None
        point, slope = self._axes.to_point(weights[self._members]), self._axes.axes.T @ gradient[self._members]
        for other, there in self._gradients:
            self._model = _bfgs(self._model, point - other, slope - there)
        self._gradients.append((point, slope))
        if loss < self._best_loss:
            self._best, self._best_loss, self._best_slope = point, loss, slope
        # Let the model have the measured loss and gradient at the best candidate so far.
        best, hessian = self._best, self._model.hessian
        constant = self._best_loss - float(self._best_slope @ best) + 0.5 * float(best @ hessian @ best)
        self._model = Quadratic(constant, self._best_slope - hessian @ best, hessian)
        expected = self._propose()
        step = np.zeros(self.problem.size)
        step[self._members] = self._axes.axes @ (self._point - best)
        noise = observed.parts.stderr_along(step, self.problem.objective.domains)
        if self._budget < 1 or expected <= max(noise if np.isfinite(noise) else 0.0, _ROUNDING):
            self._next = None

    def _propose(self) -> float:
        """Make the model's minimum the next candidate; return the expected fall of the loss from the best one."""
        assert self._axes is not None
        self._point = best_point([self._model], Objective.single(0.0), self._axes, self._bounds, self._best)
        self._next = np.zeros(self.problem.size)
        self._next[self._members] = self._axes.to_weights(self._point)
        self.wants_gradient = self._budget >= GRADIENT_COST
        return self._model.value(self._best) - self._model.value(self._point)


def _bfgs(model: Quadratic, step: np.ndarray, change: np.ndarray) -> Quadratic:
    """The BFGS update: a Hessian with ``hessian @ step = change``, for a ``change`` of the gradient along ``step``.

    The model is returned as it is where the loss is not convex along the step.
    """
    curved = model.hessian @ step
    if not step @ change > 1e-12 * np.linalg.norm(step) * np.linalg.norm(change):
        return model
    gain = np.outer(change, change) / float(step @ change) - np.outer(curved, curved) / float(step @ curved)
    return replace(model, hessian=model.hessian + gain)
