"""The merging state of a trainer's checkpoint: having it written while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from ..disk.atomic import Writer
from ..disk.parts import PartsIndex
from ..disk.state import Saved, save_state
from ..distributed import Processes
from ..window.window import CheckpointWindow


class StateSaver:
    """Writes states of one run, one after another, in the writer's thread.

    Args:
        window: whose rows are saved; as long as they are on their way nothing is captured.
        index: of the window's columns.
        writer: the thread that writes.
        writer_processes: the ranks, for the writer's thread.
    """

    def __init__(
        self, window: CheckpointWindow, index: PartsIndex, writer: Writer, writer_processes: Processes
    ) -> None:
        self._window = window
        self._index = index
        self._writer = writer
        self._processes = writer_processes

    def save(self, target: Path, saved: Saved, written: Callable[[], None] | None) -> None:
        """Have a state written into a folder; the last capture is complete.

        Args:
            target: the folder.
            saved: what there is beside the window.
            written: called on rank 0, in the writer's thread, when the folder is there.
        """
        tensors = self._window.state_dict()
        with ExitStack() as stack:
            stack.enter_context(self._window.in_use())
            until_written = stack.pop_all()

        def write() -> None:
            with until_written:
                save_state(target, tensors, self._index, saved, self._processes)
            if written is not None and self._processes.is_rank_zero:
                written()

        self._writer.submit_unwatched(write, "saving the window")
