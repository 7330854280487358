"""What a search minimises: one number from the held-out losses of one or several domains (k-world)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .evaluation import Evaluation, Gradient

KINDS = ("mean", "worst")
# A candidate is given up early when it is worse than the best one by so many standard errors in every domain.
_CLEARLY = 4.0


@dataclass(frozen=True)
class Objective:
    """The loss of merge weights on the search split.

    "mean" is the weighted mean of the domains' losses. "worst" is live's mean plus the largest rise over live in any
    domain (minimax over what each domain gains: losses themselves differ between domains for reasons no merge changes).
    With a tolerance, weights with which any domain's loss rises by more than that over live are worth infinity.

    Args:
        components: sets of domains that have a loss together; one set of all domains where they need not be told apart.
        weights: of the components in the mean, shape ``(components,)``, sum 1.
        live: live's losses, shape ``(components,)``, nats per token.
        tokens: number of target tokens of each component, shape ``(components,)``.
        worst: whether the objective is "worst".
        tolerance: nats per token.
    """

    components: tuple[frozenset[str], ...]
    weights: np.ndarray
    live: np.ndarray
    tokens: np.ndarray
    worst: bool = False
    tolerance: float | None = None

    @property
    def domains(self) -> frozenset[str]:
        """The domains of all components."""
        return frozenset[str]().union(*self.components)

    @classmethod
    def of(
        cls,
        live: Evaluation,
        domains: Iterable[str],
        *,
        kind: str = "mean",
        domain_weights: Mapping[str, float] | None = None,
        tolerance: float | None = None,
    ) -> Objective:
        """The objective of one merge, from live's evaluation on the search split.

        Args:
            live: live on the search split.
            domains: the domains that are searched on.
            kind: "mean" or "worst".
            domain_weights: weights of the mean; by default each domain has that of its tokens.
            tolerance: largest rise over live allowed in any domain, in nats per token.

        Raises:
            ValueError: the domains that have weights have no held-out sequence to search on.
        """
        names = sorted(domains)
        together = kind == "mean" and domain_weights is None and tolerance is None
        components = (frozenset(names),) if together else tuple(frozenset([name]) for name in names)
        # A domain of a single sequence may have none on this split.
        components = tuple(component for component in components if live.only(component).tokens.sum())
        evaluations = [live.only(component) for component in components]
        losses, tokens = np.array([e.loss for e in evaluations]), np.array([e.tokens.sum() for e in evaluations])
        weights = tokens
        if domain_weights is not None:
            weights = np.array([sum(domain_weights.get(name, 0.0) for name in component) for component in components])
        if not weights.sum() > 0:
            raise ValueError(f"domain_weights={domain_weights}: those domains have no sequence on the search split")
        return cls(components, weights / weights.sum(), losses, tokens, kind == "worst", tolerance)

    @classmethod
    def single(cls, live_loss: float) -> Objective:
        """The objective of a single unnamed domain with one token."""
        return cls((frozenset([""]),), np.ones(1), np.array([live_loss]), np.ones(1))

    def losses(self, evaluation: Evaluation) -> np.ndarray:
        """Loss of each component, shape ``(components,)``."""
        return np.array([evaluation.only(component).loss for component in self.components])

    def gradients(self, gradient: Gradient) -> np.ndarray:
        """Gradient of each component's loss, shape ``(components, k)`` or ``(components, groups, k)``."""
        return np.array([gradient.of(component) for component in self.components])

    def value(self, losses: np.ndarray) -> float:
        """The objective in nats per token; ``inf`` where a loss is not finite or exceeds the tolerance."""
        allowed = self.tolerance is None or (losses - self.live).max() <= self.tolerance
        return self.score(losses) if np.isfinite(losses).all() and allowed else math.inf

    def score(self, losses: np.ndarray) -> float:
        """The objective without regard to the tolerance."""
        if self.worst:
            return float(self.weights @ self.live + (losses - self.live).max())
        return float(self.weights @ losses)

    def clearly_worse(self, evaluation: Evaluation, best: Evaluation) -> bool:
        """Whether a candidate is worse than ``best`` by 4 standard errors in every domain, on the batches so far."""
        best = best.on(evaluation.indices)
        for component in self.components:
            gain, stderr = best.only(component).gain_of(evaluation.only(component))
            if math.isfinite(gain) and not (math.isfinite(stderr) and gain < -_CLEARLY * stderr):
                return False
        return True
