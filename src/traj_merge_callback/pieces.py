"""Long work in short pieces, between which training goes on.

A computation is a generator that yields, before each of its pieces, what kind of piece comes next. Whoever drives it
decides whether that happens now or after the next training step, and learns from the kind how long it will take.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")

Pieces = Generator[str, None, T]

COMBINE, FORWARD, BACKWARD, PROJECT, SEARCH, PUBLISH = "combine", "forward", "backward", "project", "search", "publish"
# Processes wait for one another: such a piece does nothing before that could fail in one of them alone.
EXCHANGE = "exchange"
# Nothing to do before a file is written: whoever must go on waits for the writer.
WAIT = "wait"


def finish(pieces: Pieces[T]) -> T:
    """Do all the pieces at once and return the result."""
    while True:
        try:
            next(pieces)
        except StopIteration as stop:
            return stop.value


class Failed(str):
    """Instead of the kind of a piece: the last one failed, with this ``error``."""

    error: Exception


def reported(pieces: Pieces[T]) -> Pieces[T]:
    """Pieces that tell their driver of a failure before anyone catches it.

    The driver throws it back in, and into the pieces of the other processes, so that all go on in the same way.
    """
    try:
        return (yield from pieces)
    except Exception as error:
        if not is_known(error):
            failed = Failed("failed")
            failed.error = error
            yield failed
        raise


def make_known(error: BaseException) -> BaseException:
    """Note that all processes know of a failure."""
    error.__dict__["all_know"] = True
    return error


def is_known(error: BaseException) -> bool:
    """Whether all processes know of a failure."""
    return bool(error.__dict__.get("all_know"))
