"""What an evaluation yields: sums per held-out batch, and the statistics a reader needs from them (k-world)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Evaluation:
    """Summed NLL and target tokens of each held-out batch of one split, and the domain each batch belongs to.

    The loss is the token-weighted mean ``sum(nll) / sum(tokens)`` in nats per token, never the mean of batch means.

    Args:
        nll: summed negative log-likelihood in nats, shape ``(batches,)``.
        tokens: number of target tokens, shape ``(batches,)``.
        domains: the domain's name of each batch, length ``batches``.
    """

    nll: np.ndarray
    tokens: np.ndarray
    domains: tuple[str, ...]

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per token, in nats."""
        total = self.tokens.sum()
        return float(self.nll.sum() / total) if total else math.nan

    @property
    def stderr(self) -> float:
        """Standard error of ``loss``, with batches as the independent units (ratio estimator); nan for one batch."""
        return self._stderr(self.nll)

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(min(self.loss, 700.0)) if math.isfinite(self.loss) else self.loss

    def only(self, names: set[str]) -> Evaluation:
        """The part of the evaluation that belongs to some domains."""
        chosen = np.array([domain in names for domain in self.domains], dtype=bool)
        kept = tuple(domain for domain in self.domains if domain in names)
        return Evaluation(self.nll[chosen], self.tokens[chosen], kept)

    def gain_of(self, other: Evaluation) -> tuple[float, float]:
        """How much lower the loss of ``other`` is than this one's on the same batches, and its standard error.

        The difference is paired, batch by batch, so what makes a batch easy or hard for both cancels.
        """
        difference = self.nll - other.nll
        gain = float(difference.sum() / self.tokens.sum())
        return gain, self._stderr(difference)

    def _stderr(self, sums: np.ndarray) -> float:
        batches = len(sums)
        if batches < 2:
            return math.nan
        total = self.tokens.sum()
        residuals = sums - sums.sum() / total * self.tokens
        return float(math.sqrt(batches / (batches - 1) * np.square(residuals).sum()) / total)
