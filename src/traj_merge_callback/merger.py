"""The engine: when to capture and when to merge. It knows no trainer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .config import MergeConfig
from .disk.metrics_file import MetricsFile
from .disk.model_files import load_merged
from .disk.on_publish import OnPublish
from .disk.output import OutputFolder
from .disk.snapshots import SnapshotStore
from .disk.state import RunState
from .distributed import CollectiveTimeout, Processes, several_ranks
from .engine.budget import Overhead
from .engine.capturing import Capturing, passed
from .engine.failures import TOLD, Failures
from .engine.making import make_merging, what_changed
from .engine.publish import Extra
from .engine.recording import Recorder
from .engine.resuming import Resuming
from .engine.rollback import Rollback
from .engine.schedule import Schedule
from .engine.training_loss import TrainingLoss
from .evaluate.heldout import LATER, HeldOutLoss, Nll, ToDevice, is_later
from .evaluate.untouched.isolation import delayed_signals
from .metrics import MergeRecord
from .search.checks import function, integer, names, shown, whole
from .search.problem import SearchState
from .window.memory import NoRoom
from .window.window import CheckpointWindow

logger = logging.getLogger("traj_merge_callback")
# Seconds that ranks wait at a time for what reads a snapshot.
_PATIENCE_S = 0.5


class TrajectoryMerger(Resuming):
    """Keeps a window of checkpoints of one run, merges them at fixed intervals and publishes the results.

    Call :meth:`step` after every optimizer step; the model's weights are read, never written. A merge is made of the
    checkpoint of one step, in pieces between the steps that follow, and done some steps later. With several ranks
    (DDP, FSDP) each constructs one, after ``torch.distributed`` is initialized, and calls the same methods at the same
    steps; they merge together, each rank its own columns.

    Args:
        heldout: held-out batches (a DataLoader, any iterable, or a mapping from domain names to such), read at once;
            "later": :meth:`read_heldout` is called with them, and merges wait for that.
        nll: ``nll(model, batch) -> (summed NLL in nats, target tokens)``, also by domain; by default ``.loss``.
        precision: returns a context for forward passes, such as ``lambda: torch.autocast("cuda", torch.bfloat16)``.
        to_device: moves a batch to the training device, also by domain; by default tensors go to the model's device.
        log: called with the :class:`MergeRecord` of each merge, on rank 0. ``record.line()`` is also logged, as INFO.
        log_eval: the same, later, for a record to which ``on_publish`` has added what it found in the snapshot.
        log_everywhere: call both on every rank, for trainers whose metrics are to be the same on all; they show them.
        optimizer: of the run, or several; needed for ``on_spike="rollback"`` where that is to reset or to slow it.
        extra: called while the model holds the merged weights, to add files to a snapshot: it returns a function that
            is called with the snapshot's folder later, in another thread.
        **config: the options of :class:`MergeConfig`.

    Example::

        merger = TrajectoryMerger(heldout_loader, capture_every=50, merge_every=500)
        for step, batch in enumerate(loader, start=1):
            ...  # forward, backward, optimizer.step()
            if record := merger.step(model, step):
                print(record.step, record.live_loss, record.merged_loss)
        merger.finish(model)

    Raises:
        ValueError, TypeError: an option is wrong, or ``heldout`` has nothing to hold out.
    """

    def __init__(
        self,
        heldout: Iterable[Any] | Mapping[str, Iterable[Any]],
        *,
        nll: Nll | Mapping[str, Nll] | None = None,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
        to_device: ToDevice | Mapping[str, ToDevice] | None = None,
        log: Callable[[MergeRecord], None] | None = None,
        log_eval: Callable[[MergeRecord], None] | None = None,
        log_everywhere: bool = False,
        extra: Extra | None = None,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        **config: Any,
    ) -> None:
        self.config = MergeConfig(**config)
        for name, one in {"log": log, "log_eval": log_eval}.items():
            function(name, one or print, "called with the MergeRecord of each merge, or None")
        function("extra", extra or print, "returning one that is called with a snapshot's folder, or None")
        #: The folder of snapshots and metrics; if a live run writes to the one that was asked for, another one.
        self.output_dir = Path(self.config.output_dir or self.config.named("merged"))
        self._output = OutputFolder(self.output_dir)
        self.window: CheckpointWindow | None = None
        self._active = True
        self.processes = Processes(self.config.process_timeout)
        # For the writer's thread, whose collectives must not get between those of merges.
        self._writer_processes = Processes(self.config.process_timeout)
        if self.processes.size > 1 and self.config.load_merged_at_end:
            instead = "load the best snapshot with load_merged after training"
            raise ValueError(f"load_merged_at_end=True is not supported with several ranks; {instead}")
        self._extra = extra
        self._failures = Failures(self.config.on_error, self.processes.is_rank_zero)
        keep_last, keep_best = self.config.keep_last, self.config.keep_best
        self._store = SnapshotStore(self.output_dir, keep_last=keep_last, keep_best=keep_best, check=self._output.check)
        file = MetricsFile(self.output_dir / "metrics.jsonl", self._output.check)
        logs = (log, log_eval) if log_everywhere or self.processes.is_rank_zero else (None, None)
        given, limit = self.config.on_publish, self.config.on_publish_timeout
        on_publish = None if given is None else OnPublish(given, limit, self._store)
        self._recorder = Recorder(
            self.config, file, *logs, self._failures, self.processes, on_publish, shown=log_everywhere
        )
        #: The records of all merges made here, on every rank.
        self.records = self._recorder.records
        self._training_loss = TrainingLoss(self.processes)
        options = {name: getattr(self.config, name) for name in ("search_fraction", "report_only", "seed")}
        options |= {"nll": nll, "precision": precision, "to_device": to_device, "processes": self.processes}
        self.heldout = HeldOutLoss(LATER, batches=self.config.heldout_batches, **options)
        self._state = RunState()
        if not is_later(heldout):
            self._read(heldout)
        self._overhead = Overhead(self.config.max_overhead, self.config.max_pause)
        self._due = False  # whether a merge is due that has not begun
        self._capturing = Capturing(self.config, self.processes)
        self._rollback = Rollback(self.config, self._training_loss, self._capturing, optimizer, self.processes)
        self._renewing = False  # whether a window is to replace one of other parameters

    def prepare(self, model: nn.Module) -> None:
        """Allocate the window for ``model``. The first ``step`` does it otherwise.

        Raises:
            ValueError: the model cannot be merged (nothing trainable, or parameters sharded in a way that is not
                supported). With ``on_error="raise"`` also: it fails on a held-out batch, which is otherwise a warning.
            NoRoom: an OSError: there is too little memory for the window, or space on the disk; on all ranks, if it is
                so on one.
        """
        if not self._active or self.window is not None:
            return
        if not isinstance(model, nn.Module):
            raise TypeError(f"model={shown(model)}: must be the torch module that is trained")
        if self.processes.size == 1 and several_ranks():
            raise RuntimeError("construct TrajectoryMerger after torch.distributed is initialized, on every rank")
        if not self._renewing:
            acquired, self._store.run = self.processes.from_rank0(lambda: (self._output.acquire(), self._store.run))
            self.output_dir = self._store.folder = acquired
            self._recorder.file.path = self.output_dir / "metrics.jsonl"
            self._overhead.begin()
        run = (self.config, self.heldout, self._store, self._failures, self._extra)
        try:
            made = make_merging(model, *run, processes=(self.processes, self._writer_processes))
        except BaseException:
            if not self._renewing:
                self._output.release()
            raise
        self._merging, self._writer, self._saver, self.window = made, made.writer, made.saver, made.window
        known = (self.config, self.heldout, made.merge, self._overhead, made.writer.wait, self.processes)
        self._schedule = Schedule(*known)
        self._rollback.begin(made.merge, made.window, self._schedule.at_once)
        is_first, self._waited_s, self._renewing = not self._renewing, 0.0, False
        if is_first:
            self._first_pass(model)

    def _first_pass(self, model: nn.Module, heldout: Any = None) -> None:
        """Evaluate a held-out batch; if the model does not take it, there is no merging in this run.

        Args:
            model: the model being trained.
            heldout: held-out data that are read first; None: they have been, or will be later.
        """
        step = self._state.last_step or 0
        with self._timeout_ends_merging(step), self._failures.contained("the first forward pass", step, TOLD):
            try:
                if heldout is not None:
                    self._read(heldout)
                if self.window is not None:
                    self._merging.merge.first_pass(model)
            except BaseException:
                self._active = False
                self.close()
                raise

    def _read(self, heldout: Any) -> None:
        self.heldout.read(heldout)
        names("domain_weights", self.config.domain_weights or {}, self.heldout.searched, "domains searched on")
        if not self._same_heldout(self._store.heldout):
            self._store.entries = []

    def read_heldout(
        self, heldout: Iterable[Any] | Mapping[str, Iterable[Any]], model: nn.Module, step: int
    ) -> MergeRecord | None:
        """Read the held-out data of a merger that was made without; a merge that was due at this step begins.

        Args:
            heldout: see the class.
            model: the model, as it was at the last call of :meth:`step`.
            step: the step of that call.

        Returns:
            The record of that merge, if it is done at once.
        """
        if self._active:
            self._first_pass(model, heldout)
        if not self._active or self.window is None or self._capturing.row_step != step:
            return None
        return self._at_once(lambda: self._begin_due(model, step))

    def complete(self) -> MergeRecord | None:
        """Finish the merge under way while training waits.

        Returns:
            Its record; None if there was none.
        """
        if self.window is None or not self._schedule.merge_under_way:
            return None
        return self._at_once(lambda: self._record(self._schedule.complete(), self._state.last_step or 0))

    def _at_once(self, work: Callable[[], MergeRecord | None]) -> MergeRecord | None:
        """Do something of a merge between two calls of :meth:`step`."""
        record, step = None, self._state.last_step or 0
        self._overhead.enter(time.perf_counter())
        with self._timeout_ends_merging(step), self._failures.contained("trajectory merging", step):
            record = work()
        if self.window is not None:
            self._schedule.end_pause()
        self._overhead.leave()
        return record

    def start(self, model: nn.Module) -> None:
        """:meth:`prepare` for trainers: where a window has no room, ``on_error`` decides whether training begins."""
        with self._timeout_ends_merging(0):
            try:
                self.prepare(model)
            except NoRoom:
                self._active = False
                with self._failures.contained("preparing the window", 0, TOLD):
                    raise

    def step(
        self, model: nn.Module, step: int, *, loss: Any = None, skipped: Callable[[], bool] = lambda: False
    ) -> MergeRecord | None:
        """Capture a checkpoint, and begin or advance a merge, if due. Call after each optimizer step.

        Args:
            model: the model being trained, at an optimizer-step boundary.
            step: the number of optimizer steps taken so far; the first one is 1.
            loss: the training loss of this step, or a mean of recent ones, a number or a tensor, in which spikes are
                looked for; None: it is not known.
            skipped: returns whether mixed precision skipped this optimizer step, which left the weights unchanged; what
                is due then waits for the next step. Called only when something is due.

        Returns:
            The record of a merge, if one was done in this call: of this step, or of an earlier one.

        Raises:
            Exception: only with ``on_error="raise"``; otherwise failures are logged once and training goes on.
        """
        if not self._active:
            return None
        self._output.use()
        with self._timeout_ends_merging(step):
            self._training_loss.see(step, loss)
            return self._step(model, step, skipped)
        return None

    def _step(self, model: nn.Module, step: int, skipped: Callable[[], bool]) -> MergeRecord | None:
        started = time.perf_counter()
        record, step = None, step if (number := whole(step)) is None else number
        if self.window is not None and (self._schedule.under_way or self._capturing.is_due(self._previous(step), step)):
            with self._failures.contained("preparing a new window", step):
                self._renew_if_changed(model, step)
        if self.window is None:
            if self._renewing and not self._capturing.is_due(self._previous(step), step):
                return None
            with self._failures.contained("preparing the window", step, TOLD), self.processes.raise_on_all():
                integer("step", step, 0)
                self.prepare(model)
            if self.window is None:
                self._active, self._state.last_step = self._renewing, step
                return None
        self._overhead.spend(self.window.waited_s - self._waited_s)
        self._overhead.enter(started)
        self._store.begin_in(self._writer, self.processes)
        self._failures.report(self._writer.finished(), step)
        if self.processes.size == 1:  # several ranks exchange what was found when a merge is done
            self._recorder.take_found(step, self._writer)
        with self._failures.contained("trajectory merging", step):
            is_due = passed(self.config.merge_every, self._previous(step), step)
            record = self._record(self._schedule.advance(next_is_due=is_due), step)
            if self._rollback.suspects(self._previous(step), step, self._state.search):
                # The memory that this takes may hold a merge, or a snapshot that is being written.
                record = self._record(self._schedule.complete(), step) or record
                self._writer.wait()
                if not self._schedule.under_way:
                    self._rollback.consider(model, step, self._state.search)
        with self._failures.contained("trajectory merging", step):
            if self._capture(model, step, skipped) and not self._schedule.under_way:
                record = self._begin_due(model, step) or record
        self._waited_s = self.window.waited_s
        self._schedule.end_pause()
        self._overhead.leave()
        return record

    def _renew_if_changed(self, model: nn.Module, step: int) -> None:
        """If the model has other merged parameters than the window's, release it; a new one takes its place."""
        assert self.window is not None
        if (change := what_changed(self.window, model)) is None:
            return
        logger.warning("step %d: %s; merging goes on with a new window", step, change)
        self._failures.report(self._writer.finished(), step)
        self._release_window()
        self._renewing = True
        self._capturing.forget()
        self._state.search = SearchState()

    @contextmanager
    def _timeout_ends_merging(self, step: int) -> Iterator[None]:
        """A collective that times out within the context ends merging for the rest of the run."""
        try:
            yield
        except CollectiveTimeout as error:
            self._active = False
            logger.warning("trajectory merging is off from step %d on, training goes on: %s", step, error)
            self.close()
            if self.config.on_error == "raise":
                raise

    def settle(self) -> None:
        """Wait until the last capture has been copied, so that weights may be written.

        Optimizers of torch wait by themselves; call this before anything else that writes weights.
        """
        if self.window is not None:
            with self._failures.contained("capturing", self._state.last_step or 0):
                self.window.settle()

    def merge_at_end(self, model: nn.Module) -> MergeRecord | None:
        """Finish the merge under way, and merge at the last step of training if ``merge_at_end`` is set.

        There is no training left to wait, so neither ``max_overhead`` nor ``max_pause`` holds.

        Returns:
            The record of the last merge made here, if one was.
        """
        step = self._state.last_step
        if self.window is None:
            return None
        self._store.begin_in(self._writer, self.processes)  # no step may have been taken since a killed run was resumed
        if step is not None:
            with self._timeout_ends_merging(step):
                return self._merge_at_end(model, step)
        return None

    def _merge_at_end(self, model: nn.Module, step: int) -> MergeRecord | None:
        record = None
        self._overhead.enter(time.perf_counter())
        with self._failures.contained("preparing a new window", step):
            self._renew_if_changed(model, step)
            self.prepare(model)
        if self.window is None:
            return None
        with self._failures.contained("trajectory merging", step):
            record = self._record(self._schedule.complete(), step)
        wanted = self.config.merge_at_end and step >= self.config.start_step
        wanted &= not self._schedule.under_way  # it is, if the process was told to end
        if wanted and step > self._state.last_merge_step:
            with self._failures.contained("the merge at the end", step):
                self._writer.wait()  # for the rows, which may be on their way to a checkpoint
                self._capturing.take_last(self.window, model, step, self._state.search.spoiled)
                self._begin(model, step, self.config.evaluations)
                record = self._record(self._schedule.complete(), step) or record
        self._writer.wait()
        self._failures.report(self._writer.finished(), step)
        self._schedule.end_pause()
        self._overhead.leave()
        return record

    def finish(self, model: nn.Module) -> MergeRecord | None:
        """The end of training: :meth:`merge_at_end`, wait for ``on_publish``, load the best snapshot if
        ``load_merged_at_end``, and close.

        Returns:
            The record of the last merge made here, if one was.
        """
        record, step = self.merge_at_end(model), self._state.last_step or 0
        with self._timeout_ends_merging(step):
            while self.window is not None and self._recorder.take_found(step, self._writer, _PATIENCE_S):
                pass
        if self.window is not None and self.config.load_merged_at_end:
            with self._failures.contained("loading the best snapshot", step):
                if self.best_snapshot is None:
                    raise FileNotFoundError("load_merged_at_end=True, but no snapshot was published")
                load_merged(self.best_snapshot, model)
        self.close()
        return record

    def close(self) -> None:
        """Abandon the merge under way and what reads a snapshot, wait for files being written, release the window, log
        a summary of failures.
        """
        if self._recorder.on_publish is not None:
            self._recorder.on_publish.close()
        if self.window is not None or self._renewing or not self._active:
            self._release_window()
            self._renewing = False
            self._output.release()
            self._writer_processes.close()
            self.processes.close()
        self._failures.summarise()

    def _release_window(self) -> None:
        if self.window is not None:
            self._schedule.abandon()
            self._merging.release()
            self._rollback.end()
            self.window = None
            del self._merging, self._schedule, self._saver, self._writer  # which hold its memory

    def __enter__(self) -> TrajectoryMerger:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def best_snapshot(self) -> Path | None:
        """The folder of the published snapshot of lowest loss on the search split so far."""
        return self.output_dir / self._store.best.name if self._store.best else None

    @property
    def rollbacks(self) -> int:
        """How often this run went back to a merge; see ``on_spike``."""
        return self._rollback.count

    def _previous(self, step: int) -> int:
        return step - 1 if self._state.last_step is None else self._state.last_step

    def _capture(self, model: nn.Module, step: int, skipped: Callable[[], bool]) -> bool:
        """Capture a checkpoint if one is due, and note if a merge is; returns whether the window has a new row."""
        window, previous = self.window, self._previous(step)
        assert window is not None
        if not self._capturing.is_due(previous, step):
            self._state.last_step = step
            return False
        if window.is_in_use and self.config.schedule == "blocking":
            self.wait()
        with delayed_signals():
            action = self._capturing.plan(window, previous, step, skipped)
            if action is None:
                return False
            self._state.last_step = step
            self._due |= passed(self.config.merge_every, previous, step)
            self._capturing.take(action, window, model, step, self._state.search.spoiled)
        return action == "row"

    def _begin_due(self, model: nn.Module, step: int) -> MergeRecord | None:
        """Begin a merge of the newest row if one is due; its record, if training waits for it."""
        self._begin(model, step)
        return self._record(self._schedule.complete(), step) if self.config.schedule == "blocking" else None

    def _begin(self, model: nn.Module, step: int, evaluations: int | None = None) -> None:
        """Begin a merge if one is due; until then, learn what it will take."""
        window = self.window
        assert window is not None
        if not self._due and evaluations is None:
            self._schedule.try_out(model)
        elif len(window) < 2:
            logger.info("no merge at step %d: the window holds %d checkpoint", step, len(window))
            self._due = False
        elif self._schedule.begin(model, self._training_loss.noted_in(self._state.search), step, evaluations):
            self._due, self._state.last_merge_step, self._training_loss.spiked = False, step, False
        else:
            self._schedule.try_out(model)

    def _record(self, record: MergeRecord | None, step: int) -> MergeRecord | None:
        """Add what is known when a merge is done at this step, keep its record, and log it."""
        if record is None:
            return None
        self._state.search = self._schedule.learned
        known = (self._state, self._overhead, self._writer, self._store.run, self.rollbacks)
        return self._recorder.add(record, step, *known)
