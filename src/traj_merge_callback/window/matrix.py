"""The matrix ``W``, shape ``(k, N)``, of k checkpoints of one model, and its two products, wherever its rows are kept.

``combine(weights)`` is ``theta(a) = a @ W``, the merged model. ``project(vector)`` is ``W @ v``: with ``v`` the
gradient of a loss in the parameters it is the gradient of that loss in the merge weights. Each reads the rows once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set

import numpy as np
import torch
from torch import Tensor

from ..distributed import Processes
from ..search.spans import Span
from . import products
from .in_use import InUse
from .layout import ParameterGroups, ParameterLayout, parameter_groups
from .pieces import COMBINE, PROJECT, Pieces, finish
from .stored import StoredRow


class Matrix(InUse, ABC):
    """Rows of one layout, oldest first, and their products.

    Args:
        layout: which tensors are merged, and this rank's columns of them.
        groups: parameter groups that may have merge weights of their own (see :func:`parameter_groups`).
        processes: the ranks that hold the columns together.
    """

    def __init__(
        self, layout: ParameterLayout, groups: str | Mapping[str, list[str]] | None, processes: Processes
    ) -> None:
        super().__init__()
        self.layout = layout
        self.processes = processes
        self.groups: ParameterGroups | None = None if groups is None else parameter_groups(layout, groups)
        self._columns = products.Columns(layout, self.groups, processes)
        # Buffers that once held a number that is not finite: rows hold other numbers in their place.
        self._not_finite: set[str] = set()

    # What a matrix has to have

    @property
    @abstractmethod
    def spans(self) -> tuple[Span, ...]:
        """Which steps the rows held are the means of, oldest first; single checkpoints are means of one."""

    @abstractmethod
    def _stored_rows(self) -> list[StoredRow]:
        """The rows that merge weights belong to, oldest first, when they may be read."""

    @abstractmethod
    def staging_on(self, device: torch.device) -> Tensor:
        """A float32 row, shape ``(N,)``, for a merged model on a device."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""

    @property
    @abstractmethod
    def dtype(self) -> str:
        """How rows are kept."""

    @abstractmethod
    def settle_together(self, *values: float) -> list[float]:
        """Wait until all rows are complete, on all ranks. A collective.

        Returns:
            Whether the newest checkpoint was left out, as a number, and the largest of each value over all ranks.
        """

    @property
    def _live(self) -> Tensor | None:
        """The live weights as they were captured last, where no row is an exact copy of them; shape ``(N,)``."""
        return None

    @property
    def _live_is_beside(self) -> bool:
        """Whether the newest row is live, beside rows that are kept in another way."""
        return False

    def __len__(self) -> int:
        """The number of rows that have a span."""
        return len(self.spans)

    @property
    def steps(self) -> tuple[int, ...]:
        """The optimizer steps of the checkpoints held, oldest first; of rows that are means their last ones."""
        return tuple(span.last for span in self.spans)

    @property
    def num_weights(self) -> int:
        """How many merge weights ``combine`` takes."""
        return len(self.spans)

    @property
    def num_pieces(self) -> int:
        """How many pieces a product on the CPU has."""
        return self._columns.num_pieces

    # Products

    def combine(self, weights: Sequence[float] | np.ndarray | None, out: Tensor | None = None) -> Tensor:
        """``theta(a) = sum_i a_i row_i`` in float32, shape ``(N,)``; a weight of 1 gives its row exactly.

        Args:
            weights: merge weights, oldest row first, shape ``(num_weights,)`` for the whole model or
                ``(groups, num_weights)`` with a vector for each parameter group; normally they sum to 1. None stands
                for the live weights of the last capture, which are exact however rows are kept.
            out: tensor of shape ``(N,)`` to write to, on any device; by default a new one.

        Raises:
            ValueError: the number of weights is not the number of rows, or one is not finite.
        """
        return finish(self.combine_pieces(weights, out))

    def combine_pieces(self, weights: Sequence[float] | np.ndarray | None, out: Tensor | None = None) -> Pieces[Tensor]:
        """:meth:`combine` as a generator that yields before each piece."""
        out = torch.empty(self.layout.numel) if out is None else out
        rows = self.num_weights
        values = np.eye(rows)[-1] if weights is None else np.asarray(weights, dtype=np.float64)
        grouped = values.ndim == 2 and self.groups is not None
        if values.shape != ((self._columns.num_groups(True), rows) if grouped else (rows,)):
            raise ValueError(f"weights has shape {values.shape}; the window has {rows} rows")
        if not np.isfinite(values).all():
            raise ValueError(f"weights={values.tolist()} are not all finite")
        by_region = np.atleast_2d(values)[[region.group for region in self._columns.regions(grouped)]]
        for piece in self._columns.pieces(grouped, out.device):
            yield COMBINE
            stored = self._stored_rows()
            live = self._live
            if weights is not None or live is None:
                products.combine(stored, by_region, piece, out)
                continue
            for _, columns in piece:
                out[columns].copy_(live[columns])
        return out

    def project(self, vector: Tensor, *, grouped: bool = False) -> np.ndarray:
        """``W @ vector`` in float64, shape ``(num_weights,)``.

        Rows of one run are nearly equal, and the small differences between their products are what a search uses.
        Therefore float32 products are computed of each row's delta to the newest row, and added to the newest row's
        product in float64: no digits cancel.

        Args:
            vector: shape ``(N,)``, for instance the flattened gradient of a loss; each rank passes its own columns.
            grouped: sum over the columns of each parameter group separately: shape ``(groups, num_weights)``.

        Raises:
            ValueError: ``vector`` has another shape.
        """
        return finish(self.project_pieces(vector, grouped=grouped))

    def project_pieces(self, vector: Tensor, *, grouped: bool = False, summands: bool = False) -> Pieces[np.ndarray]:
        """:meth:`project` as a generator that yields before each piece; computed on the device of ``vector``.

        Args:
            vector, grouped: see :meth:`project`.
            summands: where several ranks hold the same columns, each passes one summand of the vector there (such as
                the gradient on its own batches); otherwise all of them pass the same numbers.
        """
        if tuple(vector.shape) != (self.layout.numel,):
            raise ValueError(f"vector has shape {tuple(vector.shape)}; rows have shape ({self.layout.numel},)")
        regions = self._columns.regions(grouped)
        found = torch.zeros(len(regions), self.num_weights, dtype=torch.float64, device=vector.device)
        for piece in self._columns.pieces(grouped, vector.device):
            yield PROJECT
            products.project(self._stored_rows(), piece, vector, found)
        found[:, :-1] += found[:, -1:]
        return (yield from self._columns.sum(found, grouped=grouped, summands=summands))

    def gram(self, *, grouped: bool = False) -> np.ndarray:
        """Inner products of the rows' deltas to the newest row, shape ``(num_weights, num_weights)``, in float64.

        With ``d`` the difference of two vectors of merge weights, which sums to 0, ``d' G d`` is the squared distance
        between the two merged models' parameters. Buffers do not count: their numbers have scales of their own.

        Args:
            grouped: sum over the columns of each parameter group separately: shape
                ``(groups, num_weights, num_weights)``.
        """
        return finish(self.gram_pieces(grouped=grouped))

    def gram_pieces(self, *, grouped: bool = False) -> Pieces[np.ndarray]:
        """:meth:`gram` as a generator that yields before each piece."""
        rows = self.num_weights
        found = torch.zeros(len(self._columns.regions(grouped)), rows, rows, dtype=torch.float64)
        for piece in self._columns.pieces(grouped, found.device):
            yield PROJECT
            products.gram(self._stored_rows(), products.until(piece, self.layout.parameters_end), found)
        return (yield from self._columns.sum(found, grouped=grouped, summands=False))

    # What is not merged

    def unmerged_pieces(self) -> Pieces[frozenset[str]]:
        """The names of the buffers that a merge takes from live, in pieces; see :func:`.products.unmerged_pieces`."""
        rows = self._stored_rows()
        rows = rows[: len(rows) - self._live_is_beside]  # live is not rounded as the others may be
        return products.unmerged_pieces(self.layout, rows, self._not_finite)

    def not_finite_pieces(self, row: Tensor, unmerged: Set[str]) -> Pieces[str | None]:
        """The name of a tensor of a merge that is not finite, in pieces; see :func:`.products.not_finite_pieces`."""
        return products.not_finite_pieces(self.layout, self._columns, row, unmerged)
