"""A run's merging state beside the trainer's checkpoint: the window's rows, and what merges remember.

Layout of the folder, format version 4::

    state.json                           steps, what merges remember, and the index of parts
    row-00.rank-00000.safetensors ...    one row, as it is stored (int8 rows as int8), this rank's columns
    shared.rank-00000.safetensors        what belongs to all rows: the running mean, leading rows, the anchor of int8
                                         rows, live weights where rows are no exact copies

Any number of ranks reads what any other number wrote. Rows come back bit for bit where a rank's columns are those that
some rank wrote; int8 rows are rounded once more where they are not.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from ..distributed import Processes
from ..search.problem import SearchState
from ..search.spans import Span, live_is_beside
from ..window.layout import ParameterLayout
from ..window.storage import BLOCK, decode_int8
from .atomic import TEMPORARY, remove_folder, remove_leftovers, remove_tree, shared_folder, write_tensors
from .checksums import check_document, check_files, with_checksums
from .parts import PartsIndex, Range, part_path, ranges_of
from .snapshots import SnapshotEntry
from .untrusted import (
    damage_of,
    folder_name_of_step,
    integer,
    is_folder_of_step,
    is_step_name,
    mapping,
    number,
    numbers,
    own_file,
    read_json_object,
    safetensors_in,
    sequence,
    texts,
)

FORMAT_VERSION = 4
_SHARED = "shared"
_ENTRY = {field.name for field in fields(SnapshotEntry)}


@dataclass
class RunState:
    """What merges and their records depend on beside the window's rows.

    Args:
        last_step: the last optimizer step seen.
        last_merge_step: the step of the last merge, 0 before the first.
        search: what the last merge remembers.
        history: step and merged loss on the report split of every merge.
        busy_s: seconds spent in the callback.
        wall_s: seconds of training before the last resume.
        run: tells the run from others, however often it is resumed.
    """

    last_step: int | None = None
    last_merge_step: int = 0
    search: SearchState = field(default_factory=SearchState)
    history: list[tuple[int, float]] = field(default_factory=list)
    busy_s: float = 0.0
    wall_s: float = 0.0
    run: str = ""

    def forget_losses(self) -> None:
        """Drop what was measured on other held-out data."""
        self.search.forget_losses()
        self.history = []

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunState:
        """The state that ``dataclasses.asdict`` gave and JSON has kept: keys were made strings, tuples lists.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        search, previous = mapping(values["search"]), values["search"]["previous"]
        # A candidate of a run that diverged has a loss that is not finite.
        row_losses = {row: numbers(losses, finite=False) for row, losses in mapping(search["row_losses"]).items()}
        last_step = integer(values["last_step"])
        last_merge_step = integer(values["last_merge_step"])
        if last_merge_step > last_step:
            raise ValueError(f"last_merge_step={last_merge_step} is after last_step={last_step}")
        busy_s, wall_s = number(values["busy_s"]), number(values["wall_s"])
        if min(busy_s, wall_s) < 0:
            raise ValueError(f"busy_s={busy_s}, wall_s={wall_s} are no times")
        return cls(
            last_step=last_step,
            last_merge_step=last_merge_step,
            search=SearchState(
                previous=None if previous is None else numbers(previous),
                spans=_spans(search["spans"]),
                row_losses=row_losses,
                memory=mapping(search["memory"]),
                live_losses=numbers(search.get("live_losses", [])),
                restored=True,
            ),
            history=[(integer(step), number(loss)) for step, loss in sequence(values["history"])],
            busy_s=busy_s,
            wall_s=wall_s,
            run=texts([values["run"]])[0],
        )


