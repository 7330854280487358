"""From a merge to its snapshot: collecting what it consists of, and having it written."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from .choice import Choice
from .config import MergeConfig
from .failures import Failures
from .gathering import ShardedWeights, Weights, WholeWeights
from .parameters import unwrap
from .pieces import PUBLISH, WAIT, Pieces
from .snapshots import SnapshotStore
from .weights import collect_gathered, collect_weights, weights_format
from .window import CheckpointWindow
from .writer import Writer

Extra = Callable[[], Callable[[Path], None]]
Write = Callable[[Path], None]


class Publisher:
    """Publishes the snapshots of one run.

    Args:
        config: the options.
        window: whose merges are published.
        store: of snapshots.
        writer: the thread that writes them.
        failures: where a snapshot that cannot be written is reported.
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
        extra: Extra | None,
    ) -> None:
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
        gathered = None
        if isinstance(weights, ShardedWeights):
            gathered = yield from weights.whole()
        yield PUBLISH
        writing: Future[Path | None] = Future()
        if self._processes.is_first:
            try:
                if gathered is not None:
                    parts = [collect_gathered(weights.model, self._window.layout, gathered, weights.row)]
                    parts += self._extra_parts()
                else:
                    assert isinstance(weights, WholeWeights)
                    with weights.installed():
                        parts = [collect_weights(weights.model, weights.layout), *self._extra_parts()]
                merge = self._described(weights, step, steps, choice, losses)
                writing = self._writer.submit(
                    lambda: self._store.publish(step, losses["merged_loss"], lambda folder: _all(parts, folder), merge)
                )
            except Exception as error:
                writing.set_exception(error)
        else:
            writing.set_result(None)
        # The weights that are written stay where they are until they are on disk.
        while self._processes.largest(float(not writing.done()))[0]:
            yield WAIT
        with self._failures.contained("publishing a snapshot", step):
            return writing.result()
        return None

    def _extra_parts(self) -> list[Write]:
        return [] if self._extra is None else [self._extra()]

    def _described(
        self, weights: Weights, step: int, steps: list[int], choice: Choice, losses: dict[str, Any]
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
            "model_class": type(unwrap(model)).__name__,
            "weights_format": weights_format(model),
            "merged_tensors": [slot.name for slot in self._window.layout.slots],
        }


def _all(parts: list[Write], folder: Path) -> None:
    for part in parts:
        part(folder)
