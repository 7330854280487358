"""A progress bar that only shows for what takes long."""

from __future__ import annotations

import time
from types import TracebackType

from tqdm.auto import tqdm

_PATIENCE_S = 1.0


class SlowProgress:
    """A tqdm bar that appears once the work has taken longer than a second, and vanishes when it is done.

    Args:
        description: what is being done.
        total: how many times ``advance`` will be called at most.
        enabled: False shows nothing, ever.
    """

    def __init__(self, description: str, total: int, *, enabled: bool) -> None:
        self._description = description
        self._total = total
        self._enabled = enabled
        self._done = 0
        self._bar: tqdm | None = None
        self._started = time.perf_counter()

    def advance(self) -> None:
        """One piece of work is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(1)
        elif self._enabled and time.perf_counter() - self._started > _PATIENCE_S:
            self._bar = tqdm(total=self._total, initial=self._done, desc=self._description, leave=False, unit="batch")

    def __enter__(self) -> SlowProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