@dataclass(frozen=True)
class Saved:
    """Everything in ``state.json`` but the index of parts and the window's own numbers.

    Args:
        run: the state of the run.
        merging: the step of a merge that was under way, which is made again after resuming; None: there was none.
        heldout: digest of the held-out data; losses are only comparable where it is equal.
        snapshots: entries of the snapshots' index.
    """

    run: RunState
    merging: int | None
    heldout: str
    snapshots: list[dict[str, Any]]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Saved:
        """See :meth:`RunState.from_json`."""
        merging = None if values["merging"] is None else integer(values["merging"])
        for entry in sequence(values["snapshots"]):
            numbers([entry["search_loss"], entry["merged_loss"]])
            if entry["name"] != folder_name_of_step(integer(entry["step"])) or set(entry) != _ENTRY:
                raise ValueError(f"{entry!r} is no snapshot")
        (heldout,) = texts([values["heldout"]])
        return cls(RunState.from_json(mapping(values["run"])), merging, heldout, values["snapshots"])


class SharedParts:
    """The files that one rank wrote into its last state, for further states of the same window to share.

    A file has several names then (hard links), and is written once.
    """

    def __init__(self) -> None:
        self._window: dict[str, Any] = {}
        self._files: dict[str, tuple[Path, os.stat_result]] = {}

    def link(self, window: dict[str, Any], path: Path) -> bool:
        """Let a file of another state appear at ``path`` as well, if it is there and of this very window."""
        if path.name not in self._files or window != self._window:
            return False
        source, written = self._files[path.name]
        try:
            os.link(source, path)
        except OSError:  # it was removed, or the file system has no hard links
            return False
        if os.path.samestat(found := path.stat(), written) and _same_content(found, written):
            return True
        path.unlink()
        return False

    def note(self, window: dict[str, Any], paths: list[Path]) -> None:
        """Files that were written, of a window with these numbers."""
        self._window, self._files = window, {}
        for path in paths:
            with suppress(OSError):
                self._files[path.name] = path, path.stat()


def save_state(
    folder: Path,
    window: dict[str, Any],
    index: PartsIndex,
    saved: Saved,
    processes: Processes,
    *,
    shared: SharedParts | None = None,
    staging: Path | None = None,
) -> None:
    """Write a state, which then exists whole or not at all; a collective.

    Args:
        folder: where to; on a file system that all ranks share.
        window: this rank's :meth:`CheckpointWindow.state_dict`.
        index: of the window's columns.
        saved: the rest.
        processes: the ranks.
        shared: what this rank wrote before, which is not written again.
        staging: see :func:`shared_folder`.

    Raises:
        OSError: the disk is full or read-only, or ranks do not share the folder.
    """
    kept = {name: window[name] for name in ("spans", "dtype", "pushed", "sampled", "sampled_from", "not_finite")}
    shared = shared or SharedParts()
    parts = {_row_name(row): tensors for row, tensors in enumerate(window["rows"])}
    if window["shared"]:
        parts[_SHARED] = window["shared"]

    def describe(checksums: dict[str, str]) -> None:
        for rank, name in itertools.product(index.parts, parts):
            if not (path := part_path(temporary, name, rank)).is_file():
                raise FileNotFoundError(f"{path} was removed while it was written")
        document = {
            "version": FORMAT_VERSION,
            "window": {**kept, "shared": sorted(window["shared"])},
            **asdict(saved),
            "index": index.to_json(),
        }
        text = json.dumps(with_checksums(document, checksums))
        (temporary / "state.json").write_text(text, encoding="utf-8")

    with shared_folder(folder, processes, staging, describe=describe) as temporary:
        if processes.rank in index.parts:
            for name, tensors in parts.items():
                path = part_path(temporary, name, processes.rank)
                if not shared.link(kept, path):
                    write_tensors(path, tensors, processes)
    if processes.rank in index.parts:
        shared.note(kept, [part_path(folder, name, processes.rank) for name in parts])


