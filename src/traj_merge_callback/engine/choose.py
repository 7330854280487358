"""Choosing a merge's weights: the problem that the configuration poses, its search, and what is remembered of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..config import MergeConfig
from ..disk.state import RunState
from ..distributed import Processes
from ..evaluate.candidate import Candidates
from ..evaluate.heldout import HeldOutLoss
from ..pieces import Pieces, reported
from ..search import Problem, resolve_search
from ..search.evaluation import Evaluation
from ..search.grouped import GroupedSearch
from ..search.objective import Objective
from ..window.window import CheckpointWindow
from .deciding import Decided
from .selection import Selection, select

logger = logging.getLogger("traj_merge_callback")


@dataclass(frozen=True)
class Choice:
    """The merge weights chosen.

    Args:
        weights: shape ``(num_weights,)`` or ``(groups, num_weights)``; None for live itself.
        described: the weights by name, as they stand in the record and in merge.json.
        search_losses: live's and the merge's objective on the search split, nats per token.
        evaluations: how many candidates were evaluated, live included.
        forward_equivalents: what that cost, in forward passes over the search split.
    """

    weights: np.ndarray | None
    described: dict[str, Any]
    search_losses: dict[str, float]
    evaluations: int
    forward_equivalents: float


class Chooser:
    """Chooses merge weights for one window after another.

    Args:
        config: the options.
        heldout: where weights are chosen on the search split.
        processes: those that train the model together; the first one's searches decide for all.
    """

    def __init__(self, config: MergeConfig, heldout: HeldOutLoss, processes: Processes) -> None:
        self._processes = processes
        self._config = config
        self._heldout = heldout
        self._search = resolve_search(config.search, config.search_options)
        self._without_gradients = self._ungrouped = False

    def choose(
        self,
        candidates: Candidates,
        window: CheckpointWindow,
        live: Evaluation,
        memory: RunState,
        step: int,
        evaluations: int,
    ) -> Pieces[Choice]:
        """Search for the best weights, in pieces.

        Args:
            candidates: of the window.
            window: at least two rows.
            live: live on the search split.
            memory: what is known from earlier merges, which this one adds to.
            step: optimizer step of the merge.
            evaluations: what may be spent, live included.
        """
        problem = yield from self._problem(window, live, memory, step, evaluations)
        start = Selection(None, problem.live_loss, live)
        chosen = yield from self._select(problem, candidates, start, memory.row_losses)
        shared = chosen.weights
        if window.groups is not None and shared is not None and not (self._ungrouped or self._without_gradients):
            left = evaluations - int(np.ceil(chosen.forward_equivalents))
            chosen = yield from self._select_grouped(problem, window, candidates, chosen, shared, left)
        memory.previous = None if shared is None else shared.tolist()
        memory.row_losses = {row: losses for row, losses in memory.row_losses.items() if row in window.steps}
        if shared is None:
            # Live itself; where rows are means it is no merge of them, and all their weights are zero.
            shared = np.zeros(problem.size) if problem.live is None else problem.live
        by_group = {}
        if window.groups is not None and chosen.weights is not None and chosen.weights.ndim == 2:
            by_group = dict(zip(window.groups.names, chosen.weights.tolist(), strict=True))
        return Choice(
            weights=chosen.weights,
            described=_described(shared[problem.running_sums :], shared[: problem.running_sums], by_group),
            search_losses={"live": problem.live_loss, "merged": chosen.loss},
            evaluations=chosen.evaluations,
            forward_equivalents=chosen.forward_equivalents,
        )

    @property
    def needs_evaluations(self) -> bool:
        """Whether the weights depend on losses; those of most recipes do not."""
        return not getattr(self._search, "closed_form", False)

    def unevaluated(self, window: CheckpointWindow, step: int) -> Choice:
        """A recipe's weights as they are, with no loss measured."""
        problem = Problem(
            steps=window.steps,
            evaluations=1,
            seed=self._config.seed + step,
            running_sums=window.num_weights - len(window),
            live_is_row=window.newest_is_live,
            objective=Objective.single(0.0),
        )
        weights = self._search(problem, **self._config.search_options).ask()
        assert weights is not None
        return Choice(
            weights=weights,
            described=_described(weights[problem.running_sums :], weights[: problem.running_sums], {}),
            search_losses={},
            evaluations=0,
            forward_equivalents=0.0,
        )

    def _problem(
        self, window: CheckpointWindow, live: Evaluation, memory: RunState, step: int, evaluations: int
    ) -> Pieces[Problem]:
        config, size = self._config, window.num_weights
        previous = None
        if memory.previous is not None and len(memory.previous) <= size:
            # Ages match from the newest row on; a window that has grown since then has older rows of weight 0.
            previous = np.concatenate([np.zeros(size - len(memory.previous)), memory.previous])
        takes_gradients = getattr(self._search, "needs_gradients", False) and not self._without_gradients
        objective = Objective.of(
            live,
            self._heldout.searched,
            kind=config.objective,
            domain_weights=config.domain_weights,
            tolerance=config.tolerance,
        )
        return Problem(
            steps=window.steps,
            evaluations=evaluations - 1 - (0 if config.groups is None else GroupedSearch.cost),
            previous=previous,
            seed=config.seed + step,
            running_sums=size - len(window),
            live_is_row=window.newest_is_live,
            gram=(yield from window.gram_pieces()) if takes_gradients else None,
            objective=objective,
            batches=self._heldout.num_batches("search"),
            parts=self._heldout.parts,
            memory=memory.search,
        )

    def _select(
        self, problem: Problem, candidates: Candidates, start: Selection, row_losses: dict[int, list[float]]
    ) -> Pieces[Selection]:
        """Run the search; ``auto`` does without gradients from the first time they cannot be had."""
        if not self._without_gradients:
            try:
                search = Decided(self._search, problem, self._config.search_options, self._processes)
                pieces = select(search, problem, candidates.measure, start, row_losses)
                return (yield from self._reported(pieces))
            except Exception as error:
                if self._config.search != "auto":
                    raise
                logger.warning(
                    "auto could not search with gradients of the held-out loss (%s: %s); it goes on with "
                    "search='reach', which needs none and finds a little less",
                    type(error).__name__,
                    error,
                )
                self._without_gradients = True
        search = Decided(resolve_search("reach"), problem, {}, self._processes)
        return (yield from select(search, problem, candidates.measure, start, row_losses))

    def _select_grouped(
        self,
        problem: Problem,
        window: CheckpointWindow,
        candidates: Candidates,
        chosen: Selection,
        shared: np.ndarray,
        left: int,
    ) -> Pieces[Selection]:
        """Go on from the best weights of the whole model to those of each parameter group."""
        gram = yield from window.gram_pieces(grouped=True)
        grouped = replace(problem, evaluations=left, gram=gram)
        search = Decided(GroupedSearch, grouped, {"start": shared}, self._processes)
        try:
            return (yield from self._reported(select(search, grouped, candidates.measure, chosen, {})))
        except Exception as error:
            logger.warning(
                "merge weights by parameter group need gradients of the held-out loss, which could not be had "
                "(%s: %s); weights of the whole model are published",
                type(error).__name__,
                error,
            )
            self._ungrouped = True
            return chosen

    def _reported(self, pieces: Pieces[Selection]) -> Pieces[Selection]:
        """Pieces whose failure is caught here: in all processes, if it happens in one."""
        return pieces if self._processes.size == 1 else reported(pieces)


def _described(weights: np.ndarray, running_sums: np.ndarray, by_group: dict[str, list[float]]) -> dict[str, Any]:
    return {"weights": weights.tolist(), "running_sum_weights": running_sums.tolist(), "group_weights": by_group}
