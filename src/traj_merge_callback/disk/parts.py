"""Rows divided among ranks as safetensors files: any number of ranks reads what any other number wrote.

Each rank holds some columns of a row, and every tensor of the model is contiguous ranges of columns, flat with its
sharded dimension in front. A rank writes the columns it holds; an index of ranges, plain JSON, says which ones these
are. One process is the case of one part. Nothing that is read is unpickled.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..distributed import Processes
from ..window.layout import Slot
from .untrusted import damage_of, integer, mapping, own_file, sequence

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# More numbers than a tensor can have, and more ranks than there are anywhere.
_MOST_NUMBERS = 2**53
_LARGEST_RANK = 10**7
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _FLOATS}


@dataclass(frozen=True)
class Range:
    """Numbers ``start`` to ``start + count`` of one tensor, flat with its sharded dimension in front."""

    tensor: str
    start: int
    count: int


@dataclass(frozen=True)
class Copy:
    """Where some numbers of a tensor are, and where they go.

    Args:
        rank: wrote them.
        columns: of that rank's rows.
        numbers: of the range in which they stand there.
        target: of the range that is filled.
    """

    rank: int
    columns: slice
    numbers: slice
    target: slice


@dataclass(frozen=True)
class PartsIndex:
    """Which rank wrote which ranges.

    Args:
        tensors: for each tensor its ``{"shape", "front", "dtype"}``, ``front`` being the dimension that is moved in
            front before the tensor is flattened.
        parts: the ranges that each rank wrote, in the order of its columns. Of ranks that hold the same ranges
            (replicas) only the first one writes.
    """

    tensors: dict[str, dict[str, Any]]
    parts: dict[int, tuple[Range, ...]]

    @classmethod
    def of(cls, slots: Sequence[Slot], processes: Processes) -> PartsIndex:
        """The index of what the ranks hold; a collective, with the same result on every rank."""
        tensors = {
            slot.name: {
                "shape": list(slot.shape),
                "front": slot.shard.dim,
                "dtype": str(slot.dtype).removeprefix("torch."),
            }
            for slot in slots
        }
        held = processes.all_gather_object(ranges_of(slots))
        return cls(tensors, {rank: ranges for rank, ranges in enumerate(held) if ranges and ranges not in held[:rank]})

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        parts = {rank: [[r.tensor, r.start, r.count] for r in ranges] for rank, ranges in self.parts.items()}
        return {"tensors": self.tensors, "parts": {str(rank): ranges for rank, ranges in parts.items()}}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> PartsIndex:
        """The index that :meth:`to_json` gave.

        Raises:
            ValueError: it is none.
        """
        try:
            tensors = {name: _described(t) for name, t in mapping(values["tensors"]).items()}
            sizes = {name: math.prod(t["shape"]) for name, t in tensors.items()}
            parts = {int(rank): _ranges(found, sizes) for rank, found in mapping(values["parts"]).items()}
            if wrong := [rank for rank in parts if not 0 <= rank <= _LARGEST_RANK]:
                raise ValueError(f"{wrong[0]} is no rank")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"the index of parts is not valid ({type(error).__name__}: {error})") from error
        return cls(tensors, parts)

    def rank_of(self, ranges: tuple[Range, ...]) -> int | None:
        """The rank that wrote exactly these ranges, if one did."""
        return next((rank for rank, written in self.parts.items() if written == ranges), None)

    def copies(self, wanted: Range) -> Iterator[Copy]:
        """What to copy to fill a range, whose numbers are in the order of the index (see ``tensors``).

        Raises:
            ValueError: some of its numbers are in no part.
        """
        done = 0
        while done < wanted.count:
            number = wanted.start + done
            places = self._places.get(wanted.tensor, [])
            holding = (place for place in places if 0 <= number - place[2].start < place[2].count)
            if (place := next(holding, None)) is None:
                raise ValueError(f"the files hold no {wanted.tensor!r} from number {number} on")
            rank, column, there = place
            first = number - there.start
            count = min(wanted.count - done, there.count - first)
            columns = slice(column + first, column + first + count)
            yield Copy(rank, columns, slice(first, first + count), slice(done, done + count))
            done += count

    @functools.cached_property
    def _places(self) -> dict[str, list[tuple[int, int, Range]]]:
        """For each tensor the ranges that were written: by which rank, from which of its columns on, which numbers."""
        found: dict[str, list[tuple[int, int, Range]]] = {}
        for rank, ranges in self.parts.items():
            columns = itertools.accumulate((one.count for one in ranges), initial=0)
            for column, one in zip(columns, ranges, strict=False):
                found.setdefault(one.tensor, []).append((rank, column, one))
        return found

    def unflatten(self, tensor: str, flat: Tensor) -> Tensor:
        """A whole flat tensor in its own shape."""
        shape, front = list(self.tensors[tensor]["shape"]), self.tensors[tensor]["front"]
        moved = [shape.pop(front)] if shape else []
        whole = flat.view(*moved, *shape)
        return whole.movedim(0, front) if moved else whole


def _described(tensor: dict[str, Any]) -> dict[str, Any]:
    shape, front = [integer(n) for n in sequence(tensor["shape"])], integer(tensor["front"])
    if front >= max(len(shape), 1) or math.prod(shape) > _MOST_NUMBERS:
        raise ValueError(f"shape={shape}, front={front} are of no tensor")
    if tensor["dtype"] not in _DTYPES:
        raise ValueError(f"dtype={tensor['dtype']!r} is not one of {sorted(_DTYPES)}")
    return {"shape": shape, "front": front, "dtype": tensor["dtype"]}


def _ranges(found: Any, sizes: dict[str, int]) -> tuple[Range, ...]:
    ranges = tuple(Range(name, integer(start), integer(count, least=1)) for name, start, count in sequence(found))
    for one in ranges:
        if one.start + one.count > sizes[one.tensor]:
            raise ValueError(f"{one} is longer than the tensor, which has {sizes[one.tensor]} numbers")
    if len({one.tensor for one in ranges}) < len(ranges):
        raise ValueError("a rank holds two ranges of one tensor")
    return ranges


def ranges_of(slots: Sequence[Slot]) -> tuple[Range, ...]:
    """The ranges of this rank's columns, in their order."""
    return tuple(Range(slot.name, slot.shard.start, slot.numel) for slot in slots if slot.numel)