class Restorable(Protocol):
    """A window that is filled from files; see :class:`CheckpointWindow`."""

    layout: ParameterLayout
    processes: Processes

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore rows of these very columns."""

    def load_rows(self, state: dict[str, Any], read: Callable[[str, Tensor], None]) -> None:
        """Restore rows of other columns."""

    def drop_since(self, step: int) -> None:
        """Remove the rows from a step on."""


def load_state(folder: Path, window: Restorable, step: int) -> Saved:
    """Fill the window from a folder of :func:`save_state`; a collective. The window is empty if a part cannot be read.

    Raises:
        FileNotFoundError: there is no such folder, or a part is missing.
        ValueError: it is damaged, of another format version, of a model with other parameters, or holds checkpoints
            after ``step``.
    """
    processes = window.processes
    saved, index, kept, document = processes.from_rank0(lambda: _read_document(folder, window, step))
    processes.from_rank0(lambda: _remove_leftovers_beside(folder))
    with processes.raise_on_all():
        check_files(folder, document, processes.rank, processes.size)
    try:
        with processes.raise_on_all():
            _fill(folder, kept, index, window)
    except BaseException:
        # Some ranks may have read all of their rows and some none: merges need the same rows on all.
        window.drop_since(0)
        raise
    return saved


def _remove_leftovers_beside(folder: Path) -> None:
    """Remove states that a killed process left half-written where one stands from which its run goes on."""
    remove_leftovers(folder.parent, "step-*" if is_step_name(folder.name) else glob.escape(folder.name))


def remove_other_states(folder: Path | None) -> None:
    """Remove the other states beside one that is whole, if there is one, and what killed processes left of some."""
    if folder is None:
        return
    remove_leftovers(folder.parent, "step-*")
    for old in folder.parent.glob("step-*"):
        if old != folder and is_folder_of_step(old, "state.json"):
            remove_tree(old)


def remove_state(folder: Path) -> None:
    """Remove a state, if one is there."""
    if (folder / "state.json").is_file():
        remove_folder(folder)


def has_company(state: Path) -> bool:
    """Whether anything but merging states is in the folder of a state, such as the trainer's checkpoint itself."""
    try:
        beside = list(state.parent.iterdir())
    except OSError:
        return False
    return any(not path.name.startswith(TEMPORARY) and not (path / "state.json").is_file() for path in beside)


def remove_orphan(state: Path) -> None:
    """Remove a state whose checkpoint was removed, and the checkpoint's folder if nothing else is in it."""
    remove_tree(state)
    with suppress(OSError):
        state.parent.rmdir()


def _same_content(one: os.stat_result, other: os.stat_result) -> bool:
    return (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)


def _row_name(index: int) -> str:
    return f"row-{index:02d}"


def _read_document(
    folder: Path, window: Restorable, step: int
) -> tuple[Saved, PartsIndex, dict[str, Any], dict[str, Any]]:
    """A state.json, checked before anything is restored: the state, the index, the window's numbers, all of it."""
    path = folder / "state.json"
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{folder} holds no merging state (no state.json)")
    document = read_json_object(path)
    if (version := document.get("version")) != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format version {version!r}; this version of traj-merge-callback reads {FORMAT_VERSION}"
        )
    try:
        saved, index = Saved.from_json(document), PartsIndex.from_json(document["index"])
        kept = _checked_window(mapping(document["window"]))
        last = max((span.last for span in _spans(kept["spans"])), default=0)
        if saved.merging not in (None, last):
            raise ValueError(f"merging={saved.merging} is not the last step of spans={kept['spans']}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error!s:.200})") from error
    found = {name: tuple(tensor["shape"]) for name, tensor in index.tensors.items()}
    # A buffer that is not finite any more belongs to no column now, and is left out.
    kept_shapes = {name: shape for name, shape in found.items() if name not in window.layout.skipped}
    if kept_shapes != {slot.name: slot.shape for slot in window.layout.slots}:
        raise ValueError(f"{folder} was saved for a model with other parameters")
    if last > step:
        raise ValueError(f"{folder} holds checkpoints up to step {last}, but training is at step {step}")
    if saved.run.last_step is not None and saved.run.last_step > step:
        raise ValueError(f"{folder} was saved at step {saved.run.last_step}, but training is at step {step}")
    check_document(path, document)
    return saved, index, kept, document


