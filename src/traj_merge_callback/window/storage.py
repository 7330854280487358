"""How the window's rows are kept: as float32, bfloat16 or int8 deltas; in CPU memory, on the device or in a file.

:class:`DenseRows` and :class:`Int8Rows` store rows of N numbers by index. :class:`Ring` is the window's memory: one of
these for the last k checkpoints, and the few rows beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..search.spans import Span, to_join
from .devices import page_locked
from .stored import StoredRow

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
# Neighbouring int8 deltas that share one float32 scale: 4 bytes for 64 of them, 1/16 of a byte each.
BLOCK = 64
# The anchor is not renewed where that would make rounding errors of the other rows more than this many times as large.
# Between neighbouring rows of one learning rate they become as large as they were.
_FAR = 8.0
# Columns of a row that one tensor operation works on: enough to be worth two threads, few enough for the cache.
CHUNK = 1 << 20

# Allocates an uninitialized tensor, given its name, shape and dtype; of all that rows need, (rows, numbers) come first.
Allocate = Callable[[str, tuple[int, ...], torch.dtype], Tensor]


def in_memory(*, pinned: bool = False, device: torch.device | None = None) -> Allocate:
    """Tensors on ``device``, by default in CPU memory; page-locked (pinned) memory, to which a GPU copies
    while it computes, and of which not a byte more is taken than asked for.
    """

    def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if pinned and device is None and size:
            return page_locked(size).view(dtype).view(shape)
        return torch.empty(shape, dtype=dtype, device=device)

    return allocate


def add_share(target: Tensor, source: Tensor, share: float) -> None:
    """Let a target become ``1 - share`` of itself and ``share`` of its source."""
    if share == 1.0:
        # Copied, and not averaged with what was there before: NaNs of that must not spoil this.
        target.copy_(source)
    else:
        target.lerp_(source.to(target.dtype), share)


def decode_int8(deltas: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """Whole blocks of int8 deltas times their blocks' scales, in float32.

    Args:
        deltas: int8, shape ``(blocks * BLOCK,)``.
        scales: float32, shape ``(blocks,)``.
        out: float32, at least as long as ``deltas``; its beginning is written.

    Returns:
        The beginning of ``out``, shape ``(blocks * BLOCK,)``.
    """
    values = out[: len(deltas)].copy_(deltas)
    values.view(-1, BLOCK).mul_(scales[:, None])
    return values


class DenseRows:
    """Rows of plain numbers, shape ``(count, numel)``.

    Args:
        count: number of rows.
        numel: N, the numbers of a row.
        dtype: float32 or bfloat16.
        allocate: where the rows are kept.
    """

    def __init__(self, count: int, numel: int, dtype: torch.dtype, allocate: Allocate) -> None:
        self._rows = allocate("rows", (count, numel), dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self._rows.nbytes

    def row(self, index: int) -> Tensor:
        """Row ``index`` itself (no copy), shape ``(numel,)``."""
        return self._rows[index]

    def write(self, index: int, values: Tensor, *, renew: bool = False) -> None:
        """Store ``values``, shape ``(numel,)``, as row ``index``; ``renew`` has no effect, as there is no anchor."""
        self._rows[index].copy_(values)

    def join(self, index: int, other: int, share: float) -> None:
        """Let row ``index`` become ``(1 - share)`` of itself and ``share`` of row ``other``."""
        for one, two in zip(self._rows[index].split(CHUNK), self._rows[other].split(CHUNK), strict=True):
            one.copy_(one.float().lerp_(two.float(), share))

    def base(self, columns: slice) -> Tensor | None:
        """Some columns of the row that all rows are stored as deltas to; None, as these are not."""
        return None

    def stored(self, index: int, columns: slice) -> tuple[Tensor, ...]:
        """The stored tensors that hold some columns of a row (no copy)."""
        return (self._rows[index, columns],)

    def decode(self, stored: tuple[Tensor, ...], columns: slice, scratch: Tensor) -> Tensor:
        """Those columns as float32 deltas to :meth:`base`, or as the numbers themselves where that is None.

        Args:
            stored: by :meth:`stored`, or a copy of it on another device.
            columns: the same columns.
            scratch: float32, on the device of ``stored``, at least ``2 * BLOCK`` longer than the columns; the result
                may lie in it.
        """
        (values,) = stored
        return values if values.dtype is torch.float32 else scratch[: len(values)].copy_(values)

    def state(self, index: int) -> dict[str, Tensor]:
        """The named tensors that row ``index`` is stored as (no copy)."""
        return {"row": self._rows[index]}

    def shared_state(self) -> dict[str, Tensor]:
        """The named tensors that all rows are decoded with: none."""
        return {}


class Int8Rows:
    """Rows as int8 deltas to a float32 *anchor* row, with one float32 scale for every block of 64.

    The anchor is a copy of one of the checkpoints written. The rounding error of a number is at most 1/254 of the
    largest delta of its block, so the anchor is renewed once every k rows, which keeps it near the rows held; renewing
    it rounds each of the other rows once more. A checkpoint that is much farther from the other rows than the anchor
    is, as in a loss spike, does not become the anchor: rounded as deltas to it, the others would be lost. A row takes
    1 + 4/64 bytes per number, the anchor 4.

    Args:
        count, numel, allocate: see :class:`DenseRows`.
    """

    def __init__(self, count: int, numel: int, allocate: Allocate) -> None:
        blocks = -(-numel // BLOCK)
        self._deltas = allocate("deltas", (count, blocks * BLOCK), torch.int8)
        self._scales = allocate("scales", (count, blocks), torch.float32)
        self._anchor = allocate("anchor", (blocks * BLOCK,), torch.float32)
        self._anchor.zero_()
        self._numel = numel

    @property
    def nbytes(self) -> int:
        """Bytes of all rows and the anchor."""
        return self._deltas.nbytes + self._scales.nbytes + self._anchor.nbytes

    def write(self, index: int, values: Tensor, *, renew: bool = False) -> None:
        """Store ``values``, shape ``(numel,)``, as row ``index``; with ``renew`` they become the anchor, if near."""
        others = [other for other in range(len(self._deltas)) if other != index]
        renew = renew and all(bool(torch.isfinite(chunk).all()) for chunk in values.split(CHUNK))
        renew = renew and self._is_near(values, others)
        for columns, new in self._padded(values):
            anchor = self._anchor[columns]
            if renew:
                for other in others:
                    self._encode(other, columns, self._decode(other, columns).add_(anchor).sub_(new))
                anchor.copy_(new)
            self._encode(index, columns, new.sub_(anchor))

    def join(self, index: int, other: int, share: float) -> None:
        """See :meth:`DenseRows.join`; rounded once more."""
        for start in range(0, self._deltas.shape[1], CHUNK):
            columns = slice(start, min(start + CHUNK, self._deltas.shape[1]))
            self._encode(index, columns, self._decode(index, columns).lerp_(self._decode(other, columns), share))

    def base(self, columns: slice) -> Tensor | None:
        """Some columns of the anchor."""
        return self._anchor[columns]

    def stored(self, index: int, columns: slice) -> tuple[Tensor, ...]:
        """The deltas and scales of the whole blocks that hold some columns of a row (no copy)."""
        blocks = slice(columns.start // BLOCK, -(-columns.stop // BLOCK))
        return self._deltas[index, blocks.start * BLOCK : blocks.stop * BLOCK], self._scales[index, blocks]

    def decode(self, stored: tuple[Tensor, ...], columns: slice, scratch: Tensor) -> Tensor:
        """See :meth:`DenseRows.decode`."""
        deltas, scales = stored
        values = decode_int8(deltas, scales, scratch)
        skipped = columns.start % BLOCK
        return values[skipped : skipped + columns.stop - columns.start]

    def state(self, index: int) -> dict[str, Tensor]:
        """The named tensors that row ``index`` is stored as (no copy), without the anchor."""
        return {"deltas": self._deltas[index], "scales": self._scales[index]}

    def shared_state(self) -> dict[str, Tensor]:
        """The named tensors that all rows are decoded with: the anchor."""
        return {"anchor": self._anchor}

    def _is_near(self, values: Tensor, rows: list[int]) -> bool:
        """Whether rows would not be rounded far more coarsely as deltas to ``values``; true if there is no anchor."""
        if not self._anchor.any():
            return True
        before = after = 0.0
        for columns, new in self._padded(values):
            for row in rows:
                deltas = self._decode(row, columns).add_(self._anchor[columns]).sub_(new)
                after += float(deltas.view(-1, BLOCK).abs().amax(dim=1).sum(dtype=torch.float64))
                scales = self._scales[row, columns.start // BLOCK : columns.stop // BLOCK]
                before += 127.0 * float(scales.sum(dtype=torch.float64))
        return not after > _FAR * before

    def _padded(self, values: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of whole blocks: their columns, and a copy of the values there, with zeros at the end."""
        for start in range(0, self._deltas.shape[1], CHUNK):
            columns = slice(start, min(start + CHUNK, self._deltas.shape[1]))
            new = torch.zeros(columns.stop - columns.start, device=self._anchor.device)
            new[: self._numel - start].copy_(values[columns])
            yield columns, new

    def _decode(self, index: int, columns: slice) -> Tensor:
        scratch = torch.empty(columns.stop - columns.start + 2 * BLOCK, device=self._anchor.device)
        return self.decode(self.stored(index, columns), columns, scratch)

    def _encode(self, index: int, columns: slice, deltas: Tensor) -> None:
        """Store float32 deltas to the anchor; ``columns`` are whole blocks."""
        blocks = deltas.view(-1, BLOCK)
        scales = blocks.abs().amax(dim=1).div_(127.0)
        self._scales[index, columns.start // BLOCK : columns.stop // BLOCK].copy_(scales)
        blocks = blocks.div(scales.clamp_(min=torch.finfo(torch.float32).tiny)[:, None]).round_().clamp_(-127, 127)
        self._deltas[index, columns].copy_(blocks.view(-1))


Rows = DenseRows | Int8Rows


def rows_of(count: int, numel: int, dtype: str, allocate: Allocate) -> Rows:
    """Rows kept as "float32", "bfloat16" or "int8"."""
    return Int8Rows(count, numel, allocate) if dtype == "int8" else DenseRows(count, numel, DTYPES[dtype], allocate)


def rows_nbytes(count: int, numel: int, dtype: str) -> int:
    """Bytes that such rows take, the anchor of int8 rows included."""
    return rows_of(count, numel, dtype, in_memory(device=torch.device("meta"))).nbytes


class Room(NamedTuple):
    """Where a new row goes, and what has to happen before.

    Args:
        place: its index in ``rows``.
        position: of a row, counted from the oldest, that the next newer one is joined with; None: none is.
        into: that row's index in ``rows``; the newer one's is ``place``.
        share: of the newer one in their mean.
    """

    place: int
    position: int | None = None
    into: int = 0
    share: float = 0.0


class Ring:
    """The window's memory: ``size`` rows, where a new row takes the place of an old one, and the rows beside them.

    Beside the rows, where they are needed:

    - ``leading``: BEMA's two *leading rows*, which stand in front of the window as if they were its oldest rows.
    - ``mean``: the running mean of the weights sampled since the last row, which becomes the next row.
    - ``arrival``: the live weights as they were captured last, where rows are no exact copies of them. Where rows are
      means, they are the newest row, behind those.
    - ``staging``: one row for a merged model, for whoever evaluates it.

    Args:
        size: k, the number of rows.
        numel: N, the numbers of a row.
        dtype: how a row is kept: "float32", "bfloat16" or "int8".
        live: dtype of ``arrival``; None if rows are exact copies of live weights, which then need no ``arrival``.
        leading: whether there are leading rows.
        mean: whether rows are means.
        multiscale: whether two rows become one to make room, instead of the oldest being left out.
        allocate: where the rows are kept.
        allocate_beside: where everything else is kept.
    """

    def __init__(
        self,
        size: int,
        numel: int,
        dtype: str,
        *,
        live: torch.dtype | None,
        leading: bool,
        mean: bool,
        multiscale: bool,
        allocate: Allocate,
        allocate_beside: Allocate,
    ) -> None:
        if multiscale and not mean:
            raise ValueError("multiscale=True: these rows are means, and need mean_rows=True")
        self.size = size
        self.dtype = dtype
        self.rows = rows_of(size, numel, dtype, allocate)
        self.leading = DenseRows(2, numel, torch.float32, allocate_beside) if leading else None
        self.mean = allocate_beside("mean", (numel,), torch.float32) if mean else None
        self._live = None if live is None else DenseRows(1, numel, live, allocate_beside)
        self.staging = allocate_beside("staging", (numel,), torch.float32)
        self.spans: list[Span] = []  # of the rows held, oldest first
        self.pushed = 0  # rows ever added
        self.averages_anew = False  # whether the leading average begins with the next row
        self.sampled = 0  # checkpoints in the running mean
        self.sampled_from = 0  # the step of the first of them
        self._multiscale = multiscale
        self._places: list[int] = []  # of the rows held, oldest first: their indices in ``rows``

    @property
    def arrival(self) -> Tensor | None:
        """See above; shape ``(numel,)``."""
        return None if self._live is None else self._live.row(0)

    @property
    def live_is_beside(self) -> bool:
        """Whether live is a row beside those that are means; not if the newest of these is the mean of live alone."""
        return self.mean is not None and bool(self.spans) and self.spans[-1].samples > 1

    @property
    def nbytes(self) -> int:
        """Bytes of everything."""
        kept = [self.rows.nbytes, 0 if self.leading is None else self.leading.nbytes]
        return sum(kept) + sum(row.nbytes for row in (self.mean, self.arrival, self.staging) if row is not None)

    def accumulate(self, arrival: Tensor, share: float) -> None:
        """Add live weights that have arrived to the running mean, with this share."""
        assert self.mean is not None
        for mean, live in zip(self.mean.split(CHUNK), arrival.split(CHUNK), strict=True):
            add_share(mean, live, share)

    def count_sample(self, step: int) -> None:
        """One more checkpoint is in the running mean."""
        self.sampled += 1
        if self.sampled == 1:
            self.sampled_from = step

    def room(self, step: int, spoiled: Collection[str] = ()) -> Room:
        """Where a row of this step goes; nothing is changed yet.

        Args:
            step: of the new row.
            spoiled: names of rows that leave first, the oldest of them, rather than be joined with good ones.
        """
        if len(self.spans) < self.size:
            return Room(next(place for place in range(self.size) if place not in self._places))
        for span, place in zip(self.spans, self._places, strict=True):
            if span.name in spoiled:
                return Room(place)
        position = to_join(self.spans, step) if self._multiscale else None
        if position is None:
            return Room(self._places[0])
        one, two = self.spans[position : position + 2]
        share = two.samples / (one.samples + two.samples)
        return Room(self._places[position + 1], position, self._places[position], share)

    def clear_room(self, room: Room) -> None:
        """Join the rows that have to be, so that the row in this room may be written."""
        if room.position is not None:
            self.rows.join(room.into, room.place, room.share)

    def add(self, span: Span, room: Room) -> None:
        """Make the row in this room the newest one."""
        self.pushed += 1
        if room.position is not None:
            one, two = self.spans[room.position : room.position + 2]
            self.spans[room.position : room.position + 2] = [one.joined(two)]
        elif room.place in self._places:
            del self.spans[self._places.index(room.place)]
        self._places = [place for place in self._places if place != room.place] + [room.place]
        self.spans.append(span)

    def uncount_sample(self) -> None:
        """The last checkpoint was left out of the running mean."""
        self.sampled -= 1

    def drop_newest(self) -> None:
        """Remove the newest row."""
        self.pushed -= 1
        del self.spans[-1], self._places[-1]

    def drop_since(self, step: int) -> None:
        """Remove the rows that end at this step or later, and the running mean; a leading average begins anew."""
        while self.spans and self.spans[-1].last >= step:
            self.drop_newest()
        self.pushed, self.sampled, self.averages_anew = self.pushed if self.spans else 0, 0, True

    def in_order(self) -> list[StoredRow]:
        """The rows that merge weights belong to, oldest first: the leading rows, those held, and live beside means."""
        if not self.spans:
            return []
        leading = [] if self.leading is None else [StoredRow(self.leading, 0), StoredRow(self.leading, 1)]
        live = [] if self._live is None or not self.live_is_beside else [StoredRow(self._live, 0)]
        return leading + [StoredRow(self.rows, place) for place in self._places] + live

    # Keeping and restoring

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`CheckpointWindow.state_dict`."""
        return {
            "spans": [list(span) for span in self.spans],
            "dtype": self.dtype,
            "pushed": self.pushed,
            "sampled": self.sampled,
            "sampled_from": self.sampled_from,
            "rows": [self.rows.state(place) for place in self._places],
            "shared": self._shared(),
        }

    def _shared(self) -> dict[str, Tensor]:
        """Everything beside the ring that later rows and merges depend on."""
        tensors = dict(self.rows.shared_state())
        if self.leading is not None:
            tensors |= {"start": self.leading.row(0), "average": self.leading.row(1)}
        if self.mean is not None:
            tensors["mean"] = self.mean
        if self.arrival is not None:
            tensors["arrival"] = self.arrival
        return tensors

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`CheckpointWindow.load_state_dict`."""
        self._check_kind(state)
        mine, theirs = self._shared(), state["shared"]
        if "arrival" in mine and "arrival" not in theirs and state["rows"]:
            theirs = {**theirs, "arrival": state["rows"][-1]["row"]}  # rows were exact copies of live weights
        pairs = [(mine[name], theirs[name]) for name in mine]
        for index, place in self._fitting(state):
            row = self.rows.state(place)
            pairs += [(row[name], state["rows"][index][name]) for name in row]
        for target, value in pairs:
            if (target.shape, target.dtype) != (value.shape, value.dtype):
                raise ValueError(
                    f"a saved row has shape {tuple(value.shape)} and dtype {value.dtype}; this model's rows have "
                    f"{tuple(target.shape)} and {target.dtype}"
                )
        for target, value in pairs:
            target.copy_(value)
        self._adopt_counts(state)

    def load_rows(self, state: dict[str, Any], read: Callable[[str, Tensor], None]) -> None:
        """See :meth:`CheckpointWindow.load_rows`."""
        self._check_kind(state)
        for name, row in self._shared().items():
            if name in state["shared"]:
                read(name, row)
        for index, place in self._fitting(state):
            read(_row_name(index), self.staging)
            self.rows.write(place, self.staging)
        if self.arrival is not None and "arrival" not in state["shared"]:
            self.arrival.copy_(self.staging)  # rows were exact copies of live weights
        self._adopt_counts(state)

    def _check_kind(self, state: dict[str, Any]) -> None:
        mine, theirs = self._shared(), state["shared"]
        if ("mean" in theirs) is not ("mean" in mine):
            raise ValueError("the saved window's rows are means and this one's are not, or the other way round")
        if ("average" in theirs) is not ("average" in mine):
            raise ValueError(
                "the saved window has running sums and this one has not, or the other way round: the search differs"
            )
        if state["dtype"] != self.dtype:
            raise ValueError(f"the saved window's rows are {state['dtype']}; this one's dtype={self.dtype!r}")

    def _fitting(self, state: dict[str, Any]) -> list[tuple[int, int]]:
        """The newest saved rows, as many as fit: the index of each in ``state["rows"]``, and in ``rows`` here."""
        saved = len(state["spans"])
        return [(index, place) for place, index in enumerate(range(max(0, saved - self.size), saved))]

    def _adopt_counts(self, state: dict[str, Any]) -> None:
        self.spans = [Span(*span) for span in state["spans"]][-self.size :]
        self._places = list(range(len(self.spans)))
        self.pushed, self.sampled, self.sampled_from = state["pushed"], state["sampled"], state["sampled_from"]


def _row_name(index: int) -> str:
    """The name, in a saved state, of the row at position ``index``, oldest first."""
    return f"row-{index:02d}"
