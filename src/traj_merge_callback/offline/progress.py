"""A progress bar on what takes longer than a second."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_DELAY_S = 1.0


class Bar:
    """A bar that appears a second after it began.

    Args:
        progress: draws it.
        what: is done.
        total: units of work; may be more than there is in the end.
    """

    def __init__(self, progress: Progress, what: str, total: float) -> None:
        self._progress = progress
        self._task = progress.add_task(what, total=total)
        self._began = time.monotonic()
        self._started = False

    def advance(self, units: float = 1.0) -> None:
        """So many units more are done."""
        self._progress.advance(self._task, units)
        if not self._started and time.monotonic() - self._began > _DELAY_S:
            self._started = True
            self._progress.start()


@contextmanager
def bar(what: str, total: float, *, show: bool) -> Iterator[Bar]:
    """A bar on the error stream, which vanishes when the block ends; not drawn where that is no terminal."""
    console = Console(stderr=True, quiet=not show)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal))
    try:
        yield Bar(progress, what, total)
    finally:
        progress.stop()
