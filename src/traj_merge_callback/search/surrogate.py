"""The default search: Bayesian optimisation with gradients, in the principal axes of the window."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .problem import GRADIENT_COST, Observed, Problem, Search
from .quadratic import NOISE_PER_TOKEN, Observation, Posterior, Prior, Quadratic, design, posterior, quadratic
from .recipes import ema
from .space import PrincipalAxes, best_point, check_space, within_bounds
from .spans import Span, average

# Grids and priors of the two hyperparameters. The scale h of the curvatures, expressed as twice the quadratic term of
# the loss between the uniform average and the newest row in nats, is log-normal around _SCALE; alpha is normal.
_SCALES = np.geomspace(0.002, 20.0, 25)
_SCALE, _SCALE_SPREAD = 0.14, 0.8
_ALPHAS = (0.2, 0.4, 0.6, 0.8)
_ALPHA, _ALPHA_SPREAD = 0.6, 0.25
# Quadratics drawn from the posterior to estimate the regret of a proposed point.
_DRAWS = 16
# A regret of more than this many standard errors is worth a gradient.
_CLEARLY = 2.0


class SurrogateSearch(Search):
    """Bayesian optimisation with gradients in the affine space of merge weights: a few evaluations, not dozens.

    One backward pass yields the gradient with respect to all merge weights: k numbers for about three forward passes.
    Two gradients are enough because of the prior of the quadratic model that they are fitted to. In the principal axes
    of the window (eigenvectors of the rows' Gram matrix, with eigenvalues w) the Hessian of the held-out loss is nearly
    diagonal, with curvatures ``h (w / mean w)^-alpha``. This is an observation of ours on Llama and GPT-2 trajectories,
    not a law, so it only sets the prior mean: the model is averaged over h and alpha, weighted by their evidence, and
    every entry of the Hessian is inferred from the losses and gradients observed (:func:`posterior`). Where these leave
    the curvature uncertain, its expectation is dominated by the large values that are possible, and steps are short.

    1. The first candidate is the last merge's weights (at the first merge an EMA close to live). It is evaluated with
       its gradient on one part of the search split only, which is enough to choose the second candidate.
    2. Every further candidate is the minimum of the expected loss, evaluated on the whole split.
    3. The search ends when the expected fall of the loss is at most the standard error of the difference.
    4. A candidate without a gradient is the last one. The second candidate's gradient is taken if the budget allows. A
       later one's is taken only if the regret, which is how much lower the loss would be at the true minimum, is
       expected to be more than two standard errors.

    Args:
        problem: the merge's problem, with its Gram matrix.
        space: "affine": weights may be negative (extrapolation); "simplex": they are not.
        bounds: smallest and largest weight; by default (-1, 2) and (0, 1).
        known: merge weights, and the losses of the objective's components there on the whole split; by default live.

    Raises:
        ValueError: as :func:`.space.check_space`.
    """

    needs_gradients = True
    multiscale = True
    wants_parts: int

    def __init__(
        self,
        problem: Problem,
        *,
        space: str = "affine",
        bounds: tuple[float, float] | None = None,
        known: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        super().__init__(problem)
        assert problem.gram is not None
        self._bounds = check_space(space, bounds)
        self._objective = problem.objective
        self._axes = PrincipalAxes(problem.gram)
        self._newest = self._axes.to_point(problem.live)
        self._observations: list[list[Observation]] = [[] for _ in self._objective.components]
        weights, losses = (problem.live, self._objective.live) if known is None else known
        # The best point evaluated on the whole split.
        self._best, self._best_loss = self._axes.to_point(weights), self._objective.score(losses)
        self._observe(self._best, losses, None, 0.0)
        first = near_live(problem.spans, problem.size) if problem.previous is None else problem.previous
        self._next = within_bounds(first, self._bounds)
        self._budget = float(problem.evaluations)
        self._parts = problem.parts
        self.wants_parts = 1
        # The gradient on one part must leave enough to evaluate the next candidate on the whole split.
        self.wants_gradient = self._budget >= GRADIENT_COST / self._parts + 1
        # If all rows are equal, so are all merges.
        self._done = self._axes.degenerate

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Raise a ValueError for an unknown space or wrong bounds."""
        check_space(**options)

    def ask(self) -> np.ndarray | None:
        if not self.wants_gradient:
            self.wants_parts = self._parts
        return None if self._done else self._next

    def tell(self, weights: np.ndarray, loss: float, observed: Observed) -> None:
        gradients, parts = observed.gradients, observed.parts
        finite = np.isfinite(observed.losses).all() and gradients is not None and np.isfinite(gradients).all()
        if gradients is None or parts is None or not finite:
            self._done = True
            return
        share = min(1.0, float(parts.tokens.sum() / self._objective.tokens.sum()))
        self._budget -= GRADIENT_COST * share
        here = self._axes.to_point(weights)
        self._observe(here, observed.losses, gradients, 1.0 / share - 1.0)
        if share == 1.0 and loss <= self._best_loss:
            self._best, self._best_loss = here, loss
        point, expected, regret = self._propose()
        self._next = self._axes.to_weights(point)
        if self.wants_parts < self._parts:
            self.wants_parts = self._parts
            self.wants_gradient = self._budget >= GRADIENT_COST
        else:
            noise = parts.stderr_along(self._axes.axes @ (point - self._best), self._objective.domains)
            noise = noise if math.isfinite(noise) else 0.0
            self._done = expected <= noise
            self.wants_gradient = self._budget >= GRADIENT_COST + 1 and regret > _CLEARLY * noise
        self._done |= self._budget < 1

    def _observe(self, point: np.ndarray, losses: np.ndarray, gradients: np.ndarray | None, missing: float) -> None:
        """Remember an evaluation for the model of each component.

        Args:
            point: the candidate's coordinates.
            losses: of the components, shape ``(components,)``.
            gradients: in merge weights, shape ``(components, k)``; None if not taken.
            missing: tokens of the search split that were left out, relative to those that were evaluated. It scales
                the noise, which is the error as an estimate of the whole search split: 0 if all were evaluated.
        """
        for index, seen in enumerate(self._observations):
            gradient = None if gradients is None else self._axes.axes.T @ gradients[index]
            noise = NOISE_PER_TOKEN / max(self._objective.tokens[index], 1.0) * missing
            seen.append(Observation(point, float(losses[index]), gradient, noise))

    def _propose(self) -> tuple[np.ndarray, float, float]:
        """The next point to evaluate.

        Returns:
            The minimum of the expected objective; how much lower than at the best evaluated point it is expected to
            be there; and the expected regret, how much lower still it is at the true minimum (both in nats per token).
        """
        rng = np.random.default_rng(0)
        fitted = [self._fit(seen, rng) for seen in self._observations]
        models = [mean for mean, _ in fitted]
        point = self._best_point(models, _center(self._observations[0]))
        lowest = self._value(models, point)
        regret = 0.0
        for draw in zip(*[draws for _, draws in fitted], strict=True):
            at_best = self._value(list(draw), self._best_point(list(draw), point))
            regret += max(0.0, self._value(list(draw), point) - at_best) / _DRAWS
        return point, self._value(models, self._best) - lowest, regret

    def _best_point(self, models: list[Quadratic], start: np.ndarray) -> np.ndarray:
        return best_point(models, self._objective, self._axes, self._bounds, start)

    def _value(self, models: list[Quadratic], point: np.ndarray) -> float:
        losses = np.array([model.value(point) for model in models])
        return self._objective.score(losses)

    def _fit(self, seen: list[Observation], rng: np.random.Generator) -> tuple[Quadratic, list[Quadratic]]:
        """The model of one component's loss: its mean and draws, both averaged over the hyperparameters' posterior."""
        center, matrix = _center(seen), design(seen)
        found: list[Posterior] = []
        logs: list[float] = []
        for scale, alpha in itertools.product(_SCALES, _ALPHAS):
            relative = self._axes.curvatures(alpha)
            relative /= float(relative @ np.square(self._newest))
            fit = posterior(seen, Prior(scale * relative, _SCALE * relative), center, matrix)
            distances = [np.log(scale / _SCALE) / _SCALE_SPREAD, (alpha - _ALPHA) / _ALPHA_SPREAD]
            found.append(fit)
            logs.append(fit.log_evidence - 0.5 * float(np.square(distances).sum()))
        weights = np.exp(np.array(logs) - max(logs))
        weights /= weights.sum()
        curvatures = np.tensordot(weights, np.array([fit.curvatures for fit in found]), axes=1)
        mean = quadratic(np.tensordot(weights, np.array([fit.mean for fit in found]), axes=1), curvatures)
        counts = rng.multinomial(_DRAWS, weights)
        draws = [draw for fit, count in zip(found, counts, strict=True) if count for draw in fit.samples(count, rng)]
        return mean, draws


def near_live(spans: Sequence[Span], size: int) -> np.ndarray:
    """An average close to live, shape ``(size,)``: where a merge begins that knows of none before it.

    Args:
        spans: of the rows that are means, and live's; empty if all rows are single checkpoints.
        size: number of rows.
    """
    return average(spans) if spans else ema(size, decay=0.35)


def _center(seen: list[Observation]) -> np.ndarray:
    """The point of lowest loss among those with a gradient."""
    return min(seen, key=lambda one: one.loss if one.gradient is not None else math.inf).point
