"""The interface of a search: the problem it is given, what it observes of each candidate, and its base class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np

from .evaluation import Gradient
from .objective import Objective
from .spans import Span

# Cost of evaluating a candidate with its gradient (a forward and a backward pass), in forward passes.
GRADIENT_COST = 3
#: What merge weights belong to: see :class:`Search`.
Weighing: TypeAlias = Literal["rows", "fisher", "regmean"]
#: What it costs to learn of a row, in forward passes over one part of the search split.
LEARNING_COST: dict[Weighing, int] = {"rows": 0, "fisher": GRADIENT_COST, "regmean": 1}
# Live has gone astray if its loss rises by more than this many usual rises from merge to merge, and by more than this
# share of the loss, which is below 0 where it is of a density.
_RISES, _CLEARLY = 4.0, 0.02


@dataclass
class SearchState:
    """What a merge remembers for the next one.

    Args:
        previous: its weights.
        spans: of its rows, oldest first.
        row_losses: losses of single rows on the search split, by the row's name; of each component of the objective.
        memory: what the search itself remembers.
        live_losses: live's objective at the last merges, oldest first.
        spiked: whether the training loss was in a spike since the merge before.
        in_a_spike: whether training was astray when the merge began, by its loss or live's.
        restored: whether all this was read from a file and no merge has been made with it yet.
    """

    previous: list[float] | None = None
    spans: list[Span] = field(default_factory=list)
    row_losses: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    live_losses: list[float] = field(default_factory=list)
    spiked: bool = field(default=False, compare=False)
    in_a_spike: bool = field(default=False, compare=False)
    restored: bool = field(default=False, compare=False)

    @property
    def spoiled(self) -> list[str]:
        """Names of rows that are of a time when training went astray, as the search found; they leave first."""
        found = self.memory.get("spoiled", [])
        return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []

    def is_astray(self, loss: float) -> bool:
        """Whether live's objective is far above what it was at the last merges.

        The lowest of them is compared with: while a loss falls that is the last one, and after a spike it is that from
        before. Usual is the upper quartile of rises from one merge to the next, where falls count as none: noise makes
        as many rises as falls, and neither a loss that still falls fast nor a spike makes many.
        """
        recent = self.live_losses
        if not recent:
            return False
        rises = np.maximum(np.diff(recent), 0.0)
        # One rise alone may be that of a spike.
        usual = float(np.quantile(rises, 0.75, method="lower")) if len(rises) > 1 else 0.0
        return not loss - min(recent) <= max(_RISES * usual, _CLEARLY * abs(min(recent)))

    def forget(self) -> None:
        """Drop everything: the next merge is like a first one."""
        self.previous, self.spans = None, []
        self.forget_losses()

    def forget_losses(self) -> None:
        """Drop what was measured on other held-out data."""
        self.row_losses, self.memory, self.live_losses = {}, {}, []


@dataclass(frozen=True)
class Problem:
    """The choice of merge weights at one merge, as a search sees it.

    Args:
        steps: optimizer steps of the window's rows, oldest first.
        evaluations: the budget, in forward passes over the search split. A candidate costs 1, with its gradient
            ``GRADIENT_COST``. The evaluation of live is not charged to it.
        objective: computes the number to minimise from the losses of the held-out domains; holds live's losses.
        previous: the last merge's weights, shape ``(size,)``, by age: where rows are single checkpoints shifted so that
            the newest row's weight is last, else carried over to today's spans; None at the first merge.
        seed: for the search's own random numbers; differs from merge to merge.
        leading_rows: number of rows in front of the window that are no checkpoints of it: 2 for BEMA (theta_0 and
            EMA_t), else 0.
        gram: inner products of the rows' differences to the newest row, shape ``(size, size)``, or ``(groups, size,
            size)`` where each parameter group has merge weights of its own. None if the search has
            ``needs_gradients = False``.
        batches: number of batches of the search split.
        parts: number of parts of the search split that can be evaluated separately.
        memory: a dictionary that the search may write to and that the next merge's search receives: JSON values with
            strings as keys.
        spans: which steps the rows are means of, oldest first, and live's own; empty if all are single checkpoints.
        again: the last merge's weights by step, shape ``(size,)``: nearly that merge itself. None at the first merge.
        astray: whether the training loss was in a spike since the last merge, or live's loss is far above what it was.
    """

    steps: tuple[int, ...]
    evaluations: int
    objective: Objective
    previous: np.ndarray | None = None
    seed: int = 0
    leading_rows: int = 0
    gram: np.ndarray | None = None
    batches: int = 1
    parts: int = 1
    memory: dict[str, Any] = field(default_factory=dict)
    spans: tuple[Span, ...] = ()
    again: np.ndarray | None = None
    astray: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """For each row a name that no other row of the run has, oldest first."""
        return tuple(span.name for span in self.spans) or tuple(map(str, self.steps))

    @property
    def live_loss(self) -> float:
        """The objective of live on the search split, in nats per token."""
        return self.objective.live_loss

    @property
    def size(self) -> int:
        """Number of merge weights: one for each row, leading rows included."""
        return self.leading_rows + len(self.steps)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a candidate: ``(size,)``, or ``(groups, size)``."""
        return (self.size,) if self.gram is None or self.gram.ndim == 2 else self.gram.shape[:-1]

    @property
    def live(self) -> np.ndarray:
        """The candidate that equals live, which is the newest row: shape ``(size,)``."""
        return self.row(age=0)

    def row(self, age: int) -> np.ndarray:
        """The candidate with weight 1 on one row, shape ``(size,)``; age 0 is the newest row."""
        weights = np.zeros(self.size)
        weights[self.size - 1 - age] = 1.0
        return weights


