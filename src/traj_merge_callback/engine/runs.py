"""The merge under way: begun when it can be paid for, driven piece by piece."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ..config import MergeConfig
from ..disk.state import RunState
from ..disk.writer import Writer
from ..distributed import Processes
from ..evaluate.heldout import HeldOutLoss, Split, device_of
from ..pieces import BACKWARD, FORWARD, Pieces
from ..search.evaluation import Evaluation
from ..search.grouped import GroupedSearch
from ..window.window import CheckpointWindow
from .budget import GRADIENT_COST, MergeCost, Overhead, Plan, affordable, plans
from .merge import Merged, Merging
from .progress import SlowProgress
from .schedule import Durations, Run

logger = logging.getLogger("traj_merge_callback")
# Kinds of pieces that the progress bar counts.
_BATCH = (FORWARD, BACKWARD)


@dataclass(frozen=True)
class Finished:
    """A merge that is done, the seconds it took from training, and those of its longest pause."""

    merged: Merged
    seconds: float
    longest_pause: float


class MergeRuns:
    """Begins merges, and drives them as far as the schedule and the overhead budget allow.

    Args:
        config: the options.
        heldout: the held-out loss.
        merging: makes merges.
        overhead: the time taken from training so far.
        writer: of files.
        processes: those that train the model together. What depends on time is decided by the first one.
    """

    def __init__(
        self,
        config: MergeConfig,
        heldout: HeldOutLoss,
        merging: Merging,
        overhead: Overhead,
        writer: Writer,
        processes: Processes,
    ) -> None:
        self._processes = processes
        self._config = config
        self._heldout = heldout
        self._merging = merging
        self._overhead = overhead
        self._writer = writer
        self._durations = Durations()
        self._run: Run[Merged | None] | None = None
        self._progress: Callable[[], SlowProgress] = lambda: SlowProgress("", 0, enabled=False)
        self._said: Plan | None = Plan(config.evaluations)
        # What was known when the merge under way began.
        self.before: RunState | None = None

    @property
    def under_way(self) -> bool:
        """Whether a merge, or a trial of what its pieces take, is not done yet."""
        return self._run is not None

    def begin(
        self, model: nn.Module, window: CheckpointWindow, memory: RunState, step: int, plan: Plan | None = None
    ) -> bool:
        """Begin a merge of the window, whose newest row is of this step.

        Args:
            model: the model being trained.
            window: at least two rows.
            memory: what is known from earlier merges, which this one adds to.
            step: optimizer step.
            plan: what may be spent; by default what the overhead budget can pay for.

        Returns:
            Whether one was begun; it was not if it cannot be paid for yet.
        """
        if plan is None and (plan := self._processes.from_rank0(lambda: self._affordable(window, step))) is None:
            return False
        if len({tuple(steps) for steps in self._processes.all_gather_object(list(window.steps))}) > 1:
            raise RuntimeError("the windows of the processes differ, because a checkpoint was lost in one of them")
        self.before = copy.deepcopy(memory)
        memory.last_merge_step = step
        self._run = self._in_pieces(self._merging.merge(model, window, memory, step, plan), model)
        batches = plan.evaluations * self._heldout.num_batches("search") + 2 * self._heldout.num_batches("report")
        enabled = self._config.progress
        self._progress = lambda: SlowProgress(f"merging at step {step}", batches, enabled=enabled)
        return True

    def try_out(self, model: nn.Module, window: CheckpointWindow) -> None:
        """Learn what pieces take, where that matters and is not known."""
        config = self._config
        matters = config.schedule == "interleaved" or (
            config.schedule == "blocking" and config.max_overhead is not None
        )
        if matters and self._run is None and not self._durations.known:
            self._run = self._in_pieces(self._merging.probe(model, window), model)

    def go_on(self) -> Finished | None:
        """Do as many pieces as may be done between two training steps."""
        if self._run is None:
            return None
        allowance, pause = self._processes.from_rank0(lambda: (self._overhead.allowance, self._overhead.pause))
        # A piece of a new kind has to be tried.
        if allowance <= 0 or allowance < self._run.next_piece < math.inf:
            return None
        return self._drive(lambda run: run.advance(min(allowance, pause)))

    def evaluate(self, model: nn.Module, window: CheckpointWindow, split: Split) -> Evaluation:
        """Evaluate the model with the weights that it has now, at once."""
        pieces = self._merging.live(model, window, split)
        run = Run(pieces, Durations(), device_of(model), self._writer.wait, self._processes)
        run.complete(lambda kind: None)
        assert run.result is not None
        return run.result

    def complete(self) -> Finished | None:
        """Do all pieces that are left, while training waits."""
        with self._progress() as progress:
            return self._drive(lambda run: run.complete(lambda kind: progress.advance() if kind in _BATCH else None))

    def abandon(self) -> None:
        """Give up what is under way."""
        if self._run is not None:
            self._run.abandon()
            self._run = None

    def _in_pieces(self, pieces: Pieces[Merged | None], model: nn.Module) -> Run[Merged | None]:
        return Run(pieces, self._durations, device_of(model), self._writer.wait, self._processes)

    def _drive(self, drive: Callable[[Run[Merged | None]], None]) -> Finished | None:
        run = self._run
        if run is None:
            return None
        started, before = time.perf_counter(), run.seconds
        try:
            drive(run)
        finally:
            # On a GPU the wall time is also that of the training steps queued before.
            self._overhead.hide(time.perf_counter() - started - (run.seconds - before))
            if run.done:
                self._run = self.before = None
        if not run.done:
            return None
        if (merged := run.result) is None:
            self._cut_batches()
            return None
        return Finished(merged, run.seconds, run.longest_pause)

    def _affordable(self, window: CheckpointWindow, step: int) -> Plan | None:
        """The largest plan that the budget can pay for now; what was decided is logged when it changes."""
        config, heldout = self._config, self._heldout
        evaluations = config.evaluations if self._merging.needs_evaluations else 2
        if config.max_overhead is None:
            return Plan(evaluations)
        searched, reported = (
            -(-count // self._processes.size) for count in (heldout.searchable, heldout.num_batches("report"))
        )
        cost = MergeCost(searched, reported, heldout.parts, window.num_pieces)
        wanted = plans(evaluations, 2 if config.groups is None else GroupedSearch.cost + 2)
        allowance = self._overhead.allowance
        if not self._durations.known:
            return None
        plan = affordable(wanted, cost, self._durations, allowance)
        if plan is None and not self._merging.needs_evaluations and allowance > 0:
            plan = Plan(0)
        if plan != self._said:
            needed = [cost.seconds(one, self._durations) for one in (wanted[0], wanted[-1])]
            logger.info(
                "step %d: max_overhead=%s leaves %.3g s for a merge, which takes up to %.3g s, and %.3g s at least: %s",
                step,
                config.max_overhead,
                allowance,
                *needed,
                "it waits for the next checkpoint" if plan is None else _described(plan),
            )
            self._said = plan
        return plan

    def _cut_batches(self) -> None:
        """Cut held-out batches, if evaluating one takes longer than a pause may."""
        passes = GRADIENT_COST if self._merging.needs_evaluations else 1
        longest, pause = (
            passes * self._durations.expected(FORWARD),
            self._processes.from_rank0(lambda: self._overhead.pause),
        )
        if longest > pause and self._heldout.longest > 1 and self._config.schedule != "blocking":
            pieces = math.ceil(longest / pause)
            logger.info("held-out batches are cut into %d: one takes %.3g s, a pause %.3g s", pieces, longest, pause)
            self._heldout.cut(pieces)
            self._durations.scale(FORWARD, 1.0 / pieces)


def _described(plan: Plan) -> str:
    if not plan.evaluations:
        return "the recipe's merge is published without measuring its loss"
    return f"it gets {plan.evaluations} passes over {plan.share:.0%} of the search split"
