"""A Bayesian quadratic model of a loss, from losses and gradients at a few points."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Prior spread of a curvature, as a share of its prior mean, and of the coupling of two directions.
_CURVATURE_SPREAD, _COUPLING_SPREAD = 0.5, 0.08
# How far the true loss may be from any quadratic, in nats, at a point that is 1 nat away from the center.
_CUBIC = 0.3
# Rounding of a loss, in nats, and of a gradient, in the same unit per unit step.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Observation:
    """A loss at a point, and its gradient there if it was taken; points and gradients of shape ``(d,)``."""

    point: np.ndarray
    loss: float
    gradient: np.ndarray | None = None


@dataclass(frozen=True)
class Quadratic:
    """``L(z) = constant + slope . z + z' hessian z / 2``: a posterior mean.

    Args:
        slope: shape ``(d,)``.
        hessian: shape ``(d, d)``, symmetric.
        curvatures: prior mean of the Hessian's diagonal, shape ``(d,)``, positive.
        log_evidence: log probability of the observations under the prior, up to a constant.
    """

    slope: np.ndarray
    hessian: np.ndarray
    curvatures: np.ndarray
    log_evidence: float

    def minimum(self, start: np.ndarray) -> tuple[np.ndarray, float]:
        """The Newton step from ``start``, and by how much the model expects the loss to fall."""
        scale = 1.0 / np.sqrt(self.curvatures)
        values, vectors = np.linalg.eigh(scale[:, None] * self.hessian * scale)
        gradient = vectors.T @ (scale * (self.slope + self.hessian @ start))
        # No direction is taken to be much flatter than the prior says: noise would send the step far away.
        values = np.maximum(values, 0.15)
        return start - scale * (vectors @ (gradient / values)), 0.5 * float(np.square(gradient) @ (1.0 / values))


def posterior(observations: list[Observation], curvatures: np.ndarray, center: np.ndarray) -> Quadratic:
    """The quadratic's posterior mean by exact Gaussian conditioning (Bayesian linear regression on its coefficients).

    A priori the Hessian is diagonal with ``curvatures`` as mean; entries are independent. An observation counts the
    less the farther it is from ``center``, because the loss is no quadratic: a third-order term of unknown sign is
    allowed for, which grows with the cube of the distance (with its square for gradients).

    Args:
        observations: at least one.
        curvatures: prior means of the Hessian's diagonal, shape ``(d,)``, positive.
        center: where the model should be right, shape ``(d,)``.
    """
    size = len(curvatures)
    rows, columns = np.triu_indices(size)
    diagonal = rows == columns
    spread = np.where(diagonal, _CURVATURE_SPREAD * curvatures[rows], 0.0)
    spread += np.where(diagonal, 0.0, _COUPLING_SPREAD * np.sqrt(curvatures[rows] * curvatures[columns]))
    mean = np.concatenate([[observations[0].loss], np.zeros(size), np.where(diagonal, curvatures[rows], 0.0)])
    variance = np.concatenate([[1.0], 10.0 * curvatures, np.square(spread)])

    features, targets, noise = [], [], []
    for observation in observations:
        z = observation.point
        away = float((curvatures * np.square(z - center)).sum())
        products = np.where(diagonal, 0.5, 1.0) * z[rows] * z[columns]
        features.append(np.concatenate([[1.0], z, products])[None])
        targets.append([observation.loss])
        noise.append([_ROUNDING**2 + (_CUBIC * away**1.5) ** 2])
        if observation.gradient is not None:
            direction = np.arange(size)[:, None]
            derivatives = (direction == rows) * z[columns] + ((direction == columns) & ~diagonal) * z[rows]
            features.append(np.concatenate([np.zeros((size, 1)), np.eye(size), derivatives], axis=1))
            targets.append(list(observation.gradient))
            noise.append(list((_ROUNDING**2 + (_CUBIC * away) ** 2) * curvatures))
    matrix = np.concatenate(features)
    residual = np.concatenate(targets) - matrix @ mean
    covariance = (matrix * variance) @ matrix.T + np.diag(np.concatenate(noise))
    factor = np.linalg.cholesky(covariance + 1e-13 * np.trace(covariance) / len(covariance) * np.eye(len(covariance)))
    whitened = np.linalg.solve(factor, residual)
    coefficients = mean + variance * (matrix.T @ np.linalg.solve(factor.T, whitened))
    upper = np.zeros((size, size))
    upper[rows, columns] = coefficients[1 + size :]
    log_evidence = -0.5 * float(whitened @ whitened) - float(np.log(np.diag(factor)).sum())
    hessian = upper + upper.T - np.diag(np.diag(upper))
    return Quadratic(coefficients[1 : 1 + size], hessian, curvatures, log_evidence)
