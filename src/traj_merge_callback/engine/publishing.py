"""From a merge to its snapshot: collecting what it consists of, and having it written."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import MergeConfig
from ..disk.model_files import class_name, collect_description, collect_gathered, collect_weights, weights_format
from ..disk.sharded_files import describe_slots, write_rows
from ..disk.snapshots import SnapshotStore
from ..disk.writer import Writer
from ..distributed import FailedOnAllRanks, Processes
from ..evaluate.gathering import ShardedWeights, Weights, WholeWeights
from ..failures import Failures
from ..pieces import PUBLISH, WAIT, Pieces
from ..window.window import CheckpointWindow
from .choose import Choice

Extra = Callable[[], Callable[[Path], None]]
Write = Callable[[Path], None]
# Bytes of a model that the first process gathers in its memory, where nothing else is asked for.
_LARGEST_WHOLE = 5_000_000_000


class Publisher:
    """Publishes the snapshots of one run.

    Args:
        config: the options.
        window: whose merges are published.
        store: of snapshots.
        writer: the thread that writes them.
        failures: where a snapshot that cannot be written is reported.
        files: the processes, in the writer's thread.
        extra: called while the model holds the merged weights (under FSDP, its own); what it returns adds files to a
            snapshot's folder later.
    """

    def __init__(
        self,
        config: MergeConfig,
        window: CheckpointWindow,
        store: SnapshotStore,
        writer: Writer,
        failures: Failures,
        files: Processes,
        extra: Extra | None,
    ) -> None:
        self._files = files
        self._config = config
        self._window = window
        self._processes = window.processes
        self._store = store
        self._writer = writer
        self._failures = failures
        self._extra = extra

    def publish(
        self, weights: Weights, step: int, steps: list[int], choice: Choice, losses: dict[str, Any]
    ) -> Pieces[Path | None]:
        """Write a snapshot of the candidate at hand; one that cannot be written is a failure of its own.

        Args:
            weights: the candidate.
            step: optimizer step of the merge.
            steps: of the window's rows.
            choice, losses: what merge.json tells.
        """
        sharded = isinstance(weights, ShardedWeights)
        together = self._files if sharded and self._in_parts() else None
        gathered = None
        if isinstance(weights, ShardedWeights) and together is None:
            gathered = yield from weights.whole()
        yield PUBLISH
        publish: Callable[[], Path] | None = None
        error: Exception | None = None
        try:
            if together is not None or self._processes.is_rank_zero:
                write = self._collected(weights, gathered) if together is None else self._part(weights)
                described = self._described(weights, step, steps, choice, losses, in_parts=together is not None)
                merged_loss = losses["merged_loss"]
                publish = functools.partial(self._store.publish, step, merged_loss, write, described, together)
        except Exception as raised:
            error = raised
        writing: Future[Path | None] = Future()
        if self._processes.all_reduce_max(float(error is not None))[0]:
            # Nobody begins what the others would wait for.
            writing.set_exception(error or FailedOnAllRanks("another process could not collect its part of a snapshot"))
        elif publish is None:
            writing.set_result(None)
        else:
            writing = self._writer.submit(publish)
        # The weights that are written stay where they are until they are on disk.
        while self._processes.all_reduce_max(float(not writing.done()))[0]:
            yield WAIT
        with self._failures.contained("publishing a snapshot", step):
            return writing.result()
        return None

    def _in_parts(self) -> bool:
        """Whether every process writes its part."""
        size = sum(slot.whole_numel * slot.dtype.itemsize for slot in self._window.layout.slots)
        wanted = self._config.snapshot_files
        return wanted == "sharded" or (wanted == "auto" and size > _LARGEST_WHOLE)

    def _collected(self, weights: Weights, gathered: dict[int, Tensor] | None) -> Write:
        """Collect the whole model, and what is written beside it."""
        if gathered is not None:
            parts = [collect_gathered(weights.model, self._window.layout, gathered, weights.row), *self._extra_parts()]
        else:
            assert isinstance(weights, WholeWeights)
            with weights.installed():
                parts = [collect_weights(weights.model, weights.layout), *self._extra_parts()]
        return lambda folder: _all(parts, folder)

    def _part(self, weights: Weights) -> Write:
        """Collect this process's part of the model; the first one also writes what is beside the weights."""
        row, slots = weights.row, self._window.layout.slots
        if row.is_cuda:
            torch.cuda.current_stream(row.device).synchronize()
        others = [collect_description(weights.model), *self._extra_parts()] if self._processes.is_rank_zero else []

        def write(folder: Path) -> None:
            write_rows(folder, slots, {"": row.__getitem__}, self._files, lambda _, slot: slot.dtype)
            _all(others, folder)

        return write

    def _extra_parts(self) -> list[Write]:
        return [] if self._extra is None else [self._extra()]

    def _described(
        self, weights: Weights, step: int, steps: list[int], choice: Choice, losses: dict[str, Any], *, in_parts: bool
    ) -> dict[str, Any]:
        config, model = self._config, weights.model
        return {
            "step": step,
            "checkpoint_steps": steps,
            "row": config.row,
            "samples_per_row": config.samples,
            **choice.described,
            "search": config.search,
            "search_options": config.search_options,
            "search_split": {f"{name}_loss": loss for name, loss in choice.search_losses.items()},
            "report_split": losses,
            "row_dtype": self._window.dtype,
            "model_class": class_name(model),
            "weights_format": weights_format(model),
            "merged_tensors": [slot.name for slot in self._window.layout.slots],
            "sharded": describe_slots(self._window.layout.slots) if in_parts else None,
        }


def _all(parts: list[Write], folder: Path) -> None:
    for part in parts:
        part(folder)
