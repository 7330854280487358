"""Ctrl-C and SIGTERM wait while live weights are out of place, and are raised when everything is put back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Delay:
    """The handlers that were in place, and what has arrived since; one for the process, because handlers are."""

    def __init__(self) -> None:
        self.depth = 0
        self.handlers: dict[int, Any] = {}
        self.pending: list[tuple[int, FrameType | None]] = []

    def receive(self, number: int, frame: FrameType | None) -> None:
        if any(number == waiting for waiting, _ in self.pending):
            # The second Ctrl-C: whoever presses it again cannot wait, say for a forward pass that hangs.
            self.handlers[number](number, frame)
        self.pending.append((number, frame))

    def deliver(self) -> None:
        while self.pending:
            number, frame = self.pending.pop(0)
            self.handlers[number](number, frame)


_delay = _Delay()


@contextmanager
def delayed_interrupts() -> Iterator[None]:
    """Hold back handlers of SIGINT and SIGTERM that are written in Python until the outermost block is done.

    An exception out of a signal handler may strike between any two operations, also inside a ``finally`` that puts
    things back. Held back, it strikes after the block. A second Ctrl-C is not held back. Only the main thread runs
    handlers, so in another thread there is nothing to do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _delay.depth == 0:
        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        _delay.handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
        for number in _delay.handlers:
            signal.signal(number, _delay.receive)
    _delay.depth += 1
    try:
        yield
    finally:
        _delay.depth -= 1
        if _delay.depth == 0:
            for number, handler in _delay.handlers.items():
                signal.signal(number, handler)
            _delay.deliver()
