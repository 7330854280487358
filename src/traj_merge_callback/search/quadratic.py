"""A Bayesian quadratic model of a loss, fitted to losses and gradients at a few points.

Everywhere d is the number of coordinates of a point, n the number of observed numbers (a loss counts 1, a gradient d)
and c = 1 + d + d (d + 1) / 2 the number of coefficients of a quadratic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Prior standard deviation of a diagonal entry of the Hessian, relative to its prior mean, and of an off-diagonal one,
# relative to the geometric mean of the two diagonal entries' prior means.
_CURVATURE_SPREAD, _COUPLING_SPREAD = 0.5, 0.08
# The covariance of the mean gradient over n tokens is about NOISE_PER_TOKEN * Hessian / n. With independent tokens the
# factor would be 1 (the Hessian of a negative log-likelihood is the covariance of its gradients, the Fisher
# information); tokens of a sequence are not independent. Measured: 1 to 2.
NOISE_PER_TOKEN = 2.0
# Standard deviation of the third-order term, in nats, at a point where the prior's quadratic term is 1/2 nat.
_CUBIC = 0.3
# Standard deviation of the rounding error of a loss, in nats, and of a gradient, relative to the root of the curvature.
_ROUNDING = 1e-5
# Eigenvalues of the Hessian relative to the prior's curvatures are raised to at least this: along a direction that
# noise makes too flat, a Newton step would be far too long.
_FLATTEST = 0.15


@dataclass(frozen=True)
class Observation:
    """A loss at a point, with or without its gradient there.

    Args:
        point: shape ``(d,)``.
        loss: in nats.
        gradient: shape ``(d,)``.
        noise: the factor, in nats, that the Hessian is multiplied by to give the covariance of the gradient's error.
    """

    point: np.ndarray
    loss: float
    gradient: np.ndarray | None = None
    noise: float = 0.0


@dataclass(frozen=True)
class Quadratic:
    """``L(z) = constant + slope . z + z' hessian z / 2``, with a positive definite Hessian.

    Args:
        constant: in nats.
        slope: shape ``(d,)``.
        hessian: shape ``(d, d)``, symmetric.
    """

    constant: float
    slope: np.ndarray
    hessian: np.ndarray

    def value(self, point: np.ndarray) -> float:
        """``L(point)``, in nats."""
        return float(self.constant + self.slope @ point + 0.5 * point @ self.hessian @ point)

    def gradient(self, point: np.ndarray) -> np.ndarray:
        """The gradient at a point, shape ``(d,)``."""
        return self.slope + self.hessian @ point

    def minimum(self) -> np.ndarray:
        """The point of lowest loss, shape ``(d,)``."""
        try:
            return -np.linalg.solve(self.hessian, self.slope)
        except np.linalg.LinAlgError:  # curvatures too far apart for rounding: the nearest of the lowest points
            return -np.linalg.pinv(self.hessian, hermitian=True) @ self.slope


@dataclass(frozen=True)
class Prior:
    """A Gaussian over quadratics with independent coefficients, whose mean Hessian is diagonal.

    Args:
        curvatures: prior means of the Hessian's diagonal, shape ``(d,)``, positive.
        slopes: prior variances of the slope, shape ``(d,)``; its mean is 0.
    """

    curvatures: np.ndarray
    slopes: np.ndarray


@dataclass(frozen=True)
class Posterior:
    """A Gaussian over the coefficients of a quadratic: its constant, slope and the upper triangle of its Hessian.

    Args:
        mean: shape ``(c,)``.
        variance: prior variances, shape ``(c,)``.
        gain: reduction of the covariance by the observations, shape ``(n, c)``: it is
            ``diag(variance) - gain.T @ gain``.
        curvatures: prior means of the Hessian's diagonal, shape ``(d,)``.
        log_evidence: log probability of the observations under the prior, up to a constant.
    """

    mean: np.ndarray
    variance: np.ndarray
    gain: np.ndarray
    curvatures: np.ndarray
    log_evidence: float

    def samples(self, count: int, rng: np.random.Generator) -> list[Quadratic]:
        """Independent draws from the posterior."""
        deviation = np.sqrt(self.variance)
        # With coefficients divided by their prior deviations the covariance is 1 - G'G. Its symmetric square root has
        # the right singular vectors of G as eigenvectors, with eigenvalues sqrt(1 - s^2) for singular values s.
        relative = np.divide(self.gain, deviation, out=np.zeros_like(self.gain), where=deviation > 0)
        _, values, vectors = np.linalg.svd(relative, full_matrices=False)
        shrink = 1.0 - np.sqrt(np.maximum(1.0 - np.square(values), 0.0))
        noise = rng.normal(size=(count, len(self.mean)))
        noise -= (noise @ vectors.T * shrink) @ vectors
        return [quadratic(self.mean + deviation * one, self.curvatures) for one in noise]


def quadratic(coefficients: np.ndarray, curvatures: np.ndarray) -> Quadratic:
    """The quadratic with these coefficients, its Hessian made positive definite.

    Eigenvalues of the Hessian relative to ``diag(curvatures)`` are raised to ``_FLATTEST``.

    Args:
        coefficients: constant, slope and upper triangle of the Hessian, shape ``(c,)``.
        curvatures: prior means of the Hessian's diagonal, shape ``(d,)``.
    """
    size = len(curvatures)
    upper = np.zeros((size, size))
    upper[np.triu_indices(size)] = coefficients[1 + size :]
    scale = np.sqrt(curvatures)
    relative = (upper + upper.T - np.diag(np.diag(upper))) / np.outer(scale, scale)
    values, vectors = np.linalg.eigh(relative)
    relative = (vectors * np.maximum(values, _FLATTEST)) @ vectors.T
    return Quadratic(float(coefficients[0]), coefficients[1 : 1 + size], relative * np.outer(scale, scale))


def design(observations: list[Observation]) -> np.ndarray:
    """The design matrix, shape ``(n, c)``: the observed numbers of a quadratic are this times its coefficients."""
    size = len(observations[0].point)
    rows, columns = np.triu_indices(size)
    diagonal = rows == columns
    direction = np.arange(size)[:, None]
    features = []
    for observation in observations:
        z = observation.point
        features.append(np.concatenate([[1.0], z, np.where(diagonal, 0.5, 1.0) * z[rows] * z[columns]])[None])
        if observation.gradient is not None:
            derivatives = (direction == rows) * z[columns] + ((direction == columns) & ~diagonal) * z[rows]
            features.append(np.concatenate([np.zeros((size, 1)), np.eye(size), derivatives], axis=1))
    return np.concatenate(features)


def posterior(observations: list[Observation], prior: Prior, center: np.ndarray, matrix: np.ndarray) -> Posterior:
    """Exact Gaussian conditioning (Bayesian linear regression on the quadratic's coefficients).

    The loss is not exactly quadratic, so that observations far from ``center`` are given more noise: the deviation that
    a third-order term could cause, which grows with the cube of the distance (for gradients with its square).

    Args:
        observations: at least one.
        prior: the prior over quadratics.
        center: the point around which the quadratic should be most accurate, shape ``(d,)``.
        matrix: ``design(observations)``, which callers compute once for many priors.
    """
    curvatures = prior.curvatures
    size = len(curvatures)
    rows, columns = np.triu_indices(size)
    diagonal = rows == columns
    spread = np.where(diagonal, _CURVATURE_SPREAD * curvatures[rows], 0.0)
    spread += np.where(diagonal, 0.0, _COUPLING_SPREAD * np.sqrt(curvatures[rows] * curvatures[columns]))
    mean = np.concatenate([[observations[0].loss], np.zeros(size), np.where(diagonal, curvatures[rows], 0.0)])
    variance = np.concatenate([[1.0], prior.slopes, np.square(spread)])

    targets, noise = [], []
    for observation in observations:
        z = observation.point
        away = float((curvatures * np.square(z - center)).sum())
        # Only differences between losses matter, so that a loss has the noise of its difference to the first one: that
        # of the gradient along the line between the two points.
        between = float((curvatures * np.square(z - observations[0].point)).sum())
        targets.append([observation.loss])
        noise.append([_ROUNDING**2 + (_CUBIC * away**1.5) ** 2 + observation.noise * between])
        if observation.gradient is not None:
            targets.append(list(observation.gradient))
            noise.append(list((_ROUNDING**2 + (_CUBIC * away) ** 2 + observation.noise) * curvatures))
    residual = np.concatenate(targets) - matrix @ mean
    covariance = (matrix * variance) @ matrix.T + np.diag(np.concatenate(noise))
    factor = np.linalg.cholesky(covariance + 1e-13 * np.trace(covariance) / len(covariance) * np.eye(len(covariance)))
    whitened = np.linalg.solve(factor, residual)
    gain = np.linalg.solve(factor, matrix * variance)
    log_evidence = -0.5 * float(whitened @ whitened) - float(np.log(np.diag(factor)).sum())
    return Posterior(mean + gain.T @ whitened, variance, gain, curvatures, log_evidence)
