"""Merge weights for each parameter group: gradient descent from the best weights of the whole model."""

from __future__ import annotations

import numpy as np

from .problem import Observed, Problem, Search
from .quadratic import NOISE_PER_TOKEN
from .space import PrincipalAxes

_ALPHA = 0.6
# The first step tried along the direction, as a share of what would be right if groups did not depend on each other.
_FIRST_STEP = 0.2


class GroupedSearch(Search):
    """Descent from the best weights of the whole model in the space of one weight vector per parameter group.

    There are groups times as many weights to choose and no more held-out data to choose them by: most of the gradient
    can be noise. So each step is shrunk by the share of the gradient that is (James and Stein's factor
    ``1 - noise / |gradient|^2``, both in units of the Hessian, the noise from the gradient's variance between parts of
    the search split), and the descent ends where nothing but noise is left. That variance, within each group, also
    gives the group's curvature: for the Hessian of a log-likelihood is the covariance of its gradients. How far to go
    along a direction follows from one evaluation on it and the slope at its beginning; the candidate there costs one
    more. A step takes 5 forward passes in all; there are as many as the budget allows.

    Args:
        problem: with Gram matrices of shape ``(groups, size, size)``.
        start: best weights of the whole model, shape ``(size,)``.
    """

    needs_gradients = True
    # Of one step.
    cost = 5

    def __init__(self, problem: Problem, start: np.ndarray) -> None:
        assert problem.gram is not None
        self._objective = problem.objective
        self._axes = [PrincipalAxes(gram) for gram in problem.gram]
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
        if observed.gradients is not None:
            self.wants_gradient = False
            self._loss = loss
            self._direction, self._slope, self._signal = self._aim(observed)
            if self._slope < 0.0 < self._signal:
                self._next = self._at(_FIRST_STEP)
            return
        self._tried += 1
        if self._tried == 1:
            # The parabola through the loss and the slope at the start and the loss at the first step.
            first = _FIRST_STEP * self._signal
            bend = loss - self._loss - self._slope * first
            best = -self._slope * first**2 / (2.0 * bend) if bend > 0.0 else np.inf
            self._next = self._at(min(best, 1.0))
        elif self._best_loss < self._loss:
            self._begin()

    def _at(self, length: float) -> np.ndarray:
        return self._start + self._signal * length * self._direction

    def _aim(self, observed: Observed) -> tuple[np.ndarray, float, float]:
        """The direction of descent, the slope along it, and the share of the gradient that is signal."""
        parts = observed.parts
        assert parts is not None
        assert observed.gradients is not None
        gradient = np.tensordot(self._objective.weights, observed.gradients, axes=1)
        steps, power, noise = [], 0.0, 0.0
        for group, axes in enumerate(self._axes):
            shape = axes.curvatures(_ALPHA)
            variances = parts.variance(group, axes.axes)
            curvatures = shape * float(np.mean(variances / shape)) * self._objective.tokens.sum() / NOISE_PER_TOKEN
            if axes.degenerate or not curvatures.min() > 0.0:
                # Parameters that never move or do not matter, or too few data to tell.
                steps.append(np.zeros_like(axes.middle))
                continue
            slopes = axes.axes.T @ gradient[group]
            steps.append(axes.axes @ (-slopes / curvatures))
            power += float(np.square(slopes) @ (1.0 / curvatures))
            noise += float(variances @ (1.0 / curvatures))
        direction = np.array(steps)
        return direction, float((gradient * direction).sum()), max(0.0, 1.0 - noise / power) if power > 0.0 else 0.0
