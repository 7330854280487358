"""Merge weights of its own for each parameter group: gradient descent from the best weights of the whole model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .evaluation import Gradient
from .problem import GRADIENT_COST, Observed, Problem, Search
from .quadratic import NOISE_PER_TOKEN
from .space import PrincipalAxes

# Exponent of the power law of curvatures within a group (PrincipalAxes.curvatures).
_ALPHA = 0.6
# Length of the first step along a direction, relative to the Newton step of a loss to which each group adds separately.
_FIRST_STEP = 0.2


class GroupedSearch(Search):
    """Descent from the best weights of the whole model in the space of one weight vector per parameter group.

    There are more weights to choose than for the whole model, by the number of groups, on the same held-out data, so
    that most of the gradient can be noise. Three evaluations make a step; steps go on while they lower the loss and the
    budget allows:

    1. The gradient at the best weights so far. The direction is the Newton direction of a Hessian that is diagonal in
       each group's principal axes, with the curvatures of :meth:`.space.PrincipalAxes.curvatures`. Their scale in a
       group comes from the variance of the gradient between parts of the search split, as the Hessian of a negative
       log-likelihood is the covariance of its gradients. The same variance gives the share of the gradient that is
       signal, ``1 - noise / |gradient|^2`` (James and Stein's factor, with norms in the inverse Hessian), by which the
       step is shrunk; at 0 the search ends.
    2. The loss after a short step along the direction.
    3. The loss at the minimum of the parabola through the slope and the two losses, or at the full step if that is
       nearer.

    Args:
        problem: with Gram matrices of shape ``(groups, size, size)``.
        start: best weights of the whole model, shape ``(size,)``.
        rows: at least two rows, by index, whose weights may change, those of the others stay; None: all.

    Attributes:
        cost: of one step, in forward passes.
    """

    needs_gradients = True
    cost = GRADIENT_COST + 2

    def __init__(self, problem: Problem, start: np.ndarray, rows: Sequence[int] | None = None) -> None:
        super().__init__(problem)
        assert problem.gram is not None
        self._objective = problem.objective
        self._rows = list(range(problem.size) if rows is None else rows)
        self._axes = [PrincipalAxes(gram[np.ix_(self._rows, self._rows)]) for gram in problem.gram]
        self._best = np.tile(start, (len(problem.gram), 1))
        self._best_loss = np.inf
        self._begin()

    def _begin(self) -> None:
        """Begin a step: ask for the gradient at the best weights so far."""
        self._start = self._best
        self._next: np.ndarray | None = self._best
        self._tried = 0
        self.wants_gradient = True

    def ask(self) -> np.ndarray | None:
        return self._next

    def tell(self, weights: np.ndarray, loss: float, observed: Observed) -> None:
        self._next = None
        if not np.isfinite(loss):
            return
        if loss < self._best_loss:
            self._best, self._best_loss = weights, loss
        if observed.parts is not None:
            self.wants_gradient = False
            self._loss = loss
            parts = observed.parts.on_rows(self._rows)
            if not np.isfinite(parts.sums).all():
                return
            self._direction, self._slope, self._signal = self._aim(parts)
            if self._slope < 0.0 < self._signal:
                self._next = self._at(_FIRST_STEP)
            return
        self._tried += 1
        if self._tried == 1:
            # The minimum of the parabola through the loss and the slope at the start and the loss at the first step.
            first = _FIRST_STEP * self._signal
            bend = loss - self._loss - self._slope * first
            best = -self._slope * first**2 / (2.0 * bend) if bend > 0.0 else np.inf
            self._next = self._at(min(best, 1.0))
        elif self._best_loss < self._loss:
            self._begin()

    def _at(self, length: float) -> np.ndarray:
        return self._start + self._signal * length * self._direction

    def _aim(self, parts: Gradient) -> tuple[np.ndarray, float, float]:
        """The direction of descent, ``(groups, size)``, the slope along it, and the gradient's share of signal."""
        gradient = np.tensordot(self._objective.weights, self._objective.gradients(parts), axes=1)
        steps, power, noise = [], 0.0, 0.0
        for group, axes in enumerate(self._axes):
            shape = axes.curvatures(_ALPHA)
            variances = parts.variance(group, axes.axes)
            curvatures = shape * float(np.mean(variances / shape)) * self._objective.tokens.sum() / NOISE_PER_TOKEN
            if axes.degenerate or not curvatures.min() > 0.0:
                # The group's rows are all equal, its gradient is 0, or no domain has two parts to take a variance of.
                steps.append(np.zeros_like(axes.middle))
                continue
            slopes = axes.axes.T @ gradient[group]
            steps.append(axes.axes @ (-slopes / curvatures))
            power += float(np.square(slopes) @ (1.0 / curvatures))
            noise += float(variances @ (1.0 / curvatures))
        direction = np.zeros_like(self._best)
        direction[:, self._rows] = steps
        slope = float((gradient * np.array(steps)).sum())
        return direction, slope, max(0.0, 1.0 - noise / power) if power > 0.0 else 0.0
