"""The objective that a search minimises: one number made of the held-out losses of one or several domains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .evaluation import Evaluation, Gradient

KINDS = ("mean", "worst")
# A candidate is given up early if it is worse than the best one by more than this many standard errors in every domain.
_CLEARLY = 4.0


@dataclass(frozen=True)
class Objective:
    """The objective of merge weights on the search split.

    "mean" is the weighted mean of the domains' losses. "worst" is live's mean loss plus the largest rise over live in
    any domain; rises are compared and not losses, because some domains are harder than others for every merge. With a
    tolerance, the objective is infinite where any domain's loss rises over live by more than that.

    Args:
        components: sets of domains; the batches of a set have one loss together. A single set of all domains where
            "mean" weighs them by tokens and there is no tolerance.
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

    @property
    def live_loss(self) -> float:
        """The objective of live, in nats per token."""
        return self.score(self.live)

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
        """The objective of one merge, given live's evaluation on the search split.

        Args:
            live: live on the search split.
            domains: the domains that are searched on.
            kind: "mean" or "worst".
            domain_weights: weights of the mean; by default a domain's weight is its number of tokens.
            tolerance: largest rise over live allowed in any domain, in nats per token.

        Raises:
            ValueError: no domain with a positive weight has a sequence on the search split.
        """
        names = sorted(domains)
        together = kind == "mean" and domain_weights is None and tolerance is None
        components = (frozenset(names),) if together else tuple(frozenset([name]) for name in names)
        # A domain of a single sequence has none on this split if it went to the report split.
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
        """The objective of one nameless domain of one token: the loss itself."""
        return cls((frozenset([""]),), np.ones(1), np.array([live_loss]), np.ones(1))

    def losses(self, evaluation: Evaluation) -> np.ndarray:
        """Loss of each component, shape ``(components,)``."""
        return np.array([evaluation.only(component).loss for component in self.components])

    def on_whole(self, evaluation: Evaluation, reference: Evaluation) -> np.ndarray:
        """Loss of each component on the whole split, estimated from some batches of it, shape ``(components,)``.

        The difference to a reference is taken to be the same on the rest of the split. Of a candidate whose loss is
        less than half of the reference's that is not so: how much a loss varies between batches grows with the loss,
        and a live model that blew up would say more of itself than of the candidate. What the reference adds is scaled
        down then.

        Args:
            evaluation: the candidate, on some batches.
            reference: another candidate, on the whole split.
        """
        losses, there = self.losses(evaluation), self.losses(reference.on(evaluation.indices))
        alike = np.divide(2.0 * losses, there, out=np.ones_like(losses), where=there != 0.0).clip(0.0, 1.0)
        return losses + alike * (self.losses(reference) - there)

    def gradients(self, gradient: Gradient) -> np.ndarray:
        """Gradient of each component's loss, shape ``(components, k)`` or ``(components, groups, k)``."""
        return np.array([gradient.of(component) for component in self.components])

    def value(self, losses: np.ndarray) -> float:
        """The objective in nats per token; ``inf`` if a loss is not finite or rises by more than the tolerance."""
        allowed = self.tolerance is None or (losses - self.live).max() <= self.tolerance
        return self.score(losses) if np.isfinite(losses).all() and allowed else math.inf

    def score(self, losses: np.ndarray) -> float:
        """The objective without regard to the tolerance. Live's is its mean loss."""
        if self.worst:
            return float(self.weights @ self.live + (losses - self.live).max())
        return float(self.weights @ losses)

    def clearly_worse(self, evaluation: Evaluation, best: Evaluation) -> bool:
        """Whether a candidate is significantly worse than ``best`` in every component on the batches it has so far.

        Args:
            evaluation: the candidate, perhaps on some batches of the split only.
            best: the best candidate, on the whole split.
        """
        best = best.on(evaluation.indices)
        for component in self.components:
            gain, stderr = best.only(component).gain_of(evaluation.only(component))
            if math.isfinite(gain) and not (math.isfinite(stderr) and gain < -_CLEARLY * stderr):
                return False
        return True
