"""The merging state of a trainer's checkpoint: having it written while training goes on."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ..disk.atomic import Writer, remove_tree
from ..disk.parts import PartsIndex
from ..disk.state import Saved, SharedParts, has_company, remove_orphan, remove_state, save_state
from ..distributed import ENDS, CollectiveTimeout, Processes
from ..window.window import CheckpointWindow

logger = logging.getLogger("traj_merge_callback")
# States that may wait behind the one that is written: a checkpoint and its copies, of this save and the last.
_MOST_WAITING = 4


@dataclass(eq=False)
class _Request:
    """A state that is to be written.

    Args:
        target: the folder.
        belongs: whether it goes into the folder of a checkpoint that is there already, and goes with it.
        begun, dropped, done: whether it is being written, is not wanted any more, and has left the queue.
    """

    target: Path
    belongs: bool
    begun: bool = False
    dropped: bool = False
    done: bool = False

    @property
    def orphaned(self) -> bool:
        """Whether the checkpoint was removed."""
        return self.belongs and not has_company(self.target)


class StateSaver:
    """Writes states of one run, one after another, in the writer's thread; training waits for none of them.

    Rows that are on their way are not overwritten, as nothing is captured until then: states that are asked for
    meanwhile are of the same rows, and share the files of the first one.

    Args:
        window: whose rows are saved.
        index: of the window's columns.
        writer: the thread that writes.
        processes: the ranks, for the writer's thread. Rank 0 decides what is written.
        staging: where half-written states of checkpoints stand.
    """

    def __init__(
        self, window: CheckpointWindow, index: PartsIndex, writer: Writer, processes: Processes, staging: Path
    ) -> None:
        self._window = window
        self._index = index
        self._writer = writer
        self._processes = processes
        self._staging = staging
        self._shared = SharedParts()
        self._said_full = False
        # Those that were not done, or not looked after, the last time.
        self._requests: list[_Request] = []

    def save(self, target: Path, saved: Saved, written: Callable[[], None] | None) -> None:
        """Have a state written into a folder; the last capture is complete.

        Args:
            target: the folder.
            saved: what there is beside the window.
            written: called on rank 0, in the writer's thread, when the folder is there.
        """
        self.remove_orphans()
        waiting = [one for one in self._requests if not one.begun and not one.dropped]
        too_many = max(0, len(waiting) + 1 - _MOST_WAITING)
        for one in [one for one in waiting if one.target == target] or waiting[:too_many]:
            self._drop(one, target)
        request = _Request(target, has_company(target))
        if request.belongs and self._processes.is_rank_zero:
            # The trainer has written over a checkpoint: an old window must not be taken for its.
            remove_state(target)
        self._requests.append(request)
        tensors = self._window.state_dict()
        nbytes = len(self._index.parts) * len(self._window) * self._window.row_nbytes
        with ExitStack() as stack:
            stack.enter_context(self._window.in_use(mean=True))
            until_written = stack.pop_all()

        def write() -> None:
            with until_written:
                try:
                    if not self._processes.from_rank0(lambda: self._begin(request, nbytes)):
                        return
                    save_state(
                        target,
                        tensors,
                        self._index,
                        saved,
                        self._processes,
                        shared=self._shared,
                        staging=self._staging if request.belongs else None,
                    )
                except ENDS:
                    raise
                except BaseException as error:
                    timeout = isinstance(error, CollectiveTimeout)
                    if timeout or not self._processes.from_rank0(lambda: request.orphaned):
                        raise
                    return
                finally:
                    request.done = True
            if written is not None and self._processes.is_rank_zero:
                written()

        self._writer.submit_unwatched(write, "saving the window")

    def remove(self, folder: Path) -> None:
        """Have the states in a folder removed, those that are still on their way too."""
        for one in self._requests:
            one.dropped |= folder in one.target.parents
        if self._processes.is_rank_zero:
            self._writer.submit_unwatched(lambda: remove_tree(folder), "removing a saved window")

    def remove_orphans(self) -> None:
        """Remove states that got into the folder of a checkpoint while the trainer was removing it.

        Called by the thread that removes checkpoints, when it is not doing so.
        """
        done = [one for one in self._requests if one.done]
        self._requests = [one for one in self._requests if one not in done]
        for one in done if self._processes.is_rank_zero else []:
            if one.orphaned:
                remove_orphan(one.target)

    def forget(self) -> None:
        """Wait for what is being written, and share none of it: the window will hold other rows."""
        self._writer.wait()
        self._shared = SharedParts()

    def _begin(self, request: _Request, nbytes: int) -> bool:
        """Whether a state is still wanted, and there is room for it and for the trainer's next checkpoint."""
        target = request.target
        if request.belongs and not request.dropped and not request.orphaned:
            checkpoint = sum(path.stat().st_size for path in target.parent.rglob("*") if path.is_file())
            if (free := shutil.disk_usage(target.parent).free) < nbytes + checkpoint:
                log = logger.info if self._said_full else logger.warning
                self._said_full = True
                log(
                    "no window is saved in %s: it takes %.3g GB, the next checkpoint as much as this one, %.3g GB, and "
                    "%.3g GB of the disk are free",
                    *(target, nbytes / 1e9, checkpoint / 1e9, free / 1e9),
                )
                request.dropped = True
        request.begun = not request.dropped and not request.orphaned
        return request.begun

    def _drop(self, request: _Request, newer: Path) -> None:
        request.dropped = True
        if request.target != newer and self._processes.is_rank_zero:
            logger.warning(
                "no window is saved in %s, as checkpoints are saved faster than the disk writes windows; the newest "
                "checkpoints have theirs",
                request.target,
            )
