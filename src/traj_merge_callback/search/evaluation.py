"""Results of evaluating a merge on held-out batches: losses and gradients with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np

# Number of parts of the search split. A candidate can be evaluated on some of them, or be given up after any of them.
PARTS = 4


@dataclass(frozen=True)
class Evaluation:
    """Summed NLL and target tokens of each held-out batch of one split, and the domain each batch belongs to.

    The loss is the token-weighted mean ``sum(nll) / sum(tokens)`` in nats per token, never the mean of batch means.

    Args:
        nll: summed negative log-likelihood in nats, shape ``(batches,)``.
        tokens: number of target tokens, shape ``(batches,)``.
        domains: the domain's name of each batch, length ``batches``.
        indices: positions of these batches in the split; empty if unknown.
    """

    nll: np.ndarray
    tokens: np.ndarray
    domains: tuple[str, ...]
    indices: tuple[int, ...] = ()

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

    def only(self, names: Set[str]) -> Evaluation:
        """The batches of some domains."""
        return self._subset([place for place, domain in enumerate(self.domains) if domain in names])

    def on(self, indices: tuple[int, ...]) -> Evaluation:
        """The batches at these positions in the split, in that order."""
        places = {index: place for place, index in enumerate(self.indices)}
        return self._subset([places[index] for index in indices])

    def joined(self, other: Evaluation) -> Evaluation:
        """The batches of this evaluation followed by those of the other one."""
        nll, tokens = np.concatenate([self.nll, other.nll]), np.concatenate([self.tokens, other.tokens])
        return Evaluation(nll, tokens, self.domains + other.domains, self.indices + other.indices)

    def _subset(self, places: list[int]) -> Evaluation:
        domains = tuple(self.domains[place] for place in places)
        indices = tuple(self.indices[place] for place in places) if self.indices else ()
        return Evaluation(self.nll[places], self.tokens[places], domains, indices)

    def gain_of(self, other: Evaluation) -> tuple[float, float]:
        """This loss minus that of ``other`` on the same batches, in nats per token, and its standard error.

        The differences are paired batch by batch, so that a batch's difficulty, common to both, cancels.
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


@dataclass(frozen=True)
class Gradient:
    """Gradients of the summed NLL with respect to the merge weights, one for each part of a split and each domain.

    Args:
        sums: shape ``(parts, k)``, or ``(parts, groups, k)`` with a weight vector for each parameter group.
        tokens: number of target tokens of each part.
        domains: the domain's name of each part; a part's batches belong to one domain.
    """

    sums: np.ndarray
    tokens: np.ndarray
    domains: tuple[str, ...]

    def on_rows(self, rows: Sequence[int]) -> Gradient:
        """The gradients with respect to the weights of some rows, by index."""
        return Gradient(self.sums[..., list(rows)], self.tokens, self.domains)

    def of(self, names: Set[str]) -> np.ndarray:
        """Gradient of the token-weighted mean loss over some domains, shape ``(k,)`` or ``(groups, k)``."""
        chosen = self._chosen(names)
        return self.sums[chosen].sum(axis=0) / self.tokens[chosen].sum()

    def stderr_along(self, direction: np.ndarray, names: Set[str]) -> float:
        """Standard error of the derivative of the mean loss along ``direction``; nan if a domain has one part only.

        To first order it is the standard error of the difference between the losses of two merges whose weights differ
        by ``direction``.

        Args:
            direction: a difference of merge weights, shape ``(k,)`` or ``(groups, k)``.
            names: domains that the loss is the mean over.
        """
        slopes = (self.sums * direction).reshape(len(self.tokens), -1).sum(axis=1)
        total = self.tokens[self._chosen(names)].sum()
        # Only parts of one domain are samples of the same distribution: variances within each domain are added.
        stderrs = []
        for name in names & set(self.domains):
            chosen = self._chosen({name})
            stderr = Evaluation(slopes[chosen], self.tokens[chosen], ("",) * int(chosen.sum())).stderr
            stderrs.append(stderr * self.tokens[chosen].sum() / total)
        return float(np.linalg.norm(stderrs))

    def variance(self, group: int, axes: np.ndarray) -> np.ndarray:
        """Variance of the mean loss's derivative along each axis, shape ``(axes,)``, within one parameter group.

        Args:
            group: index of the group.
            axes: directions in merge weights, shape ``(k, axes)``.
        """
        found = np.zeros(axes.shape[1])
        for name in set(self.domains):
            chosen = self._chosen({name})
            tokens = self.tokens[chosen]
            if len(tokens) > 1:
                each = self.sums[chosen, group] @ axes / tokens[:, None]
                found += np.square(tokens.sum() / self.tokens.sum()) * np.var(each, axis=0, ddof=1) / len(tokens)
        return found

    def _chosen(self, names: Set[str]) -> np.ndarray:
        return np.array([domain in names for domain in self.domains], dtype=bool)
