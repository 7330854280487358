"""The arithmetic of the window's products: columns in pieces and chunks, and sums over parameter groups and ranks.

A row has N columns, far too many for one tensor operation or for the time between two training steps:

- a *region* is all the columns of one parameter group that the same number of ranks hold: they have the same merge
  weights, and the same factor when products are summed over ranks;
- a *chunk* is some neighbouring columns of one region, as many as one tensor operation works on;
- a *piece* is a list of chunks, as many as are computed between two training steps.

:class:`Columns` divides the columns so, and sums products over regions and ranks; :func:`combine`, :func:`project` and
:func:`gram` compute one piece of a product, reading each row once. Then there is what cannot be computed with: numbers
that are not finite, in buffers, which are then live's, and in merges, which are then not published.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..distributed import Processes
from .devices import side_stream, without_autocast
from .layout import ParameterGroups, ParameterLayout, Slot
from .pieces import COMBINE, EXCHANGE, Pieces
from .storage import BLOCK, CHUNK, Rows
from .stored import StoredRow

# Columns of a piece: a few milliseconds' reading.
PIECE = 1 << 23
# Columns of a chunk on a GPU, where CHUNK would be too few to be worth a kernel.
_DEVICE_CHUNK = 1 << 22


class Region(NamedTuple):
    """The columns of one parameter group that the same number of ranks hold: the group's index, and that number."""

    group: int
    copies: int


class Chunk(NamedTuple):
    """Neighbouring columns of one region, which is given by its index in :meth:`Columns.regions`."""

    region: int
    columns: slice


class Columns:
    """The columns that this rank holds, divided into regions and pieces.

    With ``grouped`` its methods tell parameter groups apart; without, the whole model is one group.

    Args:
        layout: where each tensor's columns are.
        groups: the parameter groups, if there are any.
        processes: the ranks that train the model together.
    """

    def __init__(self, layout: ParameterLayout, groups: ParameterGroups | None, processes: Processes) -> None:
        self._layout = layout
        self._groups = groups
        self._processes = processes
        kinds = [(grouped, longest) for grouped in (False, True) for longest in (CHUNK, _DEVICE_CHUNK)]
        counts = processes.all_reduce_max(*(len(self._cut(*kind)) for kind in kinds))
        self._num_pieces = {kind: int(count) for kind, count in zip(kinds, counts, strict=True)}

    @property
    def num_pieces(self) -> int:
        """How many pieces a product on the CPU has, the same number on all ranks."""
        return self._num_pieces[False, CHUNK]

    def num_groups(self, grouped: bool) -> int:
        """How many vectors of merge weights there are."""
        return len(self._groups) if grouped and self._groups is not None else 1

    def regions(self, grouped: bool) -> list[Region]:
        """The regions that have columns on this rank."""
        return sorted({Region(group, slot.shard.copies) for group, slot in self._slots(grouped)})

    def pieces(self, grouped: bool, device: torch.device) -> list[list[Chunk]]:
        """The columns in pieces, for work on a device; as many as on the rank that has most, the last of them empty."""
        longest = CHUNK if device.type == "cpu" else _DEVICE_CHUNK
        pieces = self._cut(grouped, longest)
        return pieces + [[]] * (self._num_pieces[grouped, longest] - len(pieces))

    def sum(self, products: Tensor, *, grouped: bool, summands: bool) -> Pieces[np.ndarray]:
        """Sum products over the regions of each group, and over ranks.

        Args:
            products: of each region, float64, shape ``(regions, ...)``.
            grouped: see the class.
            summands: whether the products of several ranks with the same columns are summands of one; otherwise they
                are the same number, and count once.

        Returns:
            Shape ``(groups, ...)``, or ``(...)`` if not grouped; bit-identical on all ranks.
        """
        sums = np.zeros((self.num_groups(grouped), *products.shape[1:]))
        for region, product in zip(self.regions(grouped), products.cpu().numpy(), strict=True):
            sums[region.group] += product if summands else product / region.copies
        if self._processes.size > 1:
            yield EXCHANGE
            sums = self._processes.all_gather_array(sums).sum(axis=0)
        return sums if grouped else sums[0]

    def _slots(self, grouped: bool) -> list[tuple[int, Slot]]:
        """Every slot, with the index of its group."""
        members = self._groups.members if grouped and self._groups is not None else [0] * len(self._layout.slots)
        return list(zip(members, self._layout.slots, strict=True))

    def _cut(self, grouped: bool, longest: int) -> list[list[Chunk]]:
        """The columns in pieces, of chunks of at most ``longest`` columns."""
        pieces: list[list[Chunk]] = []
        room = 0
        for region, whole in self._longest_chunks(grouped):
            for start in range(whole.start, whole.stop, longest):
                columns = slice(start, min(start + longest, whole.stop))
                if not pieces or columns.stop - columns.start > room:
                    pieces.append([])
                    room = PIECE
                pieces[-1].append(Chunk(region, columns))
                room -= columns.stop - columns.start
        return pieces

    def _longest_chunks(self, grouped: bool) -> list[Chunk]:
        """The columns in as few chunks as possible."""
        regions = self.regions(grouped)
        chunks: list[Chunk] = []
        for group, slot in self._slots(grouped):
            region, end = regions.index(Region(group, slot.shard.copies)), slot.offset + slot.numel
            if chunks and chunks[-1].region == region:
                chunks[-1] = Chunk(region, slice(chunks[-1].columns.start, end))
            else:
                chunks.append(Chunk(region, slice(slot.offset, end)))
        return chunks