@dataclass(frozen=True)
class Observed:
    """What was measured of a candidate beside the objective.

    Args:
        losses: loss of each component of the objective, shape ``(components,)``, nats per token.
        gradients: gradients of these losses with respect to the merge weights, shape ``(components, *problem.shape)``;
            known up to one constant added to all entries of a weight vector, which changes no derivative along
            directions that keep the weights' sum. None if the candidate was evaluated without its gradient.
        parts: the same gradient separately for each part of the search split, for standard errors; None likewise.
    """

    losses: np.ndarray
    gradients: np.ndarray | None = None
    parts: Gradient | None = None


class Search(ABC):
    """Base class of all searches. One is built as ``Search(problem, **search_options)`` at every merge.

    The engine then alternates :meth:`ask` and :meth:`tell` until ``ask`` returns None or the budget is spent. Only
    :meth:`ask` must be overridden.

    Args:
        problem: the merge's problem, kept as ``self.problem``. Options are keyword arguments of the subclass.

    Attributes:
        needs_gradients: class attribute; if True, ``problem.gram`` is given and ``wants_gradient`` may be set.
        closed_form: class attribute; if True, there is one candidate and it depends on no loss, so that two passes
            over the search split (live's and the candidate's) suffice.
        multiscale: class attribute; whether ``row="auto"`` gives it rows that are means over spans that grow with age,
            instead of single checkpoints.
        weighing: class attribute; what merge weights make a model of. "rows": the weighted mean of the rows. "fisher":
            each parameter's weights are multiplied by its Fisher information in each row. "regmean": linear layers are
            merged by least squares on their inputs, with equal weights. What the last two learn of the rows on one part
            of the search split is paid from the budget.
        average_rate: class attribute; for BEMA, a function of the step and the options that returns beta_t, with which
            the window keeps its leading rows. None: the window has no leading rows.
        wants_gradient: whether the next candidate is to be evaluated with its gradient.
        wants_parts: on how many parts of the search split the next candidate is to be evaluated, at their share of the
            cost; None: on all. A candidate that was evaluated on fewer than all parts cannot win.
        same_part: whether such candidates take the same parts, so that their losses compare, and not different ones in
            turn, so that their errors differ.
    """

    needs_gradients: ClassVar[bool] = False
    closed_form: ClassVar[bool] = False
    multiscale: ClassVar[bool] = False
    weighing: ClassVar[Weighing] = "rows"
    average_rate: ClassVar[Callable[..., float] | None] = None

    wants_gradient: bool = False
    wants_parts: int | None = None
    same_part: bool = False

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    @classmethod  # noqa: B027 (optional to override)
    def check_options(cls, **options: Any) -> None:
        """Check the values of options before training starts; their names are checked by the caller.

        Raises:
            ValueError: a value is wrong.
        """

    @abstractmethod
    def ask(self) -> np.ndarray | None:
        """The next candidate, of shape ``problem.shape`` with weights that sum to 1; None to end the search.

        A candidate that was evaluated before is answered from memory at no cost.
        """

    def tell(self, weights: np.ndarray, loss: float, observed: Observed) -> None:  # noqa: B027 (optional to override)
        """Receive the result of the candidate last asked for.

        Args:
            weights: the candidate.
            loss: its objective on the search split, in nats per token; ``inf`` if it is not finite or not allowed by
                the tolerance. For a candidate evaluated on some parts only it is an estimate for the whole split.
            observed: what else was measured.
        """
