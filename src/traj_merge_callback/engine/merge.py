"""One merge, in pieces: live, the search, the report, the snapshot."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..config import MergeConfig
from ..disk.state import RunState
from ..evaluate.candidate import Candidates
from ..evaluate.gathering import weights_in
from ..evaluate.heldout import HeldOutLoss, Split
from ..evaluate.units import Units
from ..metrics import not_measured, report_losses
from ..pieces import Pieces
from ..search.evaluation import Evaluation
from ..window.window import CheckpointWindow
from .budget import Plan
from .choose import Choice, Chooser
from .publishing import Publisher


@dataclass(frozen=True)
class Merged:
    """What a merge came to.

    Args:
        step: optimizer step of the live checkpoint.
        plan: what it was allowed.
        checkpoint_steps: steps of the window's rows, oldest first.
        choice: the merge weights, and what it cost to choose them.
        losses: of the report split, as they stand in the record; None where nothing was evaluated.
        snapshot: folder of the published snapshot, None if none was published.
    """

    step: int
    plan: Plan
    checkpoint_steps: list[int]
    choice: Choice
    losses: dict[str, Any]
    snapshot: Path | None


class Merging:
    """Makes the merges of one run.

    Args:
        model: the model being trained.
        window: its checkpoints.
        config: the options.
        heldout: the held-out loss.
        chooser: of merge weights.
        publisher: of snapshots.
    """

    def __init__(
        self,
        model: nn.Module,
        window: CheckpointWindow,
        config: MergeConfig,
        heldout: HeldOutLoss,
        chooser: Chooser,
        publisher: Publisher,
    ) -> None:
        self._config = config
        self._heldout = heldout
        self._chooser = chooser
        self._publisher = publisher
        self._units = Units(model, window.layout, window.processes) if window.layout.sharding.units else None

    @property
    def needs_evaluations(self) -> bool:
        """Whether merge weights depend on losses; those of most recipes do not."""
        return self._chooser.needs_evaluations

    def probe(self, model: nn.Module, window: CheckpointWindow) -> Pieces[None]:
        """Do pieces of the commonest kinds, to learn what they take."""
        candidates = self._candidates(model, window)
        with window.in_use():
            yield from candidates.take(None)
        for _ in range(2):  # the first forward pass of a kind is slow
            yield from candidates.sample()

    def live(self, model: nn.Module, window: CheckpointWindow, split: Split) -> Pieces[Evaluation]:
        """Evaluate the model with the weights that it has now."""
        weights = self._candidates(model, window).weights
        layout = window.layout
        for view, values in zip(layout.views(weights.row).values(), layout.locals(layout.tensors(model)), strict=True):
            view.copy_(values)
        yield from weights.gather()
        return (yield from self._heldout.evaluate_pieces(model, split, weights.ready))

    def merge(
        self, model: nn.Module, window: CheckpointWindow, memory: RunState, step: int, plan: Plan
    ) -> Pieces[Merged]:
        """Merge the window as it is now; its rows are in use from now on until the merged weights are there.

        Args:
            model: the model being trained.
            window: at least two rows, the newest of ``step``.
            memory: what is known from earlier merges, which this one adds to.
            step: optimizer step.
            plan: what may be spent.
        """
        in_use = ExitStack()
        in_use.enter_context(window.in_use())
        return self._merge(model, window, memory, step, plan, in_use)

    def _merge(
        self,
        model: nn.Module,
        window: CheckpointWindow,
        memory: RunState,
        step: int,
        plan: Plan,
        in_use: ExitStack,
    ) -> Pieces[Merged]:
        with in_use:
            steps = list(window.steps)
            candidates = self._candidates(model, window)
            if plan.evaluations:
                choice, losses = yield from self._search(candidates, window, memory, step, plan)
            else:
                choice, losses = self._chooser.unevaluated(window, step), not_measured()
                yield from candidates.take(choice.weights)
        snapshot = None
        if self._config.publishes:
            snapshot = yield from self._publisher.publish(candidates.weights, step, steps, choice, losses)
        return Merged(step, plan, steps, choice, losses, snapshot)

    def _candidates(self, model: nn.Module, window: CheckpointWindow) -> Candidates:
        weights = weights_in(model, window, self._heldout.seed, units=self._units)
        return Candidates(weights, window, self._heldout)

    def _search(
        self, candidates: Candidates, window: CheckpointWindow, memory: RunState, step: int, plan: Plan
    ) -> Pieces[tuple[Choice, dict[str, Any]]]:
        self._heldout.use(plan.share)
        if plan.share != memory.share:
            # Losses on another part of the split are of no use.
            memory.share, memory.row_losses, memory.search = plan.share, {}, {}
        yield from candidates.take(None)
        live_search = yield from candidates.evaluate("search")
        if not math.isfinite(live_search.loss):
            raise ValueError(f"the live model's held-out loss on the search split is {live_search.loss}")
        live = merged = yield from candidates.evaluate("report")
        choice = yield from self._chooser.choose(candidates, window, live_search, memory, step, plan.evaluations)
        yield from candidates.take(choice.weights)
        if choice.weights is not None:
            merged = yield from candidates.evaluate("report")
        losses = report_losses(live, merged, self._heldout.searched)
        if not math.isfinite(losses["gain"]):
            raise ValueError(f"the held-out loss on the report split is not finite: {losses}")
        return choice, losses
