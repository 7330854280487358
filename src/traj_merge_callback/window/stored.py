"""A row as products read it, wherever it is stored."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Storage(Protocol):
    """Rows of N numbers by index, of which products read some columns at a time."""

    def base(self, columns: slice) -> Tensor | None:
        """Some columns of the row that all rows are stored as deltas to, float32; None where they are no deltas."""

    def stored(self, index: int, columns: slice) -> tuple[Tensor, ...]:
        """The stored tensors that hold some columns of a row (no copy)."""

    def decode(self, stored: tuple[Tensor, ...], columns: slice, scratch: Tensor) -> Tensor:
        """Those columns as float32 deltas to :meth:`base`, or as the numbers themselves where that is None.

        Args:
            stored: by :meth:`stored`, or a copy of it on another device.
            columns: the same columns.
            scratch: float32, on the device of ``stored``, longer than the columns; the result may lie in it.
        """


class StoredRow(NamedTuple):
    """One row: the storage that keeps it, and its index there."""

    storage: Storage
    place: int