# The functions below compute one piece of a product. ``rows`` are those of the window, oldest first. Rows in a storage
# that has a base (int8's anchor) are decoded as deltas to it; leading rows and live beside rows that are means are not.


@torch.no_grad()
def combine(rows: list[StoredRow], weights: np.ndarray, piece: list[Chunk], out: Tensor) -> None:
    """Write ``weights[region] @ rows`` to a piece's columns of ``out``.

    Args:
        rows: of the window.
        weights: merge weights of each region, shape ``(regions, rows)``.
        piece: the columns.
        out: shape ``(N,)``, of any dtype and device.
    """
    # Rows of weight zero are not read: sparse merges are cheaper, and a bad row spoils no merge without it.
    used = [[int(index) for index in np.flatnonzero(values)] for values in weights]
    decoded = _decoded([(rows[index], columns) for region, columns in piece for index in used[region]], out.device)
    for region, columns in piece:
        values = weights[region]
        target = out[columns]
        total = target if out.dtype is torch.float32 else torch.empty(target.shape, device=out.device)
        base, is_delta = _base(rows, columns)
        begun = base is not None
        if base is not None:
            total.copy_(base).mul_(float(values[is_delta].sum()))
        for index in used[region]:
            weight = float(values[index])
            if begun:
                total.add_(next(decoded), alpha=weight)
            else:
                torch.mul(next(decoded), weight, out=total)
                begun = True
        if not begun:
            total.zero_()
        if total.dtype is not out.dtype:
            target.copy_(total)


@torch.no_grad()
def project(rows: list[StoredRow], piece: list[Chunk], vector: Tensor, products: Tensor) -> None:
    """Add a piece's inner products of the newest row, and of the other rows' deltas to it, with ``vector``.

    Args:
        rows: of the window.
        piece: the columns.
        vector: shape ``(N,)``.
        products: float64, on the device of ``vector``, shape ``(regions, rows)``; added to.
    """
    for chunk, index, values in _newest_and_deltas(rows, piece, vector.device):
        products[chunk.region, index] += torch.dot(values, vector[chunk.columns].float())


@torch.no_grad()
def gram(rows: list[StoredRow], piece: list[Chunk], products: Tensor) -> None:
    """Add a piece's inner products of the rows' deltas to the newest row.

    Args:
        rows: of the window.
        piece: the columns.
        products: float64, shape ``(regions, rows, rows)``, on the device to compute on; added to.
    """
    last = len(rows) - 1
    deltas = torch.zeros(len(rows), _longest(piece), device=products.device)  # the newest row's own stay zero
    for chunk, index, values in _newest_and_deltas(rows, piece, products.device):
        filled = deltas[:, : chunk.columns.stop - chunk.columns.start]
        if index < last:
            filled[index].copy_(values)
        if index == last - 1:
            with without_autocast(filled.device):
                products[chunk.region] += (filled @ filled.T).double()


