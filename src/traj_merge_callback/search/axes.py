"""Principal axes of a window: coordinates in which merges are points and the held-out loss is nearly separable."""

from __future__ import annotations

import numpy as np

# The window's extent along an axis is bounded from below, relative to the largest: flatter axes tell nothing.
_SMALLEST_EXTENT = 1e-6


class PrincipalAxes:
    """Whitened coordinates ``z`` of merge weights that sum to 1: ``weights = middle + axes @ z``.

    The axes are eigenvectors of the rows' centred Gram matrix; ``|z|`` is the distance between two merges' parameters.

    Args:
        gram: inner products of the rows' deltas to one of them, shape ``(k, k)``.

    Attributes:
        middle: the uniform average, shape ``(k,)``.
        axes: shape ``(k, k - 1)``.
        extents: sum of the rows' squared coordinates along each axis, shape ``(k - 1,)``.
        degenerate: whether all rows are equal.
    """

    def __init__(self, gram: np.ndarray) -> None:
        size = len(gram)
        self.middle = np.full(size, 1.0 / size)
        # An orthonormal basis of the directions that keep the sum of the weights: all but the all-ones one.
        basis = np.linalg.svd(np.ones((1, size)))[2][1:].T
        extents, vectors = np.linalg.eigh(basis.T @ gram @ basis)
        self.degenerate = not extents[-1] > 0
        self.extents = np.maximum(extents, max(_SMALLEST_EXTENT * extents[-1], np.finfo(float).tiny))
        self.axes = basis @ vectors / np.sqrt(self.extents)

    def to_point(self, weights: np.ndarray) -> np.ndarray:
        """Coordinates of merge weights, shape ``(k - 1,)``."""
        # Undoes the scaling of the axes, which are orthogonal.
        return (self.axes * self.extents).T @ (weights - self.middle)

    def to_weights(self, point: np.ndarray) -> np.ndarray:
        """Merge weights at a point, shape ``(k,)``."""
        return self.middle + self.axes @ point

    def curvatures(self, alpha: float) -> np.ndarray:
        """The shape of the prior's curvatures, ``(w / mean w)^-alpha`` for extents w, shape ``(k - 1,)``."""
        return (self.extents / self.extents.mean()) ** -alpha
