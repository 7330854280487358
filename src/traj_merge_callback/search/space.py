"""The space of merge weights: its bounds, its principal axes as coordinates, and the best point within bounds."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize

from .objective import Objective
from .quadratic import Quadratic

_BOUNDS = {"affine": (-1.0, 2.0), "simplex": (0.0, 1.0)}
# Extents are raised to at least this share of the largest one; along flatter axes the rows differ by rounding errors.
_SMALLEST_EXTENT = 1e-6
# SLSQP stops when the scaled objective (see best_point) changes by less.
_PRECISION = 1e-12


def check_space(space: str = "affine", bounds: tuple[float, float] | None = None) -> tuple[float, float]:
    """The smallest and the largest weight allowed in a space of merge weights.

    Args:
        space: "affine": weights may be negative (extrapolation); "simplex": they are not.
        bounds: smallest and largest weight; by default (-1, 2) for "affine" and (0, 1) for "simplex".

    Raises:
        ValueError: an unknown space, or bounds that exclude a single row alone, whose weights are 0 and 1.
    """
    if space not in _BOUNDS:
        raise ValueError(f"space={space!r} is not one of {sorted(_BOUNDS)}")
    low, high = _BOUNDS[space] if bounds is None else (float(bounds[0]), float(bounds[1]))
    if not low <= 0.0 < 1.0 <= high or (space == "simplex" and (low, high) != (0.0, 1.0)):
        raise ValueError(f"bounds={bounds}: must include 0 and 1, and space='simplex' has bounds of its own, (0, 1)")
    return low, high


class PrincipalAxes:
    """Whitened coordinates ``z`` of merge weights that sum to 1: ``weights = middle + axes @ z``.

    The axes are eigenvectors of the rows' centred Gram matrix, scaled so that the Euclidean distance between two points
    is the distance between the parameters of the two merges.

    Args:
        gram: inner products of the rows' differences to one of them, shape ``(k, k)``.

    Attributes:
        middle: the uniform average, shape ``(k,)``.
        axes: directions in merge weights, shape ``(k, k - 1)``; entries of a direction sum to 0.
        extents: sum of the rows' squared coordinates along each axis, shape ``(k - 1,)``, ascending.
        degenerate: whether all rows are equal.
    """

    def __init__(self, gram: np.ndarray) -> None:
        size = len(gram)
        self.middle = np.full(size, 1.0 / size)
        # An orthonormal basis of the directions that keep the sum of the weights: the complement of (1, ..., 1).
        basis = np.linalg.svd(np.ones((1, size)))[2][1:].T
        extents, vectors = np.linalg.eigh(basis.T @ gram @ basis)
        self.degenerate = not extents[-1] > 0
        self.extents = np.maximum(extents, max(_SMALLEST_EXTENT * extents[-1], np.finfo(float).tiny))
        self.axes = basis @ vectors / np.sqrt(self.extents)

    def to_point(self, weights: np.ndarray) -> np.ndarray:
        """Coordinates of merge weights, shape ``(k - 1,)``."""
        # The columns of axes are orthogonal with squared norm 1 / extents, so this is the pseudo-inverse of axes.
        return (self.axes * self.extents).T @ (weights - self.middle)

    def to_weights(self, point: np.ndarray) -> np.ndarray:
        """Merge weights at a point, shape ``(k,)``."""
        return self.middle + self.axes @ point

    def curvatures(self, alpha: float) -> np.ndarray:
        """Relative curvatures of the loss along the axes, ``(w / mean w)^-alpha`` for extents w, shape ``(k - 1,)``.

        The power law is what to expect, an observation of ours: see :class:`.surrogate.SurrogateSearch`.
        """
        return (self.extents / self.extents.mean()) ** -alpha


def within_bounds(weights: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    """The nearest merge weights, in Euclidean distance, that lie within the bounds, shape ``(k,)``.

    Weights carried over from an earlier merge leave them by rounding, or where two rows have become one.

    Args:
        weights: shape ``(k,)``, with a sum of 1.
        bounds: smallest and largest weight; see :func:`check_space`.
    """
    low, high = bounds
    if low <= weights.min() and weights.max() <= high:
        return weights
    # All weights are shifted alike and those that leave the bounds are cut off: the sum grows with the shift.
    least, most = low - weights.max(), high - weights.min()
    for _ in range(100):
        shift = (least + most) / 2.0
        least, most = (shift, most) if np.clip(weights + shift, low, high).sum() < 1.0 else (least, shift)
    return np.clip(weights + most, low, high)


def best_point(
    models: list[Quadratic],
    objective: Objective,
    axes: PrincipalAxes,
    bounds: tuple[float, float],
    start: np.ndarray,
) -> np.ndarray:
    """The point, shape ``(d,)``, where the objective of the modelled losses is lowest, with weights within bounds.

    A convex program, solved by sequential quadratic programming (SciPy's SLSQP). The weighted mean is minimised
    directly; the worst rise over live as the smallest ``t`` with ``rise <= t`` for every component. A tolerance is one
    more constraint for each component.

    Args:
        models: one for the loss of each component of the objective, over points of shape ``(d,)``.
        objective: what is minimised.
        axes: the map between points and merge weights.
        bounds: smallest and largest weight.
        start: the solver's first point, shape ``(d,)``.
    """
    low, high = bounds
    if len(models) == 1 and not objective.worst:
        # If the unconstrained minimum is within bounds, it is the answer.
        point = models[0].minimum()
        weights = axes.to_weights(point)
        if low <= weights.min() and weights.max() <= high:
            return point
    size = len(start)
    mean_hessian = np.tensordot(objective.weights, np.array([model.hessian for model in models]), axes=1)
    # SLSQP works on u, with point = start + scale * u, and on losses in units of unit**2: curvatures, steps and the
    # expected gain are then all about 1, as its absolute tolerance requires.
    scale = 1.0 / np.sqrt(np.diag(mean_hessian))
    slope = scale * np.tensordot(objective.weights, np.array([model.gradient(start) for model in models]), axes=1)
    unit = max(float(np.linalg.norm(slope)), 1e-6)
    scale = scale * unit

    def point_of(u: np.ndarray) -> np.ndarray:
        return start + scale * u[:size]

    def rises(u: np.ndarray) -> np.ndarray:
        values = np.array([model.value(point_of(u)) for model in models])
        return (values - objective.live) / unit**2

    def rise_gradients(u: np.ndarray) -> np.ndarray:
        return np.array([model.gradient(point_of(u)) * scale for model in models]) / unit**2

    # The bounds as linear constraints: inside + slopes @ u >= 0.
    room = axes.axes * scale
    inside = np.concatenate([axes.to_weights(start) - low, high - axes.to_weights(start)])
    slopes = np.concatenate([room, -room])
    if objective.worst:  # u has one more entry, t
        first = np.concatenate([np.zeros(size), [rises(np.zeros(size)).max()]])
        slopes = np.concatenate([slopes, np.zeros((len(slopes), 1))], axis=1)
        cost = {"fun": lambda u: u[-1], "jac": lambda u: np.eye(size + 1)[-1]}
        column = np.ones((len(models), 1))
        limits = [
            {
                "type": "ineq",
                "fun": lambda u: u[-1] - rises(u),
                "jac": lambda u: np.concatenate([-rise_gradients(u), column], axis=1),
            }
        ]
    else:
        first = np.zeros(size)
        cost = {"fun": lambda u: objective.weights @ rises(u), "jac": lambda u: objective.weights @ rise_gradients(u)}
        limits = []
    limits.append({"type": "ineq", "fun": lambda u: inside + slopes @ u, "jac": lambda u: slopes})
    if objective.tolerance is not None:
        extra = np.zeros((len(models), len(first) - size))
        limits.append(
            {
                "type": "ineq",
                "fun": lambda u: objective.tolerance / unit**2 - rises(u),
                "jac": lambda u: np.concatenate([-rise_gradients(u), extra], axis=1),
            }
        )
    found = minimize(x0=first, method="SLSQP", constraints=limits, options={"maxiter": 200, "ftol": _PRECISION}, **cost)
    return point_of(found.x) if np.isfinite(found.x).all() else start
