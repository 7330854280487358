"""What a run goes on from: its state is saved while it trains, and loaded when it is resumed."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..config import MergeConfig
from ..disk.atomic import Writer, remove_tree
from ..disk.output import OutputFolder
from ..disk.snapshots import SnapshotStore
from ..disk.state import RunState, Saved, load_state
from ..distributed import Processes
from ..evaluate.heldout import HeldOutLoss
from ..evaluate.untouched.isolation import delayed_signals
from ..window.window import CheckpointWindow
from .budget import Overhead
from .capturing import Capturing
from .failures import Failures
from .recording import Recorder
from .saving import StateSaver

logger = logging.getLogger("traj_merge_callback")


class Resuming:
    """The part of a ``TrajectoryMerger``, which sets these attributes, that saves and loads its state."""

    config: MergeConfig
    window: CheckpointWindow | None
    heldout: HeldOutLoss
    processes: Processes
    prepare: Callable[[nn.Module], None]
    _active: bool
    _due: bool
    _state: RunState
    _store: SnapshotStore
    _output: OutputFolder
    _overhead: Overhead
    _failures: Failures
    _capturing: Capturing
    _recorder: Recorder
    _schedule: Any  # a Schedule, which stands as high among the imports as this
    _saver: StateSaver
    _writer: Writer
    _timeout_ends_merging: Callable[[int], AbstractContextManager[Any]]

    def save_state(self, folder: str | Path | None, *, written: Callable[[], None] | None = None) -> None:
        """Write the window and the search's memory into a folder, which then exists whole or not at all.

        They are written in a thread of their own, and until then nothing is captured; :meth:`wait` waits for it. A
        merge under way is begun again after resuming. Does nothing before the first step.

        Args:
            folder: where to; rank 0's counts. If it is to stand in the folder of a checkpoint that is there already, it
                is dropped when that is removed meanwhile. None: nothing is saved.
            written: called on rank 0, in that thread, when the folder is there.
        """
        if self.window is None or self._state.last_step is None:
            return
        started, step, window = time.perf_counter(), self._state.last_step, self.window
        with delayed_signals(), self._timeout_ends_merging(step), self._failures.contained("saving the window", step):
            target = self.processes.from_rank0(lambda: None if folder is None else Path(folder).absolute())
            if target is None:
                return
            self._capturing.settle(window)
            # What a merge under way learns is not in the state yet: it is made again.
            merging = self._state.last_merge_step
            again = self._schedule.merge_under_way and self._capturing.can_begin_again(window, merging)
            run = replace(self._state, busy_s=self._overhead.busy_s, wall_s=self._overhead.wall_s, run=self._store.run)
            entries = [vars(entry) for entry in self._store.entries]
            saved = Saved(copy.deepcopy(run), merging if again else None, self._store.heldout, entries)
            self._saver.save(target, saved, written)
        self._overhead.spend(time.perf_counter() - started)

    def remove_states(self, folder: str | Path) -> None:
        """Have rank 0 remove the folder of states beside a checkpoint, those on their way to it too."""
        if self.window is not None:
            self._saver.remove(Path(folder).absolute())
        elif self.processes.is_rank_zero:
            remove_tree(Path(folder))

    def wait(self) -> None:
        """Wait until everything that was to be written is on the disk."""
        if self.window is not None:
            self._writer.wait()

    def resume_from(self, find: Callable[[], Path | None], model: nn.Module, step: int) -> None:
        """:meth:`load_state` for a trainer's resume: if nothing usable is found, say so and start an empty window."""
        if not self._active:
            return
        with self._timeout_ends_merging(step), self._failures.contained("restoring the window", step):
            if (found := self.processes.from_rank0(find)) is None:
                self.prepare(model)
                raise FileNotFoundError("the checkpoint has no saved window beside it; the window starts empty")
            self.load_state(found, model, step)

    def load_state(self, folder: str | Path, model: nn.Module, step: int) -> None:
        """Continue from :meth:`save_state`; a merge that was under way is begun again.

        Where nothing depends on time (``schedule="blocking"``, ``max_overhead=None``) the merges after it equal those
        of an uninterrupted run.

        Args:
            folder: where the state was saved.
            model: the model being trained.
            step: the step training resumes from.

        Raises:
            FileNotFoundError: no state there.
            ValueError: it was saved after that step, or belongs to a model with other parameters.
        """
        self._output.resume()
        self.prepare(model)
        if self.window is None:
            return
        self._saver.forget()
        saved = load_state(Path(folder), self.window, step)
        self._state, self._capturing.row_step = saved.run, saved.merging
        same = self._same_heldout(saved.heldout)
        self._store.restore(saved.run.run, saved.snapshots if same else [], self.processes)
        self._overhead.begin(self._state.busy_s, self._state.wall_s)
        self._recorder.file.resume(self._store.run)
        if saved.merging is not None:
            self._due = not self._schedule.begin(model, self._state.search, saved.merging, self.config.evaluations)

    def _same_heldout(self, before: str) -> bool:
        """Whether losses that were measured on held-out data of this digest count; data that are not read yet may be
        the same. Forgets those that do not count.
        """
        self._store.heldout = self.heldout.digest or before
        if before in ("", self._store.heldout):
            return True
        logger.info("the held-out data changed since the state was saved: losses measured before are forgotten")
        self._state.forget_losses()
        return False
