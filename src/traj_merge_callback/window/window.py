"""The window: the last k checkpoints of one run as a matrix of shape ``(k, N)``, and its two products.

``combine(weights)`` is ``theta(a) = a @ W``, the merged model. ``project(vector)`` is ``W @ v``: with ``v`` the
gradient of a loss in the parameters it is the gradient of that loss in the merge weights. Each reads the window once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..distributed import Processes
from ..pieces import COMBINE, PROJECT, Pieces, finish
from .capture import Capture
from .columns import Columns
from .groups import ParameterGroups, parameter_groups
from .layout import ParameterLayout
from .products import Matrix
from .ring import Ring
from .storage import CHUNK, DTYPES, Allocate, DenseRows, in_memory


class CheckpointWindow:
    """The last ``size`` checkpoints of a model, oldest first, in memory allocated once.

    Args:
        model: the model to keep; its merged tensors (see :class:`ParameterLayout`) define the N columns.
        size: k, the number of rows, at least 2.
        dtype: how a row is kept: "float32", "bfloat16", "int8" (deltas to a float32 anchor, with a scale for every 64),
            or "auto": bfloat16 if all merged tensors are bfloat16 (then nothing is lost), float32 otherwise.
        trainable_only: keep only parameters that require gradients.
        average_rate: for BEMA: a function from a step to beta_t. Two more rows, always float32, stand in front of the
            window, the first checkpoint ever pushed (theta_0) and ``EMA_t = (1 - beta_t) EMA_{t-1} + beta_t theta_t``
            over all pushes.
        mean_rows: a row is the mean of the model at its push and at every :meth:`sample` since the push before.
        groups: parameter groups that may have merge weights of their own (see :func:`parameter_groups`).
        allocate: where rows are kept; by default in CPU memory, pinned when the model is on a CUDA device.
        buffered: captures arrive in memory of their own before they become rows, as they do anyway where rows are no
            exact copies; for rows that are kept where writing can take long.
        asynchronous: :meth:`push` and :meth:`sample` return before the copy is made; no optimizer step writes the
            weights before (see :class:`Capture`), and everything that reads rows waits for it.
        processes: those that train the model together. Each then holds the columns of its own shards (FSDP), or an
            equal share of all (DDP); vectors and rows are these columns, and products with vectors are exchanged.

    Memory in bytes per merged number: a row takes 4 as float32, 2 as bfloat16, 1.0625 as int8 (and their anchor 4); the
    staging row for the merge at hand 4; the row where live weights arrive another 4 (2 for a bfloat16 model), unless
    rows are exact copies (float32, or bfloat16 of a bfloat16 model) and not buffered; the mean begun 4, BEMA's rows 8.

    Example::

        window = CheckpointWindow(model, size=8)
        window.push(model, step=100)
        window.push(model, step=200)
        average = window.combine([0.5, 0.5])  # shape (N,)

    Raises:
        ValueError: ``size`` below 2, an unknown ``dtype``, or a model that cannot be merged.
    """

    def __init__(
        self,
        model: nn.Module,
        size: int,
        *,
        dtype: str = "auto",
        trainable_only: bool = True,
        average_rate: Callable[[int], float] | None = None,
        mean_rows: bool = False,
        groups: str | Mapping[str, list[str]] | None = None,
        allocate: Allocate | None = None,
        buffered: bool = False,
        asynchronous: bool = False,
        processes: Processes | None = None,
    ) -> None:
        if size < 2:
            raise ValueError(f"size={size}: a window needs at least 2 rows for there to be something to merge")
        self.processes = Processes(alone=True) if processes is None else processes
        self.layout = ParameterLayout.divided(model, self.processes, trainable_only=trainable_only)
        all_bfloat16 = all(slot.dtype is torch.bfloat16 for slot in self.layout.slots)
        if dtype == "auto":
            dtype = "bfloat16" if all_bfloat16 else "float32"
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not one of {['auto', *DTYPES]}")
        self.groups: ParameterGroups | None = None if groups is None else parameter_groups(self.layout, groups)
        pinned = in_memory(pinned=any(tensor.is_cuda for tensor in self.layout.tensors(model)))
        exact = not mean_rows and (dtype == "float32" or (dtype == "bfloat16" and all_bfloat16)) and not buffered
        self._ring = Ring(
            size,
            self.layout.numel,
            dtype,
            live=None if exact else torch.bfloat16 if all_bfloat16 else torch.float32,
            running_sums=average_rate is not None,
            mean=mean_rows,
            allocate=allocate or pinned,
            beside=pinned,
        )
        self._columns = Columns(self.layout, self.groups, self.processes)
        self._average_rate = average_rate
        self._capture = Capture(asynchronous=asynchronous)
        self._readers = 0
        self._lock = threading.Lock()
        self._pushing = False

    @property
    def size(self) -> int:
        """k, the number of rows there can be."""
        return self._ring.size

    @property
    def dtype(self) -> str:
        """How rows are kept."""
        return self._ring.dtype

    def __len__(self) -> int:
        """The number of checkpoints held now, at most ``size``."""
        return len(self._ring.steps)

    @property
    def steps(self) -> tuple[int, ...]:
        """The optimizer steps of the checkpoints held, oldest first."""
        return tuple(self._ring.steps)

    @property
    def num_weights(self) -> int:
        """How many merge weights ``combine`` takes: ``len(self)``, and two more in front for BEMA's running sums."""
        return (2 if self._ring.sums is not None and self._ring.steps else 0) + len(self)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that was allocated at construction."""
        return self._ring.nbytes

    @property
    def row_nbytes(self) -> int:
        """Bytes that one row takes, without what the rows share."""
        return sum(tensor.nbytes for tensor in self._ring.rows.state(0).values())

    @property
    def num_pieces(self) -> int:
        """How many pieces a product has."""
        return self._columns.num_pieces

    @property
    def newest_is_live(self) -> bool:
        """Whether the newest row is a checkpoint as it was pushed, and not a mean."""
        return self._ring.mean is None

    @property
    def waited_s(self) -> float:
        """Seconds that optimizer steps have waited for captures."""
        return self._capture.waited_s

    # Capturing

    @torch.no_grad()
    def sample(self, model: nn.Module) -> None:
        """Let the model's weights take part in the mean that the next :meth:`push` makes a row.

        Raises:
            ValueError: the rows of this window are no means, or the model's parameters changed names or shapes.
        """
        if self._ring.mean is None:
            raise ValueError("this window's rows are single checkpoints: construct it with mean_rows=True")
        self._take(model, self._accumulate)

    @torch.no_grad()
    def push(self, model: nn.Module, step: int) -> None:
        """Copy the model's weights, or their mean with those sampled, as the newest row; the oldest row leaves a full
        window.

        Raises:
            ValueError: ``step`` is not after the newest row's, or the model's parameters changed names or shapes.
        """
        ring = self._ring
        if ring.steps and step <= ring.steps[-1]:
            raise ValueError(f"step={step} is not after the newest checkpoint's step {ring.steps[-1]}")
        index, first = ring.next, not ring.steps

        def settle() -> None:
            if ring.mean is not None:
                self._accumulate()
                ring.sampled = 0
            values = ring.arrival if ring.mean is None else ring.mean
            if values is not None:
                ring.rows.write(index, values, renew=index == 0)
            if ring.sums is not None and self._average_rate is not None:
                start, average = ring.sums.row(0), ring.sums.row(1)
                row = ring.arrival if ring.arrival is not None else ring.rows.state(index)["row"]
                if first:
                    start.copy_(row)
                    average.copy_(row)
                else:
                    average.lerp_(row.float(), self._average_rate(step))

        self._take(model, settle, index)
        self._pushing = True
        ring.add(step)

    def _take(self, model: nn.Module, settle: Callable[[], None], index: int | None = None) -> None:
        """Copy live weights to where they arrive: the row itself if it is an exact copy."""
        self.settle()
        target = self._ring.arrival
        if target is None:
            assert isinstance(self._ring.rows, DenseRows)
            assert index is not None
            target = self._ring.rows.row(index)
        tensors = self.layout.tensors(model)
        pairs = list(zip(self.layout.views(target).values(), self.layout.locals(tensors), strict=True))
        volatile = self.layout.volatile(model, tensors)
        for (view, tensor), at_once in zip(pairs, volatile, strict=True):
            if at_once:
                view.copy_(tensor)
        self._capture.begin([pair for pair, at_once in zip(pairs, volatile, strict=True) if not at_once], settle)

    def _accumulate(self) -> None:
        mean, arrival = self._ring.mean, self._ring.arrival
        assert mean is not None
        assert arrival is not None
        self._ring.sampled += 1
        if self._ring.sampled == 1:
            # Not as a mean with what was there: a checkpoint that is not finite spoils its own row and no other.
            mean.copy_(arrival)
            return
        for start in range(0, self.layout.numel, CHUNK):
            part = slice(start, start + CHUNK)
            mean[part].lerp_(arrival[part].float(), 1.0 / self._ring.sampled)

    def settle(self) -> None:
        """Wait until the last capture is complete.

        Raises:
            Exception: what went wrong in it; the row it should have become is not in the window then.
        """
        pushing, self._pushing = self._pushing, False
        try:
            self._capture.settle()
        except BaseException:
            if pushing:
                self._ring.drop_newest()
            raise

    def close(self) -> None:
        """Let the last capture finish and stop watching optimizers."""
        self._capture.close()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within the context nothing may be captured: the rows are being read, piece by piece or in another thread."""
        with self._lock:
            self._readers += 1
        try:
            yield
        finally:
            with self._lock:
                self._readers -= 1

    @property
    def is_in_use(self) -> bool:
        """Whether someone is inside :meth:`in_use`."""
        return self._readers > 0

    def staging_on(self, device: torch.device) -> Tensor:
        """A float32 row on a device for the merge at hand: the window's own on the CPU, elsewhere a new one."""
        return self._ring.staging if device.type == "cpu" else torch.empty(self.layout.numel, device=device)

    # Products

    def combine(self, weights: Sequence[float] | np.ndarray | None, out: Tensor | None = None) -> Tensor:
        """``theta(a) = sum_i a_i row_i`` in float32, shape ``(N,)``; a weight of 1 gives its row exactly.

        Args:
            weights: merge weights, oldest row first, shape ``(num_weights,)`` for the whole model or
                ``(groups, num_weights)`` with a vector for each parameter group; normally they sum to 1. None for the
                live weights of the last capture, exactly, however rows are kept.
            out: tensor of shape ``(N,)`` to write to, on any device; by default a new one.

        Raises:
            ValueError: the number of weights is not the number of rows, or one is not finite.
        """
        return finish(self.combine_pieces(weights, out))

    def combine_pieces(self, weights: Sequence[float] | np.ndarray | None, out: Tensor | None = None) -> Pieces[Tensor]:
        """:meth:`combine` in pieces."""
        out = torch.empty(self.layout.numel) if out is None else out
        rows = self.num_weights
        values = np.eye(rows)[-1] if weights is None else np.asarray(weights, dtype=np.float64)
        grouped = values.ndim == 2 and self.groups is not None
        if values.shape != ((self._columns.groups(True), rows) if grouped else (rows,)):
            raise ValueError(f"weights has shape {values.shape}; the window has {rows} rows")
        if not np.isfinite(values).all():
            raise ValueError(f"weights={values.tolist()} are not all finite")
        values = np.atleast_2d(values)[[group for group, _ in self._columns.regions(grouped)]]
        for piece in self._columns.pieces(grouped, out.device):
            yield COMBINE
            matrix = self._matrix()
            live = self._ring.arrival
            if weights is not None or live is None:
                matrix.combine(values, piece, out)
                continue
            for _, part in piece:
                out[part].copy_(live[part])
        return out

    def project(self, vector: Tensor, *, grouped: bool = False) -> np.ndarray:
        """``W @ vector`` in float64, shape ``(num_weights,)``.

        Neighbouring rows are nearly equal, and the differences between the products are what matters. So the products
        are taken with deltas to the newest row and added to that row's product in float64: nothing cancels.

        Args:
            vector: shape ``(N,)``, for instance the flattened gradient of a loss; with several processes each passes
                its columns of it.
            grouped: sum over the columns of each parameter group separately: shape ``(groups, num_weights)``.

        Raises:
            ValueError: ``vector`` has another shape.
        """
        return finish(self.project_pieces(vector, grouped=grouped))

    def project_pieces(self, vector: Tensor, *, grouped: bool = False, summands: bool = False) -> Pieces[np.ndarray]:
        """:meth:`project` in pieces, on the device of ``vector``.

        Args:
            vector, grouped: see :meth:`project`.
            summands: where several processes hold the same columns, the vector meant is the sum of theirs (as of the
                gradients of each one's batches), and not what each of them has.
        """
        if tuple(vector.shape) != (self.layout.numel,):
            raise ValueError(f"vector has shape {tuple(vector.shape)}; rows have shape ({self.layout.numel},)")
        regions = self._columns.regions(grouped)
        products = torch.zeros(len(regions), self.num_weights, dtype=torch.float64, device=vector.device)
        for piece in self._columns.pieces(grouped, vector.device):
            yield PROJECT
            self._matrix().project(piece, vector, products)
        products[:, :-1] += products[:, -1:]
        return (yield from self._columns.sum(products, grouped=grouped, summands=summands))

    def gram(self, *, grouped: bool = False) -> np.ndarray:
        """Inner products of the rows' deltas to the newest row, shape ``(num_weights, num_weights)``, in float64.

        ``d' G d`` with merge weights' differences ``d`` that sum to 0 is the squared distance between two merges.

        Args:
            grouped: over the columns of each parameter group separately: shape ``(groups, num_weights, num_weights)``.
        """
        return finish(self.gram_pieces(grouped=grouped))

    def gram_pieces(self, *, grouped: bool = False) -> Pieces[np.ndarray]:
        """:meth:`gram` in pieces."""
        rows = self.num_weights
        products = torch.zeros(len(self._columns.regions(grouped)), rows, rows, dtype=torch.float64)
        for piece in self._columns.pieces(grouped, products.device):
            yield PROJECT
            self._matrix().gram(piece, products)
        return (yield from self._columns.sum(products, grouped=grouped, summands=False))

    def _matrix(self) -> Matrix:
        """The rows as they are, when the last capture is complete."""
        self.settle()
        return self._ring.matrix()

    # Keeping and restoring

    def state_dict(self) -> dict[str, Any]:
        """The steps, the rows as stored and what belongs to them, as tensors that share the window's memory."""
        self.settle()
        return self._ring.state_dict()

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the rows of a ``state_dict``, the newest ones if it holds more than fit.

        Raises:
            ValueError: the rows have another length or dtype, or are means where this window's are not (or the other
                way round), or the running sums of BEMA are missing or left over.
        """
        self.settle()
        self._ring.load_state_dict(state)

    @torch.no_grad()
    def load_rows(self, state: dict[str, Any], read: Callable[[str, Tensor], None]) -> None:
        """Take over a saved window whose columns were divided in another way; see :meth:`Ring.load_rows`."""
        self.settle()
        self._ring.load_rows(state, read)
