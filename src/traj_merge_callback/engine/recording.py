"""What is known of a merge that is done: in the list of records, in metrics.jsonl, and wherever the user logs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..disk.writer import Writer
from ..failures import Failures
from ..metrics import MergeRecord, MetricsFile
from .runs import Finished


class Recorder:
    """Records the merges of one run.

    Args:
        search: name of the search.
        path: of metrics.jsonl.
        log: called with each record, if anything is.
        failures: where logging that fails is reported.
        writes: whether metrics.jsonl is written here; one process does.
    """

    def __init__(
        self,
        search: str,
        path: Path,
        log: Callable[[MergeRecord], None] | None,
        failures: Failures,
        *,
        writes: bool,
    ) -> None:
        self.records: list[MergeRecord] = []
        self._search = search
        self._metrics = MetricsFile(path)
        self._log = log
        self._failures = failures
        self._writes = writes

    def resumed(self) -> None:
        """The run continues an earlier one: so does its metrics.jsonl."""
        self._metrics.resumed = True

    def record(
        self,
        finished: Finished,
        step: int,
        history: list[tuple[int, float]],
        overhead: float,
        window_bytes: int,
        writer: Writer,
    ) -> MergeRecord:
        """Record a merge.

        Args:
            finished: the merge.
            step: the optimizer step at which it was done.
            history: step and merged loss of every merge so far, to which this one is added.
            overhead: share of wall time taken so far.
            window_bytes: memory of the window.
            writer: of metrics.jsonl.
        """
        merged = finished.merged
        live_loss, merged_loss = merged.losses["live_loss"], merged.losses["merged_loss"]
        steps_saved = None
        if live_loss is not None:
            history.append((merged.step, merged_loss))
            steps_saved = max((merged.step - past for past, loss in history if loss <= live_loss), default=0)
        record = MergeRecord(
            step=merged.step,
            search=self._search,
            checkpoint_steps=merged.checkpoint_steps,
            **merged.choice.described,
            **merged.losses,
            steps_saved=steps_saved,
            evaluations=merged.choice.evaluations,
            forward_equivalents=float(merged.choice.forward_equivalents),
            allowed={"evaluations": merged.plan.evaluations, "heldout_share": merged.plan.share},
            finished_step=step,
            seconds=finished.seconds,
            longest_pause=finished.longest_pause,
            overhead=overhead,
            window_bytes=window_bytes,
            search_losses=merged.choice.search_losses,
            snapshot=str(merged.snapshot) if merged.snapshot else None,
        )
        self.records.append(record)
        if self._writes:
            writer.leave(lambda: self._metrics.append(record))
        with self._failures.contained("logging", step):
            if self._log is not None:
                self._log(record)
        return record
