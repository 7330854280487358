"""The rows of a window and what belongs to them: where each one is, and how all are kept and restored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .products import Matrix
from .storage import Allocate, DenseRows, Rows, make_rows


class Ring:
    """Memory for the last ``size`` rows, the newest of which takes the place of the oldest one.

    Args:
        size: k, the number of rows.
        columns: numbers of a row.
        dtype: how a row is kept: "float32", "bfloat16" or "int8".
        live: dtype of live weights, as they arrive where rows are no exact copies; None: rows are exact copies.
        running_sums: whether BEMA's two rows stand in front.
        mean: whether rows are means.
        allocate: where rows are kept.
        beside: where everything else is.
    """

    def __init__(
        self,
        size: int,
        columns: int,
        dtype: str,
        *,
        live: torch.dtype | None,
        running_sums: bool,
        mean: bool,
        allocate: Allocate,
        beside: Allocate,
    ) -> None:
        self.size = size
        self.dtype = dtype
        self.rows = make_rows(size, columns, dtype, allocate)
        self.sums = DenseRows(2, columns, torch.float32, beside) if running_sums else None
        self.mean = beside("mean", (columns,), torch.float32) if mean else None
        self.arrival = None if live is None else beside("arrival", (columns,), live)
        self.staging = beside("staging", (columns,), torch.float32)
        self.steps: list[int] = []
        self.pushed = 0
        # Checkpoints in the mean begun.
        self.sampled = 0

    @property
    def nbytes(self) -> int:
        """Bytes of everything."""
        kept = [self.rows.nbytes, 0 if self.sums is None else self.sums.nbytes]
        return sum(kept) + sum(row.nbytes for row in (self.mean, self.arrival, self.staging) if row is not None)

    @property
    def next(self) -> int:
        """Where the next row comes."""
        return self.pushed % self.size

    def add(self, step: int) -> None:
        """The next row is of this step, and in the window from now on."""
        self.pushed += 1
        self.steps = [*self.steps, step][-self.size :]

    def drop_newest(self) -> None:
        """The newest row is not in the window any more."""
        self.pushed -= 1
        self.steps = self.steps[:-1]

    def place(self, index: int) -> int:
        """Where the row is that stands at ``index``, oldest first."""
        return (self.pushed - len(self.steps) + index) % self.size

    def matrix(self) -> Matrix:
        """The rows as they are, with the running sums in front."""
        rows: list[tuple[Rows, int]] = [(self.rows, self.place(index)) for index in range(len(self.steps))]
        if self.sums is None:
            return Matrix(rows, 0)
        return Matrix([(self.sums, 0), (self.sums, 1), *rows], 2)

    # Keeping and restoring

    def state_dict(self) -> dict[str, Any]:
        """The steps, the rows as stored and what belongs to them, as tensors that share this memory."""
        return {
            "steps": list(self.steps),
            "dtype": self.dtype,
            "pushed": self.pushed,
            "sampled": self.sampled,
            "rows": [self.rows.state(self.place(index)) for index in range(len(self.steps))],
            "shared": self._shared(),
        }

    def _shared(self) -> dict[str, Tensor]:
        """Everything beside the rows that later rows and merges depend on."""
        tensors = dict(self.rows.shared_state())
        if self.sums is not None:
            tensors |= {"start": self.sums.row(0), "average": self.sums.row(1)}
        if self.mean is not None:
            tensors["mean"] = self.mean
        if self.arrival is not None:
            tensors["arrival"] = self.arrival
        return tensors

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`CheckpointWindow.load_state_dict`."""
        self._check_kind(state)
        mine, theirs = self._shared(), state["shared"]
        pairs = [(mine[name], theirs[name]) for name in mine]
        for index, place in self._places(state):
            row = self.rows.state(place)
            pairs += [(row[name], state["rows"][index][name]) for name in row]
        wrong = [(tuple(value.shape), tuple(target.shape)) for target, value in pairs if target.shape != value.shape]
        if wrong:
            raise ValueError(f"a saved row has shape {wrong[0][0]}; this model's rows have shape {wrong[0][1]}")
        for target, value in pairs:
            target.copy_(value)
        self._take_over(state)

    def load_rows(self, state: dict[str, Any], read: Callable[[str, Tensor], None]) -> None:
        """Take over a saved window whose columns were divided in another way, the newest rows if more than fit.

        Args:
            state: of a ``state_dict``, "shared" being names, and without "rows".
            read: fills a row with the one of a name.

        Raises:
            ValueError: see :meth:`load_state_dict`.
        """
        self._check_kind(state)
        for name, row in self._shared().items():
            read(name, row)
        for index, place in self._places(state):
            read(_row_name(index), self.staging)
            self.rows.write(place, self.staging)
        self._take_over(state)

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

    def _places(self, state: dict[str, Any]) -> list[tuple[int, int]]:
        """The saved rows that fit, newest last: which they are there, and where they come here."""
        saved = len(state["steps"])
        return [
            (index, (state["pushed"] - saved + index) % self.size) for index in range(max(0, saved - self.size), saved)
        ]

    def _take_over(self, state: dict[str, Any]) -> None:
        self.steps = list(state["steps"])[-self.size :]
        self.pushed, self.sampled = state["pushed"], state["sampled"]


def _row_name(index: int) -> str:
    """The name of the row that stands at ``index``, oldest first."""
    return f"row-{index:02d}"
