"""What merges the checkpoints of one set of parameters, made as the options have it."""

from __future__ import annotations

import shutil
from typing import NamedTuple

from torch import nn

from ..config import MergeConfig
from ..disk.atomic import Writer
from ..disk.mapped import on_disk
from ..disk.parts import PartsIndex
from ..disk.snapshots import SnapshotStore
from ..distributed import Processes
from ..evaluate.heldout import HeldOutLoss, device_of
from ..search import resolve_search
from ..window.window import CheckpointWindow
from .choose import Chooser
from .failures import Failures
from .merge import Merge
from .publish import Extra, Publisher
from .saving import StateSaver


def what_changed(window: CheckpointWindow, model: nn.Module) -> str | None:
    """Why a window is not one of the model's merged parameters any more, on whichever rank; None: it still is."""
    change = window.layout.change(model)
    if not window.processes.all_reduce_max(float(change is not None))[0]:
        return None
    return change or "the model's parameters changed on another rank"


class Merging(NamedTuple):
    """The window of one set of parameters, and what works on it."""

    window: CheckpointWindow
    writer: Writer
    saver: StateSaver
    merge: Merge

    def release(self) -> None:
        """Wait for files being written, and release the window."""
        self.writer.close()
        self.saver.remove_orphans()
        self.window.close()


def make_merging(
    model: nn.Module,
    config: MergeConfig,
    heldout: HeldOutLoss,
    store: SnapshotStore,
    failures: Failures,
    extra: Extra | None,
    *,
    processes: tuple[Processes, Processes],
) -> Merging:
    """Allocate a window for the parameters that ``model`` has now.

    Args:
        model: the model being trained.
        config: the options.
        heldout: the held-out loss.
        store: of snapshots, in the output folder.
        failures: of the run.
        extra: see :class:`Publisher`.
        processes: the ranks, and once more for the writer's thread.

    Raises:
        ValueError: the model cannot be merged.
        NoRoom: the window does not fit.
    """
    ranks, writer_ranks = processes
    average_rate, options = resolve_search(config.search).average_rate, config.search_options
    on_a_disk = config.window_storage == "disk"
    folder = next(folder for folder in (store.folder, *store.folder.parents) if folder.exists())
    window = CheckpointWindow(
        model,
        config.num_rows,
        dtype=config.dtype,
        trainable_only=config.trainable_only,
        average_rate=(lambda step: average_rate(step, **options)) if average_rate else None,
        mean_rows=config.row_kind != "last",
        multiscale=config.row_kind == "multiscale",
        groups=config.groups,
        allocate=on_disk(store.folder, ranks) if on_a_disk else None,
        rows_on=device_of(model) if config.window_storage == "device" else None,
        disk_free=shutil.disk_usage(folder).free,
        buffered=on_a_disk,
        asynchronous=True,
        processes=ranks,
    )
    index = PartsIndex.of(window.layout.slots, ranks)
    writer = Writer(device_of(model))
    saver = StateSaver(window, index, writer, writer_ranks, store.folder)
    publisher = Publisher(config, window, index, store, writer, failures, writer_ranks, extra)
    merge = Merge(model, window, config, heldout, Chooser(config, heldout, ranks), publisher)
    return Merging(window, writer, saver, merge)
