"""How much of a merge is affordable: the overhead budget, and what merges cost by measurement."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from dataclasses import dataclass

from ..pieces import COMBINE, FORWARD, PROJECT, PUBLISH
from .schedule import Durations

# Passes that the default search can still do something useful with.
_FEWEST_EVALUATIONS = 5
_SMALLEST_SHARE = 0.5
# A forward and a backward pass, in forward passes.
GRADIENT_COST = 3
_PAUSE_STEPS = 3.0
_MARGIN = 0.6


@dataclass(frozen=True)
class Plan:
    """How much a merge may do.

    Args:
        evaluations: passes over the search split, live included; 0: nothing is evaluated, a recipe's merge is published
            as it is.
        share: share of the search split that is used.
    """

    evaluations: int
    share: float = 1.0


def plans(evaluations: int, fewest: int) -> list[Plan]:
    """Ever cheaper ways to merge: fewer candidates first, then less held-out text.

    Args:
        evaluations: what may be spent at most.
        fewest: what the search needs at least.
    """
    least = max(fewest, min(evaluations, _FEWEST_EVALUATIONS))
    middle = (evaluations + least) // 2
    counts = dict.fromkeys([evaluations, middle, least])
    return [*[Plan(count) for count in counts], Plan(least, _SMALLEST_SHARE)]


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

    def seconds(self, plan: Plan, durations: Durations) -> float:
        """Seconds a merge takes at most, from what its pieces took before."""
        evaluated = plan.evaluations * plan.share * self.search_batches + 2 * self.report_batches
        gradients = plan.evaluations / GRADIENT_COST * self.parts
        combining = (plan.evaluations + 2) * self.products * durations.expected(COMBINE)
        projecting = gradients * self.products * max(durations.expected(PROJECT), durations.expected(COMBINE))
        return evaluated * durations.expected(FORWARD) + combining + projecting + durations.expected(PUBLISH)


def affordable(wanted: list[Plan], cost: MergeCost, durations: Durations, allowance: float) -> Plan | None:
    """The first plan that costs no more than the allowance in seconds, None if even the last one does."""
    return next((plan for plan in wanted if cost.seconds(plan, durations) <= allowance), None)


class Overhead:
    """The share of wall time that everything here takes, measured, and what is left of what it may take.

    Args:
        largest_share: of wall time; None: no limit.
        max_pause: seconds between two training steps that may be taken; None: three training steps' time.
    """

    def __init__(self, largest_share: float | None, max_pause: float | None) -> None:
        self._largest_share = largest_share
        self._max_pause = max_pause
        self._began = self._left = time.perf_counter()
        self._step_seconds: deque[float] = deque(maxlen=20)
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
        """Share of wall time taken so far."""
        return self.busy_s / max(self.wall_s, 1e-9)

    @property
    def allowance(self) -> float:
        """Seconds that may be taken now."""
        return math.inf if self._largest_share is None else self._largest_share * self.wall_s - self.busy_s

    @property
    def max_pause(self) -> float:
        """Seconds that a pause between two training steps must not exceed."""
        if self._max_pause is not None:
            return self._max_pause
        return _PAUSE_STEPS * statistics.median(self._step_seconds) if self._step_seconds else math.inf

    @property
    def pause(self) -> float:
        """Seconds to aim at between two training steps, so that a piece may take longer than it used to."""
        return _MARGIN * self.max_pause

    def enter(self) -> None:
        """Training has come to a step boundary."""
        self._step_seconds.append(time.perf_counter() - self._left)

    def hide(self, seconds: float) -> None:
        """So many seconds since :meth:`enter` were not taken from training."""
        self._hidden_s += seconds

    def leave(self, entered: float) -> None:
        """Training goes on; it was entered at this time of ``time.perf_counter()``."""
        self._left = time.perf_counter()
        self.take(self._left - entered - self._hidden_s)
        self._hidden_s = 0.0

    def take(self, seconds: float) -> None:
        """So many seconds were taken from training."""
        self.busy_s += seconds
