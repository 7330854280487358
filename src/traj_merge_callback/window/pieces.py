"""Long work in short pieces, between which training goes on.

A computation is a generator that yields, before each of its pieces, what kind of piece comes next. Its driver decides
whether that piece runs now or after the next training step, and learns from the kind how long it will take.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")

Pieces = Generator[str, None, T]

COMBINE, FORWARD, BACKWARD, PROJECT, SEARCH, PUBLISH = "combine", "forward", "backward", "project", "search", "publish"
# A collective: such a piece does nothing before it that could fail on one rank alone.
EXCHANGE = "exchange"
# Nothing to do until the writer's thread has written a file.
WAIT = "wait"


def finish(pieces: Pieces[T]) -> T:
    """Do all the pieces at once and return the result."""
    while True:
        try:
            next(pieces)
        except StopIteration as stop:
            return stop.value
