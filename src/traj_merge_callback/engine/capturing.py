"""Which optimizer steps bring a row of the window, or a sample of one, and what is done where rows are being read."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from typing import Literal

from torch import nn

from ..config import MergeConfig
from ..distributed import Processes
from ..window.window import CheckpointWindow

logger = logging.getLogger("traj_merge_callback")
Action = Literal["row", "sample", "nothing"]


def passed(every: int, previous: int, step: int) -> bool:
    """Whether a multiple of ``every`` lies in ``(previous, step]``: also true if the exact step was skipped."""
    return step // every > previous // every


def say_if_too_short(config: MergeConfig, steps: float) -> None:
    """Say if a run is over before its first merge is due; a warning where it has none at its end either.

    Args:
        config: the options.
        steps: that the run takes in all; not positive or infinite if nobody knows.
    """
    first = math.ceil(max(config.start_step, 1) / config.merge_every) * config.merge_every
    if not 0 < steps < first:
        return
    at_end = config.merge_at_end and steps >= config.start_step + config.capture_interval
    logger.log(
        logging.INFO if at_end else logging.WARNING,
        "merge_every=%d, start_step=%d: the first merge is due at step %d, and this run ends at step %d%s; for more "
        "merges lower merge_every or start_step",
        config.merge_every,
        config.start_step,
        first,
        steps,
        ", where the only merge is made" if at_end else " without any merge",
    )


class Capturing:
    """Takes rows every ``capture_every`` steps, and samples of them between.

    Args:
        config: the options.
        processes: the ranks, which take the same at the same steps.
    """

    def __init__(self, config: MergeConfig, processes: Processes) -> None:
        self._start, self._kind = config.start_step, config.row_kind
        self._every, self._samples = config.capture_interval, config.samples
        self._processes = processes
        #: The step of the last row.
        self.row_step: int | None = None
        #: Whether the last capture, when it was last asked for, was left out as not finite on some rank.
        self.left_out = False
        self._missed = False  # whether a sample of the mean row begun was left out
        self._said = False

    def forget(self) -> None:
        """Another window, or another model, takes the place of the one before."""
        self.row_step, self._missed, self.left_out = None, False, False

    def is_due(self, previous: int, step: int) -> bool:
        """Whether a row, or a sample of one, is due at a step, the last one before being ``previous``."""
        intervals = self._every, self._every // self._samples
        return step >= self._start and any(passed(every, previous, step) for every in intervals)

    def row_is_due(self, previous: int, step: int) -> bool:
        """Whether a row is due at a step."""
        return step >= self._start and passed(self._every, previous, step)

    def plan(self, window: CheckpointWindow, previous: int, step: int, skipped: Callable[[], bool]) -> Action | None:
        """What is taken at a step where something is due; None if mixed precision skipped that step on some rank.

        Rows that a merge or a state being written still reads are not written; a state reads the running mean as well.
        """
        in_use = float(window.is_in_use), float(window.mean_is_in_use)
        was_skipped, rows_in_use, mean_in_use = self.settle(window, float(skipped()), *in_use)
        if was_skipped:
            return None
        is_row, kind = passed(self._every, previous, step), self._kind
        if kind == "mean":
            # A row is the mean of all its samples: those of a span with gaps are forgotten, and of a span without end.
            self._missed |= bool(mean_in_use)
            if is_row and (self._missed or rows_in_use):
                window.forget_samples()
                self._missed = False
                return "nothing"
        if mean_in_use or (rows_in_use and kind == "last"):
            return "nothing"
        # A span that cannot end now ends later, where rows are means of spans of any length.
        return "row" if is_row and not rows_in_use else "sample"

    def take(
        self, action: Action, window: CheckpointWindow, model: nn.Module, step: int, spoiled: Collection[str] = ()
    ) -> None:
        """Do what is planned; rows of the names in ``spoiled`` leave the window first."""
        with self._processes.raise_on_all():
            if action == "row":
                window.push(model, step, spoiled)
                self.row_step = step
            elif action == "sample":
                window.sample(model, step)

    def take_last(self, window: CheckpointWindow, model: nn.Module, step: int, spoiled: Collection[str] = ()) -> None:
        """Let live be a row at the end of training, if it is none yet on some rank."""
        self.settle(window)
        if self._processes.all_reduce_max(float(window.steps[-1:] != (step,)))[0]:
            self.take("row", window, model, step, spoiled)

    def can_begin_again(self, window: CheckpointWindow, step: int) -> bool:
        """Whether a merge begun at ``step`` has its rows and live weights still: nothing was captured since."""
        # If live is no row, the merge is going to fail: its weights are not finite.
        return self.row_step == step and window.steps[-1:] == (step,)

    def settle(self, window: CheckpointWindow, *values: float) -> list[float]:
        """Wait for the last capture on all ranks, and say once if it was left out as not finite.

        Returns:
            The largest of each value over all ranks.
        """
        left_out, *found = window.settle_together(*values)
        self.left_out = bool(left_out)
        if left_out and not self._said:
            self._said = True
            if self._processes.is_rank_zero:
                logger.warning(
                    "the model's weights were not finite when a checkpoint was taken: it is left out of the window, "
                    "as are later ones like it"
                )
        return found
