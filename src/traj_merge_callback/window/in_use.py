"""Who reads rows now, so that nobody writes them meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class InUse:
    """Counts the readers of a window's rows, in any thread."""

    def __init__(self) -> None:
        # How many read rows now, and how many of them the running mean too.
        self._readers = self._mean_readers = 0
        self._lock = threading.Lock()

    @contextmanager
    def in_use(self, *, mean: bool = False) -> Iterator[None]:
        """Within the context rows are read, piece by piece or in another thread: no row must be pushed.

        Args:
            mean: whether the running mean is read too: nothing must be sampled either.
        """
        with self._lock:
            self._readers += 1
            self._mean_readers += mean
        try:
            yield
        finally:
            with self._lock:
                self._readers -= 1
                self._mean_readers -= mean

    @property
    def is_in_use(self) -> bool:
        """Whether someone is inside :meth:`in_use`."""
        return self._readers > 0

    @property
    def mean_is_in_use(self) -> bool:
        """Whether someone who reads the running mean is inside :meth:`in_use`."""
        return self._mean_readers > 0
