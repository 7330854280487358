"""The arithmetic of the window's products, on some columns at a time: each row is read once, in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .storage import CHUNK, Rows
from .streaming import stretches

# Columns that a piece of a product covers: a few milliseconds' reading.
PIECE = 1 << 23
# A GPU wants larger chunks than a cache.
_DEVICE_CHUNK = 1 << 22

# Columns, and the region they belong to: those of a parameter group that as many processes hold.
Chunk = tuple[int, slice]
Span = tuple[int, int, int]


def pieces_of(spans: list[Span], device: torch.device) -> Iterator[list[Chunk]]:
    """The columns of ``(region, first, last)`` in chunks, as many at a time as a piece of a product covers."""
    chunk = CHUNK if device.type == "cpu" else _DEVICE_CHUNK
    piece: list[Chunk] = []
    columns = 0
    for group, first, last in spans:
        for start in range(first, last, chunk):
            part = slice(start, min(start + chunk, last))
            if columns + part.stop - part.start > PIECE:
                yield piece
                piece, columns = [], 0
            piece.append((group, part))
            columns += part.stop - part.start
    if piece:
        yield piece


@dataclass(frozen=True)
class Matrix:
    """The rows that merge weights belong to, oldest first.

    Args:
        rows: where each row is kept: its storage, and its index there.
        extra: how many of them, in front, are not in the storage of the last one; that storage may have a base.
    """

    rows: list[tuple[Rows, int]]
    extra: int

    @torch.no_grad()
    def combine(self, values: np.ndarray, piece: list[Chunk], out: Tensor) -> None:
        """Write ``values[group] @ rows`` to the columns of ``out``; ``values`` has shape ``(groups, rows)``."""
        # Rows of weight zero are not read: sparse merges are cheaper, and a bad row spoils no merge without it.
        used = [[int(index) for index in np.flatnonzero(weights)] for weights in values]
        order = [(*self.rows[index], part) for group, part in piece for index in used[group]]
        read = stretches(order, out.device)
        for group, part in piece:
            weights = values[group]
            total = out[part] if out.dtype is torch.float32 else torch.empty(out[part].shape, device=out.device)
            base = self.rows[-1][0].base(part)
            begun = base is not None
            if base is not None:
                total.copy_(base).mul_(float(weights[self.extra :].sum()))
            for index in used[group]:
                weight = float(weights[index])
                if begun:
                    total.add_(next(read), alpha=weight)
                else:
                    torch.mul(next(read), weight, out=total)
                    begun = True
            if not begun:
                total.zero_()
            if total.dtype is not out.dtype:
                out[part].copy_(total)

    @torch.no_grad()
    def project(self, piece: list[Chunk], vector: Tensor, products: Tensor) -> None:
        """Add the products of some columns with ``vector`` to ``products``, float64 of shape ``(groups, rows)``.

        The newest row's is its own, the others' are those of their deltas to it.
        """
        for group, part, index, values in self._differences(piece, vector.device):
            products[group, index] += torch.dot(values, vector[part].float())

    @torch.no_grad()
    def gram(self, piece: list[Chunk], products: Tensor) -> None:
        """Add the inner products of the deltas to the newest row, float64 of shape ``(groups, rows, rows)``."""
        last = len(self.rows) - 1
        longest = max((part.stop - part.start for _, part in piece), default=0)
        deltas = torch.zeros(len(self.rows), longest, device=products.device)
        for group, part, index, values in self._differences(piece, products.device):
            filled = deltas[:, : part.stop - part.start]
            if index < last:
                filled[index].copy_(values)
            if index == last - 1:
                products[group] += (filled @ filled.T).double()

    def _differences(self, piece: list[Chunk], device: torch.device) -> Iterator[tuple[int, slice, int, Tensor]]:
        """For each chunk the newest row, and then every other one, oldest first, as its deltas to the newest.

        Yields the group, the columns, the row's index and the values, which are valid until the next.
        """
        last = len(self.rows) - 1
        read = stretches([(*self.rows[index], part) for _, part in piece for index in [last, *range(last)]], device)
        buffers = torch.empty(2, max((part.stop - part.start for _, part in piece), default=0), device=device)
        for group, part in piece:
            reference, difference = buffers[:, : part.stop - part.start]
            base = self.rows[-1][0].base(part)
            base = None if base is None else base.to(device)
            newest = reference.copy_(next(read))
            yield group, part, last, newest if base is None else torch.add(newest, base, out=difference)
            for index in range(last):
                row = torch.sub(next(read), newest, out=difference)
                if base is not None and index < self.extra:
                    row.sub_(base)
                yield group, part, index, row
