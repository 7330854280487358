"""A run's merging state beside the trainer's checkpoint: the window's rows and the searches' memory.

Layout of the folder: ``row-00.safetensors`` ... (a row as it is stored), ``shared.safetensors`` (the mean begun,
running sums, the anchor of int8 rows, live weights where rows are no exact copies) and ``state.json``. Several
processes write files of ``torch.distributed.checkpoint`` instead of the former, which any number of them can read.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..distributed import Processes
from ..window.window import CheckpointWindow
from .atomic import shared_folder, whole_folder
from .sharded_files import ReadColumns, is_sharded, read_row, write_rows

FORMAT_VERSION = 1


@dataclass
class RunState:
    """What merges depend on beside the window's rows, and what their records are computed from.

    Args:
        last_step: the last optimizer step seen.
        last_merge_step: the step of the last merge, 0 before the first.
        previous: the last merge's weights.
        row_losses: losses of single rows on the search split, by step; of each component of the objective.
        share: share of the search split that these were measured on.
        search: what the search itself remembers.
        history: step and merged loss on the report split of every merge.
        busy_s: seconds spent in the callback.
        wall_s: seconds of training before the last resume.
    """

    last_step: int | None = None
    last_merge_step: int = 0
    previous: list[float] | None = None
    row_losses: dict[int, list[float]] = field(default_factory=dict)
    share: float = 1.0
    search: dict[str, Any] = field(default_factory=dict)
    history: list[tuple[int, float]] = field(default_factory=list)
    busy_s: float = 0.0
    wall_s: float = 0.0

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunState:
        """The memory that ``dataclasses.asdict`` gave and JSON has kept: keys were strings, pairs lists."""
        row_losses = {int(step): loss for step, loss in values["row_losses"].items()}
        history = [(step, loss) for step, loss in values["history"]]
        return cls(**{**values, "row_losses": row_losses, "history": history})


def save_state(folder: Path, state: dict[str, Any], document: dict[str, Any]) -> None:
    """Write a window's ``state_dict`` into a folder, which then exists whole, and a document of plain JSON types.

    In the document is the rest of the ``state_dict`` under "window", with the names of what rows share.
    """
    with whole_folder(folder) as temporary:
        for index, row in enumerate(state["rows"]):
            save_file(row, temporary / f"row-{index:02d}.safetensors")
        if state["shared"]:
            save_file(state["shared"], temporary / "shared.safetensors")
        _write_document(temporary, document)


def save_state_together(
    folder: Path, rows: Mapping[str, ReadColumns], window: CheckpointWindow, document: dict[str, Any], files: Processes
) -> None:
    """:func:`save_state` in several processes, each of which writes its columns.

    Args:
        folder: on a file system that all processes share.
        rows: see :meth:`CheckpointWindow.numbers`.
        window: whose rows they are.
        document: as for :func:`save_state`.
        files: the processes.

    Raises:
        OSError: the folder is not the same for all.
    """
    leads = files.leads(folder.parent)
    if sum(files.all_gather_object(leads)) > 1:
        raise OSError(f"{folder} is on a disk that not all processes share, so the window cannot be saved there")
    with shared_folder(folder, files, leads=leads) as temporary:
        slots = window.layout.slots
        write_rows(temporary, slots, rows, files, lambda row, slot: rows[row](slice(0, 0)).dtype)
        if files.is_rank_zero:
            _write_document(temporary, document)


def _write_document(folder: Path, document: dict[str, Any]) -> None:
    text = json.dumps({"version": FORMAT_VERSION, **document})
    (folder / "state.json").write_text(text, encoding="utf-8")


def load_state(folder: Path, window: CheckpointWindow, step: int) -> dict[str, Any]:
    """Fill the window from a folder of :func:`save_state`; return the document.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is of a newer format, of a model with other parameters, or holds checkpoints after ``step``.
    """
    processes = window.processes
    document = processes.from_rank0(lambda: _read_document(folder, window, step))
    saved = document["window"]
    if is_sharded(folder):
        slots = window.layout.slots
        window.load_numbers(saved, lambda row, target: read_row(folder, slots, row, target, processes))
    elif processes.size > 1:
        with processes.raise_on_all():
            window.load_numbers(saved, _columns_of_whole_rows(folder, document, window))
    else:
        rows = [load_file(folder / f"row-{index:02d}.safetensors") for index in range(len(saved["steps"]))]
        shared = folder / "shared.safetensors"
        window.load_state_dict({**saved, "rows": rows, "shared": load_file(shared) if shared.is_file() else {}})
    return document


def _columns_of_whole_rows(
    folder: Path, document: dict[str, Any], window: CheckpointWindow
) -> Callable[[str, Tensor], None]:
    """Reads this process's columns of the rows that one process has saved, by the row's name."""
    slots = {slot.name: slot for slot in window.layout.slots}
    if document["window"]["dtype"] == "int8" or any(slot.shard.dim for slot in slots.values()):
        raise ValueError(f"{folder} was saved by one process: several cannot divide int8 rows, nor shard by columns")
    sizes = [slots[name].whole_numel for name in document["names"]]
    begins = dict(zip(document["names"], itertools.accumulate(sizes, initial=0), strict=False))

    def read(row: str, target: Tensor) -> None:
        is_row = row.startswith("row-")
        with safe_open(folder / f"{row if is_row else 'shared'}.safetensors", framework="pt") as opened:
            values = opened.get_slice("row" if is_row else row)
            for slot in slots.values():
                begin = begins[slot.name] + slot.shard.start
                target[slot.offset : slot.offset + slot.numel].copy_(values[begin : begin + slot.numel])

    return read


def _read_document(folder: Path, window: CheckpointWindow, step: int) -> dict[str, Any]:
    if not (folder / "state.json").is_file():
        raise FileNotFoundError(f"{folder} holds no merging state (no state.json)")
    document = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if document["version"] > FORMAT_VERSION:
        raise ValueError(f"{folder} has format version {document['version']}; this library reads {FORMAT_VERSION}")
    steps = document["window"]["steps"]
    if sorted(document["names"]) != sorted(slot.name for slot in window.layout.slots):
        raise ValueError(f"{folder} was saved for a model with other parameters")
    if any(saved_step > step for saved_step in steps):
        raise ValueError(f"{folder} holds checkpoints up to step {steps[-1]}, but training is at step {step}")
    return document
