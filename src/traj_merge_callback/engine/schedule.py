"""Driving a merge's pieces: between training steps, or all at once."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from ..distributed import Processes
from ..evaluate.isolation import preserved_rng
from ..pieces import WAIT, Failed, Pieces, make_known

T = TypeVar("T")
_REMEMBERED = 8


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
    """What pieces of each kind take, in seconds, learned from the last few."""

    def __init__(self) -> None:
        self._seen: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))

    def learn(self, kind: str, seconds: float) -> None:
        """A piece of this kind took so long."""
        self._seen[kind].append(seconds)

    def scale(self, kind: str, factor: float) -> None:
        """Pieces of this kind have become longer by this factor."""
        self._seen[kind] = deque((seconds * factor for seconds in self._seen[kind]), maxlen=_REMEMBERED)

    @property
    def known(self) -> bool:
        """Whether pieces have been done."""
        return bool(self._seen)

    def expected(self, kind: str) -> float:
        """Seconds that a piece of this kind usually takes; 0 if none was done yet."""
        return statistics.median(self._seen[kind]) if self._seen.get(kind) else 0.0

    def longest(self, kind: str) -> float:
        """Seconds that a piece of this kind took at most, lately; infinite if none was done yet."""
        return max(self._seen[kind]) if self._seen.get(kind) else math.inf


class Run(Generic[T]):
    """Pieces under way in the training thread.

    Args:
        pieces: what is to be done.
        durations: what pieces take, known from earlier runs.
        device: where they are done.
        wait: waits for what a piece of the kind WAIT waits for.
        processes: those that do the same pieces, one after the other, together.
    """

    def __init__(
        self,
        pieces: Pieces[T],
        durations: Durations,
        device: torch.device,
        wait: Callable[[], None],
        processes: Processes,
    ) -> None:
        self._pieces = pieces
        self._processes = processes
        self._wait = wait
        self._durations = durations
        self._device = device
        self._next: str | None = None
        self.seconds = 0.0
        self.longest_pause = 0.0
        self.result: T | None = None
        self.done = False

    @property
    def next_piece(self) -> float:
        """Seconds that the next piece will take at most, by what is known; infinite if nothing is."""
        return 0.0 if self._next in (None, WAIT) else self._durations.longest(str(self._next))

    def advance(self, limit: float) -> None:
        """Do pieces, at least one, as long as the next one is expected to end within ``limit`` seconds.

        Raises:
            Exception: what a piece raised; the run is done then.
        """
        watch, spent, kind = Stopwatch(self._device), 0.0, None
        with preserved_rng():
            while (
                not self.done and (spent == 0.0 or spent + self.next_piece <= limit) and not kind == self._next == WAIT
            ):
                kind = self._next
                took = self._do(watch)
                spent += took
                if kind is not None and kind != WAIT:
                    self._durations.learn(kind, took)
        self.seconds += spent
        self.longest_pause = max(self.longest_pause, spent)

    def complete(self, on_piece: Callable[[str | None], None]) -> None:
        """Do all pieces that are left, waiting for what must be waited for."""
        before = self.seconds
        while not self.done:
            if self._next == WAIT:
                began = time.perf_counter()
                self._wait()
                self.seconds += time.perf_counter() - began
            kind = self._next
            self.advance(0.0)
            on_piece(kind)
        self.longest_pause = max(self.longest_pause, self.seconds - before)

    def abandon(self) -> None:
        """Give up what is left."""
        self.done = True
        self._pieces.close()

    def _do(self, watch: Stopwatch) -> float:
        """Do one piece, which fails in all processes if it fails in one; the longest of their durations."""
        error = self._step(lambda: next(self._pieces))
        while True:
            try:
                return self._processes.all_reduce_error(error, watch.lap())[0]
            except BaseException as agreed:
                known = make_known(agreed)
            # The pieces may know what to do about it.
            error = self._step(lambda: self._pieces.throw(known))  # noqa: B023
            if error is not None:
                self.done = True
                raise error

    def _step(self, go: Callable[[], str]) -> BaseException | None:
        try:
            self._next = go()
        except StopIteration as stop:
            self.result, self.done = stop.value, True
        except BaseException as error:
            return error
        return self._next.error if isinstance(self._next, Failed) else None
