"""What goes wrong in a merge stays in the merge: logged once with its cause, training unharmed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from ..distributed import ENDS, CollectiveTimeout, FailedOnAllRanks, described
from ..window.memory import let_go

logger = logging.getLogger("traj_merge_callback")
#: What is raised where model, arguments and files do not go together: the text says what to mend.
TOLD = (ValueError, TypeError, OSError, RuntimeError)


class Failures:
    """Contains exceptions, and keeps count of them.

    Args:
        on_error: "warn" logs the first failure of each kind with its traceback and goes on; "raise" lets it through.
        is_rank_zero: whether this is rank 0, which alone logs what failed on other ranks.
    """

    def __init__(self, on_error: str, is_rank_zero: bool = True) -> None:
        self._is_first = is_rank_zero
        self._raise = on_error == "raise"
        self.counts: Counter[str] = Counter()

    @contextmanager
    def contained(
        self,
        what: str,
        step: int,
        told: tuple[type[Exception], ...] = (),
        after: str = "Nothing is merged. Training goes on.",
    ) -> Iterator[None]:
        """Contain any failure of the block but :class:`CollectiveTimeout`; Ctrl-C and exits always pass.

        Args:
            what: the block does, for the message.
            step: the optimizer step.
            told: exceptions whose text tells the user what to mend: their traceback is for debug level only.
            after: what follows from those, for the message.
        """
        try:
            yield
        except ENDS:
            raise
        except BaseException as error:
            if self._raise or isinstance(error, CollectiveTimeout):
                raise
            kind = f"{what} failed: {described(error)}"
            first = not any(known.startswith(f"{what} failed: {type(error).__name__}") for known in self.counts)
            self.counts[kind] += 1
            if isinstance(error, told):
                if first and self._is_first:
                    logger.warning("%s (step %s). %s", error, step, after)
                    logger.debug("%s", kind, exc_info=True)
            elif first and (self._is_first or not isinstance(error, FailedOnAllRanks)):
                message = "%s (step %s). Training goes on; further failures of this kind are only counted."
                logger.warning(message, kind, step, exc_info=True)
            let_go(error)

    def report(self, finished: Iterable[tuple[str, Future[Any]]], step: int) -> None:
        """Contain what could not be done in the writer's thread, of what was given to it."""
        for what, done in finished:
            with self.contained(what, step):
                done.result()

    def summarise(self) -> None:
        """Say once, at the end of a run, how often something failed more than once, and count anew."""
        if self._is_first and (total := self.counts.total()) > 1:
            cause, times = self.counts.most_common(1)[0]
            logger.warning("%d failures while merging; the most frequent (%d times): %s", total, times, cause)
        self.counts.clear()
