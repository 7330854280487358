"""How rows are kept: as float32, bfloat16 or int8 deltas to an anchor; in memory, in a file, or on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
# Numbers that share a scale: 4 bytes for 64 are 1/16 of a byte each.
BLOCK = 64
# Elements of a row that an operation works on at a time: enough to be worth two threads, small enough for the cache.
CHUNK = 1 << 20

Allocate = Callable[[str, tuple[int, ...], torch.dtype], Tensor]


def in_memory(*, pinned: bool = False, device: torch.device | None = None) -> Allocate:
    """Tensors in CPU memory (pinned, so that a GPU can copy to it while it computes), or on a device."""

    def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned and device is None)

    return allocate


class DenseRows:
    """Rows of plain numbers, shape ``(count, numel)``.

    Args:
        count: number of rows.
        numel: N, the numbers of a row.
        dtype: float32 or bfloat16.
        allocate: where the rows are.
    """

    def __init__(self, count: int, numel: int, dtype: torch.dtype, allocate: Allocate) -> None:
        self._rows = allocate("rows", (count, numel), dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self._rows.nbytes

    def row(self, index: int) -> Tensor:
        """A row itself, shape ``(numel,)``."""
        return self._rows[index]

    def write(self, index: int, values: Tensor, *, renew: bool = False) -> None:
        """Put ``values`` of shape ``(numel,)`` into a row; there is no anchor to renew."""
        self._rows[index].copy_(values)

    def base(self, part: slice) -> Tensor | None:
        """What all rows are deltas to on some columns, or None."""
        return None

    def stored(self, index: int, part: slice) -> tuple[Tensor, ...]:
        """Some columns of a row, as they are stored."""
        return (self._rows[index, part],)

    def decode(self, stored: tuple[Tensor, ...], part: slice, scratch: Tensor) -> Tensor:
        """What was stored, as float32 deltas to the base; ``scratch`` is float32, at least as long and may be used."""
        (values,) = stored
        return values if values.dtype is torch.float32 else scratch[: len(values)].copy_(values)

    def state(self, index: int) -> dict[str, Tensor]:
        """A row as named tensors, which share its memory."""
        return {"row": self._rows[index]}

    def shared_state(self) -> dict[str, Tensor]:
        """What belongs to all rows: nothing."""
        return {}


class Int8Rows:
    """Rows as int8 deltas to a float32 anchor, with a float32 scale for every 64 of them.

    The anchor is a row; as long as it is renewed once in a window's length, the rows held are not far from it. What
    rounding leaves is at most 1/254 of the largest delta among 64 neighbours; renewing the anchor rounds the other rows
    once more. A row takes 1 + 4/64 bytes per number, the anchor 4.

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
        """Put ``values`` of shape ``(numel,)`` into a row; if it is finite it may be the new anchor."""
        renew = renew and all(bool(torch.isfinite(chunk).all()) for chunk in values.split(CHUNK))
        others = [other for other in range(len(self._deltas)) if other != index]
        for start in range(0, self._deltas.shape[1], CHUNK):
            part = slice(start, min(start + CHUNK, self._deltas.shape[1]))
            new = torch.zeros(part.stop - part.start, device=self._anchor.device)
            new[: self._numel - start].copy_(values[part])
            anchor = self._anchor[part]
            if renew:
                for other in others:
                    self._encode(other, part, self._decode(other, part).add_(anchor).sub_(new))
                anchor.copy_(new)
            self._encode(index, part, new.sub_(anchor))

    def base(self, part: slice) -> Tensor | None:
        """The anchor on some columns."""
        return self._anchor[part]

    def stored(self, index: int, part: slice) -> tuple[Tensor, ...]:
        """The deltas and scales of the whole blocks that hold some columns of a row."""
        blocks = slice(part.start // BLOCK, -(-part.stop // BLOCK))
        return self._deltas[index, blocks.start * BLOCK : blocks.stop * BLOCK], self._scales[index, blocks]

    def decode(self, stored: tuple[Tensor, ...], part: slice, scratch: Tensor) -> Tensor:
        """See :meth:`DenseRows.decode`."""
        deltas, scales = stored
        values = decode_int8(deltas, scales, scratch[: len(deltas)])
        skipped = part.start % BLOCK
        return values[skipped : skipped + part.stop - part.start]

    def state(self, index: int) -> dict[str, Tensor]:
        """A row as named tensors, which share its memory; the anchor is in :meth:`shared_state`."""
        return {"deltas": self._deltas[index], "scales": self._scales[index]}

    def shared_state(self) -> dict[str, Tensor]:
        """What belongs to all rows."""
        return {"anchor": self._anchor}

    def _decode(self, index: int, part: slice) -> Tensor:
        scratch = torch.empty(part.stop - part.start + 2 * BLOCK, device=self._anchor.device)
        return self.decode(self.stored(index, part), part, scratch)

    def _encode(self, index: int, part: slice, deltas: Tensor) -> None:
        blocks = deltas.view(-1, BLOCK)
        scales = blocks.abs().amax(dim=1).div_(127.0)
        self._scales[index, part.start // BLOCK : part.stop // BLOCK].copy_(scales)
        blocks = blocks.div(scales.clamp_(min=torch.finfo(torch.float32).tiny)[:, None]).round_().clamp_(-127, 127)
        self._deltas[index, part].copy_(blocks.view(-1))


def decode_int8(deltas: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """Whole blocks of int8 deltas times their scales, as float32 deltas to the anchor, in ``out``."""
    out.copy_(deltas).view(-1, BLOCK).mul_(scales[:, None])
    return out


Rows = DenseRows | Int8Rows


def make_rows(count: int, numel: int, dtype: str, allocate: Allocate) -> Rows:
    """Rows for a dtype's name."""
    return Int8Rows(count, numel, allocate) if dtype == "int8" else DenseRows(count, numel, DTYPES[dtype], allocate)
