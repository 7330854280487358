"""Recipes as searches: they propose their closed-form weights, after measuring row losses if they need them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from . import Problem, recipes
from .objective import Objective

WeightsOf = Callable[..., np.ndarray]


class _Recipe:
    """One candidate: ``weights_of(problem, losses, **options)``, where ``losses`` are those of the newest rows."""

    def __init__(self, weights_of: WeightsOf, problem: Problem, options: dict[str, Any], needs_losses: bool) -> None:
        self._problem = problem
        self._weights_of = lambda losses: weights_of(problem, losses, **options)
        # Losses of the newest rows by age; the last evaluation is kept for the recipe itself.
        self._losses = dict(problem.live_losses)
        self._wanted = min(len(problem.steps), problem.evaluations - 1 + len(self._losses)) if needs_losses else 0
        self._done = False

    def ask(self) -> np.ndarray | None:
        if len(self._losses) < self._wanted:
            return self._problem.row(age=len(self._losses))
        if self._done:
            return None
        self._done = True
        weights = self._weights_of([self._losses[age] for age in reversed(range(len(self._losses)))])
        return np.concatenate([np.zeros(self._problem.size - len(weights)), weights])

    def tell(self, weights: np.ndarray, loss: float) -> None:
        if not self._done:
            self._losses[len(self._losses)] = loss


def _as_search(weights_of: WeightsOf, source: WeightsOf, needs_losses: bool = False) -> Callable[..., _Recipe]:
    """A search factory with the recipe's own options as its signature."""

    def factory(problem: Problem, **options: Any) -> _Recipe:
        return _Recipe(weights_of, problem, options, needs_losses)

    options = [p for p in inspect.signature(source).parameters.values() if p.kind is p.KEYWORD_ONLY]
    problem = inspect.Parameter("problem", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    factory.__signature__ = inspect.Signature([problem, *options])  # type: ignore[attr-defined]
    factory.__doc__ = source.__doc__
    factory.closed_form = not needs_losses  # type: ignore[attr-defined]
    trial = Problem(steps=(1, 2), evaluations=2, objective=Objective.single(1.0))
    factory.check_options = lambda **options: weights_of(trial, [1.0, 1.0], **options)  # type: ignore[attr-defined]
    return factory


lawa = _as_search(lambda problem, _: recipes.lawa(problem.size), recipes.lawa)
ema = _as_search(lambda problem, _, **options: recipes.ema(problem.size, **options), recipes.ema)
wma = _as_search(lambda problem, _: recipes.wma(problem.size), recipes.wma)
wsm = _as_search(lambda problem, _, **options: recipes.wsm(problem.size, **options), recipes.wsm)
mwa_step = _as_search(lambda problem, _, **options: recipes.mwa_step(problem.steps, **options), recipes.mwa_step)
mwa_loss = _as_search(lambda _, losses, **options: recipes.mwa_loss(losses, **options), recipes.mwa_loss, True)
perplexity = _as_search(lambda _, losses, **options: recipes.perplexity(losses, **options), recipes.perplexity, True)


class Bema:
    """BEMA (arXiv 2508.00180), with the paper's symbols as options; see :func:`.recipes.bema`.

    Args:
        problem: the merge's problem, whose first two weights belong to theta_0 and EMA_t.
        eta: bias power. kappa: EMA power. rho: lag. gamma: multiplier. Defaults are those of TRL's BEMACallback.
    """

    closed_form = True

    def __init__(
        self, problem: Problem, *, eta: float = 0.2, kappa: float = 0.5, rho: float = 10.0, gamma: float = 1.0
    ) -> None:
        weights = recipes.bema(len(problem.steps), problem.steps[-1], eta=eta, rho=rho, gamma=gamma)
        self._candidates = [weights]

    @staticmethod
    def average_rate(
        step: int, *, eta: float = 0.2, kappa: float = 0.5, rho: float = 10.0, gamma: float = 1.0
    ) -> float:
        """beta_t, which the window needs to keep EMA_t while checkpoints arrive."""
        return recipes.bema_rate(step, kappa=kappa, rho=rho, gamma=gamma)

    def ask(self) -> np.ndarray | None:
        return self._candidates.pop() if self._candidates else None

    def tell(self, weights: np.ndarray, loss: float) -> None:
        """Nothing follows from the loss of the only candidate."""
