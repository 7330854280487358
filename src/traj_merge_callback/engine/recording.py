"""What is known of a merge when it is done, and where its record goes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from ..config import MergeConfig
from ..disk.atomic import Writer
from ..disk.metrics_file import MetricsFile
from ..disk.state import RunState
from ..metrics import MergeRecord
from .budget import Overhead
from .failures import Failures

logger = logging.getLogger("traj_merge_callback")


class Recorder:
    """Completes the records of a run's merges, keeps them, writes them to metrics.jsonl and logs them.

    Args:
        config: the options.
        file: metrics.jsonl.
        log: called with each record; None on ranks that do not log.
        failures: where a ``log`` that fails is reported.
        is_rank_zero: whether this is rank 0, which writes.
        shown: whether ``log`` shows merges to the user; else there is a line at level INFO for each.
    """

    def __init__(
        self,
        config: MergeConfig,
        file: MetricsFile,
        log: Callable[[MergeRecord], None] | None,
        failures: Failures,
        is_rank_zero: bool,
        shown: bool,
    ) -> None:
        self._config = config
        self.file = file
        self._log = log
        self._failures = failures
        self._is_rank_zero = is_rank_zero
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
        return record
