"""What a merge costs, by measurement, and how much of it the overhead budget can pay for."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import defaultdict, deque
from dataclasses import dataclass

import torch

from ..config import MergeConfig
from ..search.problem import GRADIENT_COST
from ..window.pieces import COMBINE, FORWARD, PROJECT, PUBLISH

logger = logging.getLogger("traj_merge_callback")
# Passes that the default search can still do something useful with.
_FEWEST_EVALUATIONS = 5
# By default a pause lasts at most so many training steps; pieces are planned for less, so that one may take longer.
_PAUSE_STEPS = 3.0
_MARGIN = 0.6
_REMEMBERED = 8
# Shares of the run's time: what is worth a warning, and what it shows the way to.
_MUCH, _LITTLE = 0.05, 0.02
# With fewer held-out batches than this, losses say little.
_FEWEST_BATCHES = 4


class Stopwatch:
    """Seconds of work on a device: on CUDA those of the kernels queued between two laps, which it waits for.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._event = self._stream.record_event(torch.cuda.Event(enable_timing=True)) if self._stream else None
        self._began = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        if self._stream is not None and self._event is not None:
            last, self._event = self._event, self._stream.record_event(torch.cuda.Event(enable_timing=True))
            self._event.synchronize()
            return last.elapsed_time(self._event) / 1000.0
        last_time, self._began = self._began, time.perf_counter()
        return self._began - last_time


class Durations:
    """Seconds that pieces of each kind took, lately."""

    def __init__(self) -> None:
        self._seen: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))

    def learn(self, kind: str, seconds: float) -> None:
        """Note the duration of one piece."""
        self._seen[kind].append(seconds)

    def scale(self, kind: str, factor: float) -> None:
        """Note that pieces of this kind have become longer by this factor."""
        self._seen[kind] = deque((seconds * factor for seconds in self._seen[kind]), maxlen=_REMEMBERED)

    @property
    def known(self) -> bool:
        """Whether pieces have been done."""
        return bool(self._seen)

    def expected(self, kind: str) -> float:
        """Median seconds of a piece of this kind; 0 if none was done yet."""
        return statistics.median(self._seen[kind]) if self._seen.get(kind) else 0.0

    def longest(self, kind: str) -> float:
        """Seconds of the longest recent piece of this kind; infinite if none was done yet."""
        return max(self._seen[kind]) if self._seen.get(kind) else math.inf


def budgets(evaluations: int, fewest: int) -> list[int]:
    """What a merge may be given, in passes over the search split, live included: ever less.

    Args:
        evaluations: what may be spent at most.
        fewest: what the search needs at least.
    """
    least = max(fewest, min(evaluations, _FEWEST_EVALUATIONS))
    return list(dict.fromkeys([evaluations, (evaluations + least) // 2, least]))


@dataclass(frozen=True)
class MergeCost:
    """What merges of one window cost.

    Args:
        search_batches, report_batches: batches of the two splits.
        parts: of the search split.
        products: pieces of one product with the window.
    """

    search_batches: int
    report_batches: int
    parts: int
    products: int

    def seconds(self, evaluations: int, durations: Durations) -> float:
        """Seconds that a merge takes at most, from what its pieces took before."""
        batches = evaluations * self.search_batches + 2 * self.report_batches
        gradients = evaluations / GRADIENT_COST * self.parts
        combine = (evaluations + 2) * self.products * durations.expected(COMBINE)
        project = gradients * self.products * max(durations.expected(PROJECT), durations.expected(COMBINE))
        return batches * durations.expected(FORWARD) + combine + project + durations.expected(PUBLISH)


def affordable(wanted: list[int], cost: MergeCost, durations: Durations, allowance: float) -> int | None:
    """The first budget that costs no more than the allowance in seconds, None if even the last one does."""
    return next((budget for budget in wanted if cost.seconds(budget, durations) <= allowance), None)


class Overhead:
    """The share of wall time that everything here takes, measured, and what is left of what it may take.

    Args:
        largest_share: of wall time; None: no limit.
        max_pause: seconds between two training steps that may be spent; None: three training steps' time.
    """

    def __init__(self, largest_share: float | None, max_pause: float | None) -> None:
        self._largest_share = largest_share
        self._max_pause = max_pause
        self._began = self._left = time.perf_counter()
        self._step_seconds: deque[float] = deque(maxlen=20)
        self._entered: float | None = None
        self._earlier_s = self._hidden_s = 0.0
        self.busy_s = 0.0

    def begin(self, busy_s: float = 0.0, wall_s: float = 0.0) -> None:
        """Start counting, after so many seconds of an earlier part of the run."""
        self._began = self._left = time.perf_counter()
        self.busy_s, self._earlier_s = busy_s, wall_s

    @property
    def wall_s(self) -> float:
        """Seconds of training so far."""
        return self._earlier_s + time.perf_counter() - self._began

    @property
    def share(self) -> float:
        """Share of wall time spent here so far, now included."""
        now = 0.0 if self._entered is None else time.perf_counter() - self._entered - self._hidden_s
        return (self.busy_s + now) / max(self.wall_s, 1e-9)

    @property
    def allowance(self) -> float:
        """Seconds that may be spent now."""
        return math.inf if self._largest_share is None else self._largest_share * self.wall_s - self.busy_s

    @property
    def max_pause(self) -> float:
        """Seconds that a pause between two training steps must not exceed."""
        if self._max_pause is not None:
            return self._max_pause
        return _PAUSE_STEPS * statistics.median(self._step_seconds) if self._step_seconds else math.inf

    @property
    def pause(self) -> float:
        """Seconds to plan for between two training steps, below ``max_pause`` by a margin."""
        return _MARGIN * self.max_pause

    def warn(self, seconds: float, config: MergeConfig) -> None:
        """Say what the first merge's cost means for the run, if that is much and no limit was set.

        Args:
            seconds: that the merge took.
            config: the options.
        """
        if self._largest_share is not None or not self._step_seconds:
            return
        training = config.merge_every * statistics.median(self._step_seconds)
        if (share := seconds / (training + seconds)) <= _MUCH:
            return
        factor = seconds * (1 / _LITTLE - 1) / training
        every = math.ceil(config.merge_every * factor / config.capture_interval) * config.capture_interval
        ways = [f"merge_every={every}"]
        if (batches := int(config.heldout_batches / factor)) >= _FEWEST_BATCHES:
            ways.append(f"heldout_batches={batches}")
        logger.warning(
            "merges take %.0f %% of the run's time: %.2g s for one every %d steps. %s would make that %.0f %%; "
            "max_overhead=%s would make merges wait until they are paid for",
            100 * share,
            seconds,
            config.merge_every,
            " or ".join(ways),
            100 * _LITTLE,
            _LITTLE,
        )

    def enter(self, entered: float) -> None:
        """Training waits since this time of ``time.perf_counter()``, at a step boundary or at its end."""
        self._step_seconds.append(time.perf_counter() - self._left)
        self._entered = entered

    def hide(self, seconds: float) -> None:
        """Do not count these seconds since :meth:`enter`: training's own kernels were still running."""
        self._hidden_s += seconds

    def leave(self) -> None:
        """Training goes on."""
        self._left = time.perf_counter()
        if self._entered is not None:
            self.spend(self._left - self._entered - self._hidden_s)
        self._entered, self._hidden_s = None, 0.0

    def spend(self, seconds: float) -> None:
        """Count seconds by which training was held up."""
        self.busy_s += seconds
