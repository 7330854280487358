"""The snapshot of a merge: collecting what it consists of, and having it written."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import MergeConfig
from ..disk.atomic import Writer, write_tensors
from ..disk.model_card import write_card
from ..disk.model_files import (
    SHARD_BYTES,
    STATE_DICT,
    class_name,
    collect_description,
    collect_gathered,
    collect_weights,
    weights_format,
)
from ..disk.parts import PartsIndex, snapshot_part, snapshot_part_path
from ..disk.snapshots import SnapshotStore
from ..distributed import ENDS, FailedOnAllRanks, Processes
from ..evaluate.fsdp import ShardedWeights
from ..evaluate.weights import Weights, WholeWeights
from ..search import resolve_search
from ..window.matrix import Matrix
from ..window.pieces import PUBLISH, WAIT, Pieces
from .failures import Failures

Extra = Callable[[], Callable[[Path], None]]
Write = Callable[[Path], None]


class Publisher:
    """Publishes the snapshots of one run.

    Args:
        config: the options.
        window: whose merges are published.
        index: of the window's columns.
        store: of snapshots.
        writer: the thread that writes them.
        failures: where a snapshot that cannot be written is reported.
        writer_processes: the ranks, for the writer's thread.
        extra: called while the model holds the merged weights (under FSDP, its own); what it returns adds files to a
            snapshot's folder later.
        about: what merge.json says besides.
    """

    def __init__(
        self,
        config: MergeConfig,
        window: Matrix,
        index: PartsIndex,
        store: SnapshotStore,
        writer: Writer,
        failures: Failures,
        writer_processes: Processes,
        extra: Extra | None,
        about: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._config = config
        self._window = window
        self._index = index
        self._processes = window.processes
        self._store = store
        self._writer = writer
        self._failures = failures
        self._writer_processes = writer_processes
        self._extra = extra
        self._about = about

    def publish(
        self,
        weights: Weights,
        step: int,
        steps: list[int],
        described: dict[str, Any],
        losses: dict[str, Any],
        not_finite: str | None,
        *,
        at_once: bool,
    ) -> Pieces[Path | None]:
        """Write a snapshot of the candidate at hand; one that cannot be written is a failure of its own.

        Args:
            weights: the candidate.
            step: optimizer step of the merge.
            steps: of the window's rows.
            described, losses: what merge.json says of the weights, and of the report split.
            not_finite: name of a merged tensor that is not finite, on this rank; such a snapshot is not written.
            at_once: copy what is on a device to the CPU before training goes on, and not beside it.

        Returns:
            The snapshot's folder, None if it could not be written.
        """
        sharded = isinstance(weights, ShardedWeights) and self._writes_shards()
        gathered = None
        if isinstance(weights, ShardedWeights) and not sharded:
            gathered = yield from weights.whole()
        yield PUBLISH
        publish: Callable[[], Path] | None = None
        error: BaseException | None = None
        try:
            if not_finite is not None:
                raise ValueError(f"the merge at step {step} is not finite in {not_finite!r}")
            if sharded or self._processes.is_rank_zero:
                write = self._shard(weights, at_once) if sharded else self._whole(weights, gathered, at_once)
                merge = self._merge_json(weights, step, steps, described, losses, sharded=sharded)
                if self._processes.is_rank_zero and merge["weights_format"] != STATE_DICT:
                    write = _both(write, self._card(weights.model, merge))
                ranks = self._writer_processes if sharded else None
                search_loss, merged_loss = described["search_losses"]["merged"], losses["merged_loss"]
                publish = functools.partial(self._store.publish, step, search_loss, merged_loss, write, merge, ranks)
        except ENDS:
            raise
        except BaseException as raised:
            error = raised
        writing: Future[Path | None] = Future()
        if self._processes.all_reduce_max(float(error is not None))[0]:
            # No rank begins what the others would wait for.
            writing.set_exception(error or FailedOnAllRanks("another rank could not collect its part of a snapshot"))
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

    def _writes_shards(self) -> bool:
        """Whether every rank writes its part."""
        size = sum(slot.whole_numel * slot.dtype.itemsize for slot in self._window.layout.slots)
        wanted = self._config.snapshot_files
        return wanted == "sharded" or (wanted == "auto" and size > SHARD_BYTES)

    def _whole(self, weights: Weights, gathered: dict[int, Tensor] | None, at_once: bool) -> Write:
        """Collect the whole model, and what is written beside it."""
        if gathered is not None:
            with weights.kept.installed():
                write = collect_gathered(weights.model, self._window.layout, gathered, weights.row)
            return _both(write, self._beside())
        assert isinstance(weights, WholeWeights)
        with weights.installed():
            changed = weights.kept.changed
            write = collect_weights(weights.model, weights.layout, changed=changed, at_once=at_once)
            return _both(write, self._beside())

    def _shard(self, weights: Weights, at_once: bool) -> Write:
        """Collect this rank's part of the model; rank 0 also writes what is beside the weights."""
        row, rank = weights.row, self._processes.rank
        if at_once:
            row = row.to("cpu", copy=True)
        elif row.is_cuda:
            torch.cuda.current_stream(row.device).synchronize()
        beside = None
        if self._processes.is_rank_zero:
            beside = _both(collect_description(weights.model), self._beside())

        def write(folder: Path) -> None:
            if rank in self._index.parts:
                part = snapshot_part(row, self._window.layout.slots)
                write_tensors(snapshot_part_path(folder, rank), part, self._writer_processes)
            if beside is not None:
                beside(folder)

        return write

    def _beside(self) -> Write | None:
        return None if self._extra is None else self._extra()

    def _card(self, model: nn.Module, merge: dict[str, Any]) -> Write:
        base = str(getattr(getattr(model, "config", None), "name_or_path", ""))
        merge = {**merge, "run": self._store.run}
        return lambda folder: write_card(folder, merge, base)

    def _merge_json(
        self,
        weights: Weights,
        step: int,
        steps: list[int],
        described: dict[str, Any],
        losses: dict[str, Any],
        *,
        sharded: bool,
    ) -> dict[str, Any]:
        config, model = self._config, weights.model
        alone = np.count_nonzero(described["weights"]) == 1  # then it is that row, whatever the search
        search_losses = {f"{name}_loss": loss for name, loss in described["search_losses"].items()}
        return {
            "step": step,
            "checkpoint_steps": steps,
            "row": config.row_kind,
            "samples_per_row": config.samples,
            **{name: value for name, value in described.items() if name != "search_losses"},
            "search": config.search,
            "search_options": config.search_options,
            "weighing": "rows" if alone else resolve_search(config.search).weighing,
            "search_split": search_losses,
            "report_split": losses,
            "row_dtype": self._window.dtype,
            "model_class": class_name(model),
            "weights_format": weights_format(model),
            "merged_tensors": [slot.name for slot in self._window.layout.slots],
            "sharded": self._index.to_json() if sharded else None,
            **self._about,
        }


def _both(first: Write, second: Write | None) -> Write:
    def write(folder: Path) -> None:
        first(folder)
        if second is not None:
            second(folder)

    return write