def _spans(values: Any) -> list[Span]:
    """Spans that JSON has kept.

    Raises:
        TypeError, ValueError: they are of no rows of one window.
    """
    spans = [Span(*map(integer, sequence(span))) for span in sequence(values)]
    means = spans[:-1] if live_is_beside(spans) else spans
    ends = [step for span in means for step in (span.first - 1, span.last - 1, span.last)]
    if ends != sorted(ends) or any(span.samples < 1 for span in spans):
        raise ValueError(f"spans={values} are of no window")
    return spans


def _checked_window(kept: dict[str, Any]) -> dict[str, Any]:
    spans = _spans(kept["spans"])
    counts = [integer(kept[name]) for name in ("pushed", "sampled", "sampled_from")]
    if min(counts) < 0 or counts[0] < len(spans):
        raise ValueError(f"pushed, sampled, sampled_from={counts} are of no window of {len(spans)} rows")
    texts([kept["dtype"], *sequence(kept["shared"]), *sequence(kept["not_finite"])])
    return kept


def _fill(folder: Path, saved: dict[str, Any], index: PartsIndex, window: Restorable) -> None:
    """Fill the window: from one part where a rank wrote these very columns, else from all parts that have some."""
    slots = window.layout.slots
    fronts_differ = any(index.tensors[slot.name]["front"] != slot.shard.dim for slot in slots)
    if not fronts_differ and (rank := index.rank_of(ranges_of(slots))) is not None:
        rows = [safetensors_in(part_path(folder, _row_name(row), rank)) for row in range(len(saved["spans"]))]
        shared = safetensors_in(part_path(folder, _SHARED, rank)) if saved["shared"] else {}
        with damage_of(folder):
            window.load_state_dict({**saved, "rows": rows, "shared": shared})
        return

    def read(name: str, target: Tensor) -> None:
        def fill(wanted: Range, columns: Tensor) -> None:
            for copy in index.copies(wanted):
                if name in saved["shared"]:
                    values = _columns(folder, _SHARED, name, copy.rank, copy.columns)
                elif saved["dtype"] == "int8":
                    values = _int8_columns(folder, name, copy.rank, copy.columns)
                else:
                    values = _columns(folder, name, "row", copy.rank, copy.columns)
                columns[copy.target].copy_(values)

        for slot in slots:
            columns = target[slot.offset : slot.offset + slot.numel]
            if index.tensors[slot.name]["front"] == slot.shard.dim:
                fill(Range(slot.name, slot.shard.start, slot.numel), columns)
            elif slot.numel:
                # Sharded along another dimension: its numbers stand in another order there.
                flat = torch.empty(slot.whole_numel)
                fill(Range(slot.name, 0, slot.whole_numel), flat)
                whole = index.unflatten(slot.name, flat).movedim(slot.shard.dim, 0).reshape(-1)
                columns.copy_(whole[slot.shard.start : slot.shard.start + slot.numel])

    with damage_of(folder):
        window.load_rows(saved, read)


def _columns(folder: Path, name: str, tensor: str, rank: int, columns: slice) -> Tensor:
    """Some columns of a tensor in the part that a rank wrote."""
    path = own_file(part_path(folder, name, rank))
    with damage_of(path), safe_open(path, framework="pt") as opened:
        return opened.get_slice(tensor)[columns]


def _int8_columns(folder: Path, name: str, rank: int, columns: slice) -> Tensor:
    """Some columns of an int8 row as numbers: the whole blocks that hold them are decoded and added to the anchor."""
    blocks = slice(columns.start // BLOCK, -(-columns.stop // BLOCK))
    whole = slice(blocks.start * BLOCK, blocks.stop * BLOCK)
    deltas = _columns(folder, name, "deltas", rank, whole)
    values = decode_int8(deltas, _columns(folder, name, "scales", rank, blocks), torch.empty(len(deltas)))
    values += _columns(folder, _SHARED, "anchor", rank, whole)
    return values[columns.start - whole.start : columns.stop - whole.start]
