"""Files are written in a thread of their own, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

T = TypeVar("T")


class Writer:
    """One thread that writes files in the order in which they are submitted.

    It ends, with everything written, when it is closed or when Python exits.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="traj-merge-writer")
        self._left_alone: list[Future[Any]] = []

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Write something; the caller asks for the result."""
        return self._thread.submit(job)

    def leave(self, job: Callable[[], None]) -> None:
        """Write something that nobody waits for; :meth:`check` tells if it failed."""
        self._left_alone.append(self._thread.submit(job))

    def check(self) -> None:
        """Raise what went wrong in the first job left alone that failed since the last time."""
        while self._left_alone and self._left_alone[0].done():
            self._left_alone.pop(0).result()

    def wait(self) -> None:
        """Wait until everything submitted is written, well or not."""
        wait([self._thread.submit(int)])

    def close(self) -> None:
        """Wait, and end the thread."""
        self._thread.shutdown(wait=True)
