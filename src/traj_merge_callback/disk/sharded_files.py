"""Tensors divided among processes as files of ``torch.distributed.checkpoint``, readable by any number of processes.

Every tensor is written flat, with its sharded dimension in front, as chunks of what each process holds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ..distributed import Processes, collective_timeout
from ..window.layout import Slot

# Reads some columns of a row: those of one tensor.
ReadColumns = Callable[[slice], Tensor]
Dtypes = Callable[[str, Slot], torch.dtype]


def key_of(row: str, slot: Slot) -> str:
    """A tensor's name in the files: of a row of several, or of the only one, which has no name."""
    return f"{row}/{slot.name}" if row else slot.name


class _Saving(DefaultSavePlanner):
    def __init__(self, slots: Sequence[Slot], rows: Mapping[str, ReadColumns], dtypes: Dtypes) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        held = [slot for slot in slots if slot.numel]
        self._places = {key_of(row, slot): (row, slot) for row in rows for slot in held}
        self._rows = rows
        self._dtypes = dtypes

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([self._item(key, row, slot) for key, (row, slot) in self._places.items()])
        return self.plan

    def _item(self, key: str, row: str, slot: Slot) -> WriteItem:
        offsets, sizes = torch.Size([slot.shard.start]), torch.Size([slot.numel])
        data = TensorWriteData(
            ChunkStorageMetadata(offsets, sizes),
            TensorProperties(dtype=self._dtypes(row, slot)),
            torch.Size([slot.whole_numel]),
        )
        return WriteItem(MetadataIndex(key, offsets), WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        # Read when it is written, so that rows that are kept in another form take no memory before.
        row, slot = self._places[write_item.index.fqn]
        values = self._rows[row](slice(slot.offset, slot.offset + slot.numel))
        return values.to(device="cpu", dtype=self._dtypes(row, slot))


class _Loading(DefaultLoadPlanner):
    def __init__(self, slots: Sequence[Slot], row: str, target: Tensor) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._slots = {key_of(row, slot): slot for slot in slots if slot.numel}
        self._target = target

    def create_local_plan(self) -> LoadPlan:
        assert isinstance(self.metadata, Metadata)
        items = []
        for key, slot in self._slots.items():
            saved = self.metadata.state_dict_metadata.get(key)
            if not isinstance(saved, TensorStorageMetadata) or saved.size != torch.Size([slot.whole_numel]):
                raise ValueError(f"the files hold no {key!r} of {slot.whole_numel} numbers")
            chunk = ChunkStorageMetadata(torch.Size([slot.shard.start]), torch.Size([slot.numel]))
            items += create_read_items_for_chunk_list(key, saved, [chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        slot = self._slots[index.fqn]
        return self._target[slot.offset : slot.offset + slot.numel]

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return self.transform_tensor(read_item, self.lookup_tensor(read_item.dest_index))


def write_rows(
    folder: Path,
    slots: Sequence[Slot],
    rows: Mapping[str, ReadColumns],
    processes: Processes,
    dtypes: Dtypes,
) -> None:
    """Write what each process holds of some rows into an existing folder.

    Args:
        folder: where to; processes may see different ones, whose files then belong together.
        slots: of a row, in this process.
        rows: reads columns of each row, by its name.
        processes: that write together.
        dtypes: in which dtype a tensor of a row is written.
    """
    planner = _Saving(slots, rows, dtypes)
    writer = dcp.FileSystemWriter(folder)
    with collective_timeout(processes.timeout):
        _quietly(dcp.save, {}, storage_writer=writer, planner=planner, process_group=processes.group)


def read_row(folder: Path, slots: Sequence[Slot], row: str, target: Tensor, processes: Processes) -> None:
    """Fill ``target``, this process's columns, with a row of :func:`write_rows`, whoever wrote it.

    Raises:
        Exception: the files are not there, or hold other tensors.
    """
    planner = _Loading(slots, row, target)
    reader = dcp.FileSystemReader(folder)
    _quietly(dcp.load, {}, storage_reader=reader, planner=planner, process_group=processes.group)


def describe_slots(slots: Sequence[Slot]) -> dict[str, Any]:
    """What a reader must know to make tensors of the flat ones in the files: their shapes, and dimensions in front."""
    return {slot.name: {"shape": list(slot.shape), "front": slot.shard.dim} for slot in slots}


def read_tensors(folder: Path, described: Mapping[str, Any], names: Sequence[str]) -> dict[str, Tensor]:
    """Some whole tensors of the only row in a folder, read by one process.

    Args:
        folder: with files of :func:`write_rows`; of all machines, if each wrote its own.
        described: by :func:`describe_slots`.
        names: of the tensors.
    """
    saved = _saved(folder)
    flat: dict[str, Any] = {name: torch.empty(saved[name].size, dtype=saved[name].properties.dtype) for name in names}
    _quietly(dcp.load, flat, storage_reader=dcp.FileSystemReader(folder))
    found = {}
    for name in names:
        shape, front = list(described[name]["shape"]), described[name]["front"]
        moved = [shape.pop(front)] if shape else []
        whole = flat[name].view(*moved, *shape)
        found[name] = (whole.movedim(0, front) if moved else whole).contiguous()
    return found


def tensor_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every tensor in a folder with files of :func:`write_rows`."""
    return {name: kept.size.numel() * kept.properties.dtype.itemsize for name, kept in _saved(folder).items()}


def _saved(folder: Path) -> dict[str, TensorStorageMetadata]:
    found = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: kept for name, kept in found.items() if isinstance(kept, TensorStorageMetadata)}


def _quietly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with warnings.catch_warnings():
        # That one process is meant to do this alone.
        warnings.filterwarnings("ignore", message="torch.distributed is")
        function(*args, **kwargs)


def is_sharded(folder: Path) -> bool:
    """Whether a folder holds files of :func:`write_rows`."""
    return (folder / ".metadata").is_file()