def until(piece: list[Chunk], end: int) -> list[Chunk]:
    """The columns of a piece that come before ``end``."""
    return [Chunk(r, slice(columns.start, min(columns.stop, end))) for r, columns in piece if columns.start < end]


def are_equal(rows: list[StoredRow], columns: slice) -> bool:
    """Whether some columns are the same in all rows."""
    chunks = [slice(start, min(start + CHUNK, columns.stop)) for start in range(columns.start, columns.stop, CHUNK)]
    last, device = len(rows) - 1, rows[-1].storage.stored(rows[-1].place, columns)[0].device
    found = (
        (index, values) for chunk in chunks for _, index, values in _newest_and_deltas(rows, [Chunk(0, chunk)], device)
    )
    return not any(index < last and values.any() for index, values in found)


def within(values: Tensor, limit: float) -> bool:
    """Whether no number is NaN, or larger than ``limit`` in magnitude."""
    return not len(values) or float(values.abs().amax()) <= limit  # NaN is within no limit


def finite_buffers(layout: ParameterLayout, rows: Rows, row: Tensor) -> set[str]:
    """Put other numbers in the place of buffers that are not finite, which would spoil products and int8 blocks.

    Args:
        layout: of the row's columns.
        rows: where the row is going to be stored.
        row: live weights, shape ``(N,)``.

    Returns:
        The names of these buffers.
    """
    views, found = layout.views(row), set[str]()
    for slot in layout.slots:
        if slot.is_parameter or views[slot.name].isfinite().all():
            continue
        found.add(slot.name)
        base = rows.base(slice(slot.offset, slot.offset + slot.numel))
        # The anchor of int8 rows, so that neighbours in a block are not rounded to the scale of this difference.
        views[slot.name].copy_(torch.zeros(()) if base is None else base.view(slot.shard.local))
    return found


def unmerged_pieces(layout: ParameterLayout, rows: list[StoredRow], not_finite: Set[str]) -> Pieces[frozenset[str]]:
    """The names of the buffers that a merge takes from live, in pieces: a merge of their rows would only round
    them, as they are the same in all, or they were not finite at some time.
    """
    found = set[str]()
    for slot in layout.slots:
        if not slot.is_parameter:
            yield COMBINE
            columns = slice(slot.offset, slot.offset + slot.numel)
            if slot.name in not_finite or are_equal(rows, columns):
                found.add(slot.name)
    return frozenset(found)


def not_finite_pieces(layout: ParameterLayout, columns: Columns, row: Tensor, unmerged: Set[str]) -> Pieces[str | None]:
    """The name of a merged tensor that would not be finite in its own dtype, in pieces; None: all are.

    Args:
        layout: of the row's columns.
        columns: the same, in pieces.
        row: a merge, shape ``(N,)``.
        unmerged: names of tensors that are not looked at.
    """
    slots = [slot for slot in layout.slots if slot.name not in unmerged]
    limits = [min(torch.finfo(slot.dtype).max, torch.finfo(row.dtype).max) for slot in slots]
    found = None
    for piece in columns.pieces(False, row.device):
        yield COMBINE
        for _, part in piece:
            if found is not None or within(row[part], min(limits)):
                continue
            for slot, limit in zip(slots, limits, strict=True):
                first, last = max(slot.offset, part.start), min(slot.offset + slot.numel, part.stop)
                if first < last and not within(row[first:last], limit):
                    found = slot.name
    return found


