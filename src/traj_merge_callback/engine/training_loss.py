"""Spikes of the training loss: has it risen far above its recent range?"""

from __future__ import annotations

import logging
import math
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distributed import Processes
from ..search.checks import shown
from ..search.problem import SearchState

logger = logging.getLogger("traj_merge_callback")
# A loss is far above what is usual if it is so by this share of it, and by so many standard deviations.
_CLEARLY, _DEVIATIONS = 0.02, 6.0
# What is usual is the median of so many losses; of more of them the deviation is estimated. Fewer say nothing.
_CENTRE, _RECENT, _FEWEST = 8, 32, 10
# Standard deviation of a normal distribution, by the median of the absolute differences of two numbers drawn from it.
_PER_DIFFERENCE = 1.4826 / math.sqrt(2.0)
# So many losses in a row begin a spike: one alone, or two, may be odd batches. After so many they are what is usual.
_CONFIRMED, _LASTING = 3, 100


class LossWatch:
    """The training loss of a run, and whether it is in a spike.

    What is usual is the median of the last losses, and how far they are from each other one after another, also in the
    median: neither moves when a few losses are far off, nor because the loss falls. Losses of a spike are not counted
    among those that are usual, unless it does not end: then they are what is usual now, as after a change of the data.

    Attributes:
        since: the step from which on weights are those of a spike that has not ended, which is that of the last usual
            loss before it; None: there is none.
    """

    def __init__(self) -> None:
        self.since: int | None = None
        self._usual: deque[float] = deque(maxlen=_RECENT)
        self._last_usual = 0  # the step of the last one
        # Losses since then, which are far off.
        self._far: deque[float] = deque(maxlen=_LASTING)

    @property
    def usual(self) -> float:
        """The median of the last losses that were usual."""
        return float(np.median(list(self._usual)[-_CENTRE:])) if self._usual else math.nan

    def see(self, step: int, loss: float) -> None:
        """One more loss, of a later step than the last one; nan and infinity are far off."""
        if not self._is_far(loss):
            self._usual.append(loss)
            self._last_usual = step
            self.end_spike()
            return
        self._far.append(loss)
        if len(self._far) >= _CONFIRMED:
            self.since = self._last_usual
        if len(self._far) == _LASTING and all(map(math.isfinite, self._far)):
            self._usual.extend(self._far)
            self.end_spike()

    def end_spike(self) -> None:
        """There is no spike, or no more."""
        self._far.clear()
        self.since = None

    def _is_far(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        if len(self._usual) < _FEWEST:
            return False
        usual = self.usual
        deviation = _PER_DIFFERENCE * float(np.median(np.abs(np.diff(self._usual))))
        return loss - usual > max(_DEVIATIONS * deviation, _CLEARLY * abs(usual))


class TrainingLoss:
    """Watches the training loss for spikes; no CPU waits for a CUDA device.

    Args:
        processes: the ranks; rank 0's loss is looked at.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._watch = LossWatch()
        # Losses on their way from a GPU.
        self._arriving: deque[tuple[int, Tensor, torch.cuda.Event]] = deque()
        self._said: int | None = None
        self._is_blind = False
        #: Whether there was a spike since this was last set to False.
        self.spiked = False

    @property
    def since(self) -> int | None:
        """The step from which on weights are those of a spike that has not ended; None: there is none."""
        return self._watch.since

    def noted_in(self, state: SearchState) -> SearchState:
        """Note for a merge whether there was a spike, and is; a collective. Returns the state."""
        state.spiked, state.in_a_spike = self._processes.from_rank0(lambda: (self.spiked, self.since is not None))
        return state

    def restart(self) -> None:
        """The run went back: losses from before that say nothing of a spike any more."""
        self._arriving.clear()
        self._watch.end_spike()

    def see(self, step: int, loss: Any) -> None:
        """One more loss.

        Args:
            step: of a later optimizer step than the last one.
            loss: a number, or a tensor that holds one; None: nothing is known of this step. After anything else no more
                is looked at.
        """
        if loss is None or self._is_blind or not self._processes.is_rank_zero:
            return
        try:
            self._read(step, loss)
        except (TypeError, ValueError, RuntimeError):
            self._is_blind = True
            logger.info("spikes are not looked for in the training loss, as it is no number: %s", shown(loss))

    def _read(self, step: int, loss: Any) -> None:
        one = loss.detach().reshape(()) if isinstance(loss, Tensor) else loss
        if isinstance(one, Tensor) and one.is_cuda:
            arrived = torch.empty((), dtype=torch.float32, pin_memory=True)
            arrived.copy_(one, non_blocking=True)
            self._arriving.append((step, arrived, torch.cuda.current_stream(one.device).record_event()))
        else:
            self._see(step, float(one))
        while self._arriving and self._arriving[0][2].query():
            seen, arrived, _ = self._arriving.popleft()
            self._see(seen, float(arrived))

    def _see(self, step: int, loss: float) -> None:
        self._watch.see(step, loss)
        if (since := self._watch.since) is None:
            return
        self.spiked = True
        if since != self._said:
            self._said = since
            logger.info(
                "step %d: the training loss is %.4g, and was %.4g until step %d: a spike",
                step,
                loss,
                self._watch.usual,
                since,
            )
