"""The problem that a search solves, what it observes, and the base class of all searches (k-world)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from .evaluation import Gradient
from .objective import Objective

# What a forward and a backward pass cost, in forward passes.
GRADIENT_COST = 3


@dataclass
class SearchState:
    """What a merge remembers for the next one.

    Args:
        previous: its weights.
        row_losses: losses of single rows on the search split, by step; of each component of the objective.
        memory: what the search itself remembers.
    """

    previous: list[float] | None = None
    row_losses: dict[int, list[float]] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)

    def forget_losses(self) -> None:
        """Drop what was measured on other held-out data."""
        self.row_losses, self.memory = {}, {}


@dataclass(frozen=True)
class Problem:
    """What a search may know.

    Args:
        steps: optimizer steps of the window's rows, oldest first.
        evaluations: what may be spent, in forward passes over the search split: a candidate costs 1, with its gradient
            3. Live is evaluated beside that.
        objective: the loss, how it is made of those of several domains, and live's.
        previous: the last merge's weights, shape ``(size,)``, aligned so that ages match; None at the first merge.
        seed: for the search's own random numbers; differs from merge to merge.
        leading_rows: number of rows in front of the window that are no checkpoints of it (BEMA's two), else 0.
        live_is_row: whether the newest row is live; else the rows are means, and live is no merge of them.
        gram: inner products of the rows' deltas to the newest row, shape ``(size, size)``, or ``(groups, size, size)``
            where merge weights are grouped; for searches that take gradients.
        batches: number of batches of the search split.
        parts: number of parts of it that can be evaluated alone.
        memory: what the search keeps from one merge of a run to the next, plain JSON values with strings as keys; it
            may write to it.
    """

    steps: tuple[int, ...]
    evaluations: int
    objective: Objective
    previous: np.ndarray | None = None
    seed: int = 0
    leading_rows: int = 0
    live_is_row: bool = True
    gram: np.ndarray | None = None
    batches: int = 1
    parts: int = 1
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def live_loss(self) -> float:
        """The objective of live on the search split, in nats per token."""
        return self.objective.score(self.objective.live)

    @property
    def size(self) -> int:
        """The number of merge weights."""
        return self.leading_rows + len(self.steps)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a candidate: ``(size,)``, or ``(groups, size)``."""
        return (self.size,) if self.gram is None or self.gram.ndim == 2 else self.gram.shape[:-1]

    @property
    def live(self) -> np.ndarray | None:
        """The candidate that is live, None if live is no row."""
        return self.row(age=0) if self.live_is_row else None

    @property
    def live_losses(self) -> dict[int, float]:
        """Losses of single rows, by age, that are known from the beginning."""
        return {0: self.live_loss} if self.live_is_row else {}

    def row(self, age: int) -> np.ndarray:
        """The candidate that is one row alone; age 0 is the newest."""
        weights = np.zeros(self.size)
        weights[self.size - 1 - age] = 1.0
        return weights


@dataclass(frozen=True)
class Observed:
    """What a search is told of a candidate beside its loss.

    Args:
        losses: losses of the objective's components, shape ``(components,)``.
        gradients: their gradients in the merge weights, shape ``(components, *problem.shape)``, known up to a constant
            that weights which sum to 1 do not feel; None where no gradient was wanted.
        parts: the gradient by parts of the search split, from which its standard error follows.
    """

    losses: np.ndarray
    gradients: np.ndarray | None = None
    parts: Gradient | None = None


class Search(ABC):
    """Proposes merge weights: built as ``MySearch(problem, **search_options)`` for each merge, then asked and told.

    Only :meth:`ask` must be written. The defaults are those of a search that needs nothing but losses.

    Attributes:
        needs_gradients: whether ``problem.gram`` is computed.
        closed_form: whether there is one candidate, which depends on no loss: such a merge takes two passes.
        average_rate: for BEMA alone, ``beta_t`` as a function of the step and the search's options; the window then
            keeps two leading rows.
        wants_gradient: whether the next candidate is evaluated with its gradient, for ``GRADIENT_COST`` passes.
        wants_parts: on how many of the ``problem.parts`` of the search split the next candidate is evaluated, at their
            share of the cost; it can only win if these are all, which None means.
    """

    needs_gradients: ClassVar[bool] = False
    closed_form: ClassVar[bool] = False
    average_rate: ClassVar[Callable[..., float] | None] = None
    wants_gradient: bool = False
    wants_parts: int | None = None

    @classmethod  # noqa: B027
    def check_options(cls, **options: Any) -> None:
        """Raise a ValueError if the value of an option is wrong, so that it fails before training starts."""

    @abstractmethod
    def ask(self) -> np.ndarray | None:
        """The next candidate, of shape ``problem.shape``, summing to 1; None when there is nothing left to try."""

    def tell(self, weights: np.ndarray, loss: float, observed: Observed) -> None:  # noqa: B027
        """Take in the loss of a candidate on the search split, in nats per token.

        Args:
            weights: the candidate.
            loss: of the objective; ``inf`` if it was not finite or is not allowed.
            observed: the losses of its components, and gradients if they were wanted.
        """