def _newest_and_deltas(
    rows: list[StoredRow], piece: list[Chunk], device: torch.device
) -> Iterator[tuple[Chunk, int, Tensor]]:
    """For each chunk the newest row, and then every other one, oldest first, as its deltas to the newest row.

    Yields the chunk, the row's index, and float32 values that are valid until the next are asked for.
    """
    last = len(rows) - 1
    order = [last, *range(last)]
    decoded = _decoded([(rows[index], chunk.columns) for chunk in piece for index in order], device)
    buffers = torch.empty(2, _longest(piece), device=device)
    for chunk in piece:
        reference, difference = buffers[:, : chunk.columns.stop - chunk.columns.start]
        base, is_delta = _base(rows, chunk.columns)
        base = None if base is None else base.to(device)
        newest = reference.copy_(next(decoded))
        yield chunk, last, newest if base is None or not is_delta[last] else torch.add(newest, base, out=difference)
        for index in range(last):
            # Of two rows with the same base the base cancels.
            row = torch.sub(next(decoded), newest, out=difference)
            if base is not None and is_delta[index] != is_delta[last]:
                row.add_(base, alpha=1.0 if is_delta[index] else -1.0)
            yield chunk, index, row


def _base(rows: list[StoredRow], columns: slice) -> tuple[Tensor | None, list[bool]]:
    """Some columns of the row that other rows are decoded as deltas to, and which rows are; None if none are."""
    bases = [row.storage.base(columns) for row in rows]
    return next((base for base in bases if base is not None), None), [base is not None for base in bases]


def _longest(piece: list[Chunk]) -> int:
    return max((columns.stop - columns.start for _, columns in piece), default=0)


def _decoded(wanted: list[tuple[StoredRow, slice]], device: torch.device) -> Iterator[Tensor]:
    """Decode some columns of rows one after the other, as float32 deltas to the base of their storage, on a device.

    Each result is valid until the next is asked for. From CPU memory to a CUDA device the next columns are copied, on a
    stream of their own, while the ones before are worked on.
    """
    longest = max((columns.stop - columns.start for _, columns in wanted), default=0)
    scratch = torch.empty(longest + 2 * BLOCK, device=device)
    stored = [row.storage.stored(row.place, columns) for row, columns in wanted]
    to_cuda = device.type == "cuda" and stored and not stored[0][0].is_cuda
    for (row, columns), tensors in zip(wanted, _sent_ahead(stored, device) if to_cuda else stored, strict=True):
        yield row.storage.decode(tuple(tensor.to(device) for tensor in tensors), columns, scratch)


def _sent_ahead(stored: list[tuple[Tensor, ...]], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Copy tensors to a CUDA device, always one item ahead of the one that is worked on."""
    copying, computing = side_stream(device, "rows"), torch.cuda.current_stream(device)
    landing = Landing(stored, device)
    arrived: list[tuple[tuple[Tensor, ...], torch.cuda.Event]] = []

    def send(tensors: tuple[Tensor, ...]) -> None:
        # The buffer that is next was read by the last computation queued, and may have been another's memory before.
        copying.wait_stream(computing)
        with torch.cuda.stream(copying):
            arrived.append((landing.copy(tensors), copying.record_event()))

    try:
        send(stored[0])
        for index in range(len(stored)):
            there, event = arrived.pop()
            if index + 1 < len(stored):
                send(stored[index + 1])
            computing.wait_event(event)
            yield there
    finally:
        # Whoever stops early leaves a copy under way, to memory that the computation's stream is given back here.
        computing.wait_stream(copying)


class Landing:
    """Two buffers for tensors of another device, filled in turns.

    The CPU queues copies long before a GPU makes them. Were each given memory of its own, rows would be there whole.

    Args:
        items: all that will be copied, one after the other.
        device: where to.
    """

    def __init__(self, items: Sequence[tuple[Tensor, ...]], device: torch.device) -> None:
        nbytes = max(sum(_padded(tensor.nbytes) for tensor in item) for item in items)
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]

    def copy(self, item: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Begin to copy an item; the result is valid until the item after the next is copied."""
        self._buffers.reverse()
        copies, start = [], 0
        for tensor in item:
            there = self._buffers[0][start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copies.append(there.copy_(tensor, non_blocking=True))
            start += _padded(tensor.nbytes)
        return tuple(copies)


def _padded(nbytes: int) -> int:
    """The least multiple of 16 that is no less: where a tensor of any dtype may begin."""
    return -(-nbytes // 16) * 16
