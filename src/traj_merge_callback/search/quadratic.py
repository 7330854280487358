"""A Bayesian quadratic model of a loss, from losses and gradients at a few points."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Prior spread of a curvature, as a share of its prior mean, and of the coupling of two directions.
_CURVATURE_SPREAD, _COUPLING_SPREAD = 0.5, 0.08
# The covariance of a mean gradient over n tokens is about this times the Hessian, over n: for the Hessian of a
# log-likelihood is the covariance of its gradients, and tokens of a sequence are not independent (measured: 1 to 2).
NOISE_PER_TOKEN = 2.0
# How far the true loss may be from any quadratic, in nats, at a point that is 1 nat away from the center.
_CUBIC = 0.3
# Rounding of a loss, in nats, and of a gradient, in the same unit per unit step.
_ROUNDING = 1e-5
# No direction is taken to be flatter than this share of what the prior says: noise would send a step far away.
_FLATTEST = 0.15


@dataclass(frozen=True)
class Observation:
    """A loss at a point, and its gradient there if it was taken.

    Args:
        point: shape ``(d,)``.
        loss: in nats.
        gradient: shape ``(d,)``.
        noise: covariance of the gradient's error, as a multiple of the Hessian, in nats.
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
        """The loss at a point."""
        return float(self.constant + self.slope @ point + 0.5 * point @ self.hessian @ point)

    def gradient(self, point: np.ndarray) -> np.ndarray:
        """Its gradient at a point, shape ``(d,)``."""
        return self.slope + self.hessian @ point

    def minimum(self) -> np.ndarray:
        """The point of lowest loss, shape ``(d,)``."""
        return -np.linalg.solve(self.hessian, self.slope)


@dataclass(frozen=True)
class Prior:
    """A Gaussian over quadratics whose Hessian is diagonal in the mean, with independent entries.

    Args:
        curvatures: means of the Hessian's diagonal, shape ``(d,)``, positive.
        slopes: variances of the slope, shape ``(d,)``.
    """

    curvatures: np.ndarray
    slopes: np.ndarray


@dataclass(frozen=True)
class Posterior:
    """A Gaussian over the coefficients of a quadratic: its constant, slope and the upper triangle of its Hessian.

    Args:
        mean: shape ``(c,)``.
        variance: prior variances, shape ``(c,)``.
        gain: what was learned, shape ``(n, c)``: the covariance is ``diag(variance) - gain.T @ gain``.
        curvatures: prior means of the Hessian's diagonal, shape ``(d,)``.
        log_evidence: log probability of the observations under the prior, up to a constant.
    """

    mean: np.ndarray
    variance: np.ndarray
    gain: np.ndarray
    curvatures: np.ndarray
    log_evidence: float

    def samples(self, count: int, rng: np.random.Generator) -> list[Quadratic]:
        """Quadratics drawn from the posterior."""
        deviation = np.sqrt(self.variance)
        # In units of the prior the covariance is 1 - G'G, whose root shares the right singular vectors of G.
        relative = np.divide(self.gain, deviation, out=np.zeros_like(self.gain), where=deviation > 0)
        _, values, vectors = np.linalg.svd(relative, full_matrices=False)
        shrink = 1.0 - np.sqrt(np.maximum(1.0 - np.square(values), 0.0))
        noise = rng.normal(size=(count, len(self.mean)))
        noise -= (noise @ vectors.T * shrink) @ vectors
        return [quadratic(self.mean + deviation * one, self.curvatures) for one in noise]


def quadratic(coefficients: np.ndarray, curvatures: np.ndarray) -> Quadratic:
    """The quadratic with these coefficients; directions much flatter than ``curvatures`` are made steeper."""
    size = len(curvatures)
    upper = np.zeros((size, size))
    upper[np.triu_indices(size)] = coefficients[1 + size :]
    scale = np.sqrt(curvatures)
    relative = (upper + upper.T - np.diag(np.diag(upper))) / np.outer(scale, scale)
    values, vectors = np.linalg.eigh(relative)
    relative = (vectors * np.maximum(values, _FLATTEST)) @ vectors.T
    return Quadratic(float(coefficients[0]), coefficients[1 : 1 + size], relative * np.outer(scale, scale))


def design(observations: list[Observation]) -> np.ndarray:
    """What each observed number is made of: its derivative by the coefficients of the quadratic, shape ``(n, c)``."""
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

    An observation counts the less the farther it is from ``center``, because the loss is no quadratic: a third-order
    term of unknown sign is allowed for, which grows with the cube of the distance (with its square for gradients).

    Args:
        observations: at least one.
        prior: of the quadratic.
        center: where the model should be right, shape ``(d,)``.
        matrix: the ``design`` of the observations, which is the same for every prior.
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
        # The differences between losses are what counts, and those have the noise of the slope between the points.
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
