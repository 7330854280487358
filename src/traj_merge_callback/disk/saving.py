"""Saving what merging depends on while training goes on, and taking it over again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from ..distributed import Processes
from ..evaluate.heldout import HeldOutLoss
from ..window.window import CheckpointWindow
from .snapshots import SnapshotStore
from .state import RunState, load_state, save_state, save_state_together
from .writer import Writer

logger = logging.getLogger("traj_merge_callback")


class Saving:
    """Saves and loads the merging state of one run.

    Args:
        window: the checkpoints.
        heldout: losses that are remembered are only good for the same held-out data.
        store: of snapshots.
        writer: the thread that writes files.
        files: the processes, in that thread.
    """

    def __init__(
        self, window: CheckpointWindow, heldout: HeldOutLoss, store: SnapshotStore, writer: Writer, files: Processes
    ) -> None:
        self._window = window
        self._processes = window.processes
        self._heldout = heldout
        self._store = store
        self._writer = writer
        self._files = files

    def save(self, folder: Path, memory: RunState, merging: int | None, written: Callable[[], None] | None) -> None:
        """Let a state be written, which exists whole or not at all; until then nothing is captured.

        Args:
            folder: where to.
            memory: of the merges.
            merging: the step of the merge under way, which is made again after resuming; None: there is none.
            written: is called, in the writer's thread of the first process, when the folder is there.
        """
        window, several = self._window, self._processes.size > 1
        state = window.state_dict()
        numbers = window.numbers() if several else {}
        document = {
            "window": {
                **{name: state[name] for name in ("steps", "dtype", "pushed", "sampled")},
                "shared": list(state["shared"]),
            },
            "names": [slot.name for slot in window.layout.slots],
            "memory": asdict(memory),
            "merging": merging,
            "heldout": self._heldout.digest,
            "snapshots": [vars(entry) for entry in self._store.entries],
        }
        with ExitStack() as stack:
            stack.enter_context(window.in_use())
            until_written = stack.pop_all()

        def write() -> None:
            with until_written:
                if several:
                    save_state_together(folder, numbers, window, document, self._files)
                else:
                    save_state(folder, state, document)
            if written is not None and self._processes.is_rank_zero:
                written()

        self._writer.leave(write)

    def load(self, folder: Path, step: int) -> tuple[RunState, int | None]:
        """Fill the window from a folder; the memory, and the step of a merge that was under way.

        Raises:
            FileNotFoundError, ValueError: see :func:`load_state`.
        """
        document = load_state(folder, self._window, step)
        memory = RunState.from_json(document["memory"])
        if document["heldout"] == self._heldout.digest:
            self._store.restore(document["snapshots"])
        else:
            logger.info("the held-out data changed since %s was saved: losses measured before are forgotten", folder)
            memory.row_losses, memory.search, memory.history = {}, {}, []
        return memory, document["merging"]