def part_path(folder: Path, name: str, rank: int) -> Path:
    """The file with the part of ``name`` that a rank wrote."""
    return folder / f"{name}.rank-{rank:05d}.safetensors"


# Sharded snapshots: one tensor for each range, in the dtype of the model's tensor

_WEIGHTS = "weights"


def snapshot_part(row: Tensor, slots: Sequence[Slot]) -> dict[str, Tensor]:
    """This rank's part of a snapshot, on the CPU: its numbers of each tensor, flat."""
    held = [slot for slot in slots if slot.numel]
    return {slot.name: row[slot.offset : slot.offset + slot.numel].to("cpu", slot.dtype, copy=True) for slot in held}


def snapshot_part_path(folder: Path, rank: int) -> Path:
    """The file with a rank's part of a snapshot."""
    return part_path(folder, _WEIGHTS, rank)


def check_parts(folder: Path, index: PartsIndex) -> None:
    """Check that a sharded snapshot's files can hold all that its index promises, before memory is taken for it.

    Raises:
        ValueError: they cannot.
        FileNotFoundError: a part is missing.
    """
    missing = {name: math.prod(tensor["shape"]) for name, tensor in index.tensors.items()}
    for rank, ranges in index.parts.items():
        path = own_file(snapshot_part_path(folder, rank))
        sizes = [one.count * _DTYPES[index.tensors[one.tensor]["dtype"]].itemsize for one in ranges]
        if sum(sizes) > path.stat().st_size:
            raise ValueError(f"{path} is damaged: it has {path.stat().st_size} bytes, and should hold {sum(sizes)}")
        for one in ranges:
            missing[one.tensor] -= one.count
    if short := [name for name, count in missing.items() if count > 0]:
        raise ValueError(f"the files of {folder} do not hold all of {short[0]!r}")


def tensor_sizes(index: PartsIndex) -> dict[str, int]:
    """Bytes of every tensor of a sharded snapshot."""
    return {name: math.prod(t["shape"]) * _DTYPES[t["dtype"]].itemsize for name, t in index.tensors.items()}


def read_tensors(folder: Path, index: PartsIndex, names: Sequence[str]) -> dict[str, Tensor]:
    """Some whole tensors of a sharded snapshot.

    Raises:
        ValueError: numbers of a tensor are in no part, or a part is damaged.
        FileNotFoundError: a part is missing.
    """
    found = {}
    for name in names:
        described = index.tensors[name]
        flat = torch.empty(math.prod(described["shape"]), dtype=_DTYPES[described["dtype"]])
        for copy in index.copies(Range(name, 0, len(flat))):
            path = own_file(snapshot_part_path(folder, copy.rank))
            with damage_of(path), safe_open(path, framework="pt") as opened:
                flat[copy.target].copy_(opened.get_slice(name)[copy.numbers])
        found[name] = index.unflatten(name, flat).contiguous()
    return found
