"""What is known of a merge when it is done, and where its record goes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..config import MergeConfig
from ..disk.atomic import Writer
from ..disk.metrics_file import MetricsFile
from ..disk.on_publish import OnPublish
from ..disk.state import RunState
from ..distributed import Processes
from ..metrics import MergeRecord
from .budget import Overhead
from .failures import TOLD, Failures

logger = logging.getLogger("traj_merge_callback")


class Recorder:
    """Completes the records of a run's merges, keeps them, writes them to metrics.jsonl and logs them.

    Args:
        config: the options.
        file: metrics.jsonl.
        log: called with each record; None on ranks that do not log.
        log_eval: the same for records with what ``on_publish`` found.
        failures: where a ``log`` that fails is reported.
        processes: the ranks, of which rank 0 writes.
        on_publish: what snapshots are given to; None: nothing.
        shown: whether ``log`` shows merges to the user; else there is a line at level INFO for each.
    """

    def __init__(
        self,
        config: MergeConfig,
        file: MetricsFile,
        log: Callable[[MergeRecord], None] | None,
        log_eval: Callable[[MergeRecord], None] | None,
        failures: Failures,
        processes: Processes,
        on_publish: OnPublish | None,
        shown: bool,
    ) -> None:
        self._config = config
        self.file = file
        self._log, self._log_eval = log, log_eval
        self._failures = failures
        self._processes, self._is_rank_zero = processes, processes.is_rank_zero
        self.on_publish = on_publish
        self._shown = shown
        self.records: list[MergeRecord] = []

    def add(
        self,
        record: MergeRecord,
        step: int,
        state: RunState,
        overhead: Overhead,
        writer: Writer,
        run: str,
        rollbacks: int,
    ) -> MergeRecord:
        """A merge is done; its record, with what is known now.

        Args:
            record: of the merge.
            step: the optimizer step.
            state: of the run, whose history it is added to.
            overhead: the time spent so far.
            writer: the thread that writes.
            run: the run's name.
            rollbacks: how often the run was rolled back.
        """
        state.history.append((record.step, record.merged_loss))
        as_good = [record.step - past for past, loss in state.history if loss <= record.live_loss]
        record = replace(
            record,
            steps_saved=max(as_good, default=0),
            finished_step=step,
            overhead=overhead.share,
            rollbacks=None if self._config.on_spike is None else rollbacks,
            run=run,
            name=self._config.name,
        )
        if not self.records and self._is_rank_zero:
            overhead.warn(record.seconds, self._config)
        self.records.append(record)
        if self._is_rank_zero:
            writer.submit_unwatched(lambda: self.file.append(record), "writing metrics.jsonl")
            if not self._shown:
                logger.info("%s", record.line())
        with self._failures.contained("logging", step):
            if self._log is not None:
                self._log(record)
        if self.on_publish is not None:
            if record.snapshot is not None and self._is_rank_zero:
                self.on_publish.submit(record.step, Path(record.snapshot))
            self.take_found(step, writer)
        return record

    def take_found(self, step: int, writer: Writer, wait: float = 0.0) -> bool:
        """Write and log what was found in snapshots since the last time; a collective.

        Args:
            step: the optimizer step.
            writer: the thread that writes.
            wait: seconds to wait for what is on its way.

        Returns:
            Whether snapshots are still to be read.
        """
        if (on_publish := self.on_publish) is None:
            return False
        found = None
        with self._failures.contained("on_publish", step, TOLD, "Training goes on; later failures are only counted."):
            found = self._processes.from_rank0(lambda: on_publish.poll(wait))
        if found is not None:
            index = max(index for index, record in enumerate(self.records) if record.step == found.step)
            record = self.records[index] = replace(self.records[index], eval=found.numbers)
            if self._is_rank_zero:
                writer.submit_unwatched(lambda: self.file.amend(record), "writing metrics.jsonl")
            with self._failures.contained("logging", step):
                if self._log_eval is not None and record.eval:
                    self._log_eval(record)
        if on_publish.freed:
            on_publish.freed = False
            writer.submit_unwatched(on_publish.prune, "removing snapshots")
        return self._processes.from_rank0(lambda: on_publish.is_busy)
