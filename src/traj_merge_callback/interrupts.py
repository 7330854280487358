"""Putting things back must not be cut in half by Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def delayed_interrupts() -> Iterator[None]:
    """Hold back SIGINT and SIGTERM handlers written in Python until the block is done, then run them.

    Only the main thread runs signal handlers, so in another thread there is nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    delayed = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in delayed:
        signal.signal(number, lambda signum, frame: received.append((signum, frame)))
    try:
        yield
    finally:
        for number, handler in delayed.items():
            signal.signal(number, handler)
        for signum, frame in received:
            handler = delayed[signal.Signals(signum)]
            assert callable(handler)
            handler(signum, frame)
