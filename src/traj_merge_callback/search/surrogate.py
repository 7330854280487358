"""A search that takes gradients, in the principal axes of the window."""

from __future__ import annotations

import itertools

import numpy as np

from ..recipes import ema
from . import Problem
from .quadratic import Observation, Quadratic, posterior

# The window's extent along an axis is bounded from below, relative to the largest: flatter axes tell nothing.
_SMALLEST_EXTENT = 1e-6
# Hyperparameters tried: the curvature as the loss, in nats, it gives between live and the window's mean; and alpha.
_SCALES = np.geomspace(0.01, 100.0, 40)
_ALPHAS = (0.2, 0.4, 0.6, 0.8)
_ALPHA, _ALPHA_SPREAD = 0.6, 0.25
# Another gradient is worth its price while the model expects to gain more than this share of what has been gained.
_WORTH_A_GRADIENT = 0.03
_WEIGHT_BOUNDS = (-1.0, 2.0)


class SurrogateSearch:
    """Bayesian optimisation with gradients in the affine space of merge weights: a few evaluations, not dozens.

    One backward pass yields the gradient with respect to all merge weights: k numbers for about three forward passes.
    What makes two or three of them enough is the prior of the quadratic model they feed. In the principal axes of the
    window (eigenvectors of the rows' Gram matrix, with eigenvalues w) the Hessian of the held-out loss is nearly
    diagonal, with curvatures ``h (w / mean w)^-alpha``. This is an observation of ours on Llama and GPT-2 trajectories,
    not a law, so it only sets a prior mean: h and alpha are chosen by the evidence, and every entry of the Hessian by
    the losses and gradients seen (:func:`posterior`). Each candidate is the minimum of the posterior mean and is
    evaluated for real. When the model expects little more, one last candidate is evaluated without a gradient.

    Weights may be negative (extrapolation), between -1 and 2. The first candidate is the last merge's weights, or an
    EMA close to live at the first merge.

    Args:
        problem: the merge's problem, with its Gram matrix.
    """

    needs_gradients = True

    def __init__(self, problem: Problem) -> None:
        assert problem.gram is not None
        self._middle = np.full(problem.size, 1.0 / problem.size)
        # An orthonormal basis of the directions that keep the sum of the weights: all but the all-ones one.
        basis = np.linalg.svd(np.ones((1, problem.size)))[2][1:].T
        extents, axes = np.linalg.eigh(basis.T @ problem.gram @ basis)
        self._extents = np.maximum(extents, max(_SMALLEST_EXTENT * extents[-1], np.finfo(float).tiny))
        self._axes = basis @ axes / np.sqrt(self._extents)
        self._budget = problem.evaluations
        self._observations = [Observation(self._to_point(problem.row(age=0)), problem.live_loss)]
        self._next = ema(problem.size, decay=0.35) if problem.previous is None else problem.previous
        # Rows that are all equal leave nothing to search for.
        self._done = not extents[-1] > 0
        self.wants_gradient = self._budget >= 3

    def ask(self) -> np.ndarray | None:
        return None if self._done else self._next

    def tell(self, weights: np.ndarray, loss: float, gradient: np.ndarray | None = None) -> None:
        self._budget -= 1 if gradient is None else 3
        if gradient is None or not (np.isfinite(loss) and np.isfinite(gradient).all()):
            self._done = True
            return
        self._observations.append(Observation(self._to_point(weights), loss, self._axes.T @ gradient))
        best = min(self._observations, key=lambda observation: observation.loss)
        point, expected = self._fit(best.point).minimum(best.point)
        self._next = self._within_bounds(best.point, point)
        gained = self._observations[0].loss - best.loss
        self.wants_gradient = self._budget >= 4 and expected > _WORTH_A_GRADIENT * gained
        self._done = self._budget < 1

    def _fit(self, center: np.ndarray) -> Quadratic:
        live = self._observations[0].point

        def fit(scale: float, alpha: float) -> tuple[float, Quadratic]:
            relative = (self._extents / self._extents.mean()) ** -alpha
            curvatures = scale / float(relative @ np.square(live)) * relative
            found = posterior(self._observations, curvatures, center)
            return found.log_evidence - 0.5 * ((alpha - _ALPHA) / _ALPHA_SPREAD) ** 2, found

        return max(itertools.starmap(fit, itertools.product(_SCALES, _ALPHAS)), key=lambda found: found[0])[1]

    def _to_point(self, weights: np.ndarray) -> np.ndarray:
        # Undoes the scaling of the axes, which are orthogonal.
        return (self._axes * self._extents).T @ (weights - self._middle)

    def _within_bounds(self, start: np.ndarray, point: np.ndarray) -> np.ndarray:
        """The weights at ``point``, drawn back towards ``start`` as far as the bounds demand."""
        origin = self._middle + self._axes @ start
        step = self._axes @ (point - start)
        with np.errstate(divide="ignore", invalid="ignore"):
            room = np.where(step > 0, _WEIGHT_BOUNDS[1] - origin, _WEIGHT_BOUNDS[0] - origin) / step
        share = min(1.0, float(np.nanmin(np.where(step == 0, 1.0, room))))
        return origin + max(share, 0.0) * step
