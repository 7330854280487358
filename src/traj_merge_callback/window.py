"""The window: the last k checkpoints of one run as a matrix of shape ``(k, N)``, and its two products.

``combine(weights)`` is ``theta(a) = a @ W``, the merged model. ``project(vector)`` is ``W @ v``: with ``v`` the
gradient of a loss in the parameters it is the gradient of that loss in the merge weights. Each reads the window once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .groups import ParameterGroups, parameter_groups
from .parameters import ParameterLayout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# 1 MiB of float32: the accumulator of a chunk stays in a core's cache while the rows stream past it.
_CHUNK = 1 << 18


class CheckpointWindow:
    """The last ``size`` checkpoints of a model, oldest first, in memory allocated once.

    Args:
        model: the model to keep; its merged tensors (see :class:`ParameterLayout`) define the N columns.
        size: k, the number of rows, at least 2.
        dtype: how a row is kept: "float32", "bfloat16", or "auto": bfloat16 if all merged tensors are bfloat16 (then
            nothing is lost), float32 otherwise.
        trainable_only: keep only parameters that require gradients.
        average_rate: for BEMA: a function from a step to beta_t. Two more rows stand in front of the window, the first
            checkpoint ever pushed (theta_0) and ``EMA_t = (1 - beta_t) EMA_{t-1} + beta_t theta_t`` over all pushes.
        mean_rows: a row is the mean of the model at its push and at every :meth:`sample` since the push before.
        groups: parameter groups that may have merge weights of their own (see :func:`parameter_groups`).

    The matrix lies on the CPU, pinned when the model is on a CUDA device, and takes ``size * N * itemsize`` bytes
    (plus two rows for BEMA, and a float32 row to accumulate means).

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
    ) -> None:
        if size < 2:
            raise ValueError(f"size={size}: a window needs at least 2 rows for there to be something to merge")
        self.layout = ParameterLayout(model, trainable_only=trainable_only)
        if dtype == "auto":
            lossless = all(slot.dtype is torch.bfloat16 for slot in self.layout.slots)
            dtype = "bfloat16" if lossless else "float32"
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not one of {['auto', *DTYPES]}")
        self.dtype = dtype
        self.size = size
        self._average_rate = average_rate
        self._extra = 2 if average_rate else 0
        on_cuda = any(tensor.is_cuda for tensor in self.layout.tensors(model))
        shape = (self._extra + size, self.layout.numel)
        self._matrix = torch.empty(shape, dtype=DTYPES[dtype], pin_memory=on_cuda)
        self._staging = torch.empty(self.layout.numel, dtype=torch.float32, pin_memory=on_cuda)
        self._mean = torch.zeros(self.layout.numel, pin_memory=on_cuda) if mean_rows else None
        self._sampled = 0
        self.groups: ParameterGroups | None = None if groups is None else parameter_groups(self.layout, groups)
        self._steps: list[int] = []
        self._pushed = 0

    def __len__(self) -> int:
        """The number of checkpoints held now, at most ``size``."""
        return len(self._steps)

    @property
    def steps(self) -> tuple[int, ...]:
        """The optimizer steps of the checkpoints held, oldest first."""
        return tuple(self._steps)

    @property
    def num_weights(self) -> int:
        """How many merge weights ``combine`` takes: ``len(self)``, and two more in front for BEMA's running sums."""
        return (self._extra if self._steps else 0) + len(self)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix, the staging row and the accumulator of means, all allocated at construction."""
        tensors = [self._matrix, self._staging, *([] if self._mean is None else [self._mean])]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def newest_is_live(self) -> bool:
        """Whether the newest row is a checkpoint as it was pushed, and not a mean."""
        return self._mean is None

    @torch.no_grad()
    def sample(self, model: nn.Module) -> None:
        """Let the model's weights take part in the mean that the next :meth:`push` makes a row.

        Raises:
            ValueError: the rows of this window are no means, or the model's parameters changed names or shapes.
        """
        if self._mean is None:
            raise ValueError("this window's rows are single checkpoints: construct it with mean_rows=True")
        self._copy(model, self._staging)
        self._sampled += 1
        self._mean.lerp_(self._staging, 1.0 / self._sampled)

    @torch.no_grad()
    def push(self, model: nn.Module, step: int) -> None:
        """Copy the model's weights, or their mean with those sampled, as the newest row; the oldest row leaves a full
        window.

        Raises:
            ValueError: ``step`` is not after the newest row's, or the model's parameters changed names or shapes.
        """
        if self._steps and step <= self._steps[-1]:
            raise ValueError(f"step={step} is not after the newest checkpoint's step {self._steps[-1]}")
        row = self._matrix[self._extra + self._pushed % self.size]
        if self._mean is None:
            self._copy(model, row)
        else:
            self.sample(model)
            row.copy_(self._mean)
            self._sampled = 0
        if self._average_rate is not None:
            start, average = self._matrix[0], self._matrix[1]
            if not self._steps:
                start.copy_(row)
                average.copy_(row)
            else:
                average.lerp_(row, self._average_rate(step))
        self._pushed += 1
        self._steps = [*self._steps, step][-self.size :]

    def _copy(self, model: nn.Module, row: Tensor) -> None:
        tensors = self.layout.tensors(model)
        for target, tensor in zip(self.layout.views(row).values(), tensors, strict=True):
            target.copy_(tensor, non_blocking=tensor.is_cuda)
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()

    def _rows(self) -> list[Tensor]:
        held = range(self._pushed - len(self), self._pushed)
        extra = [self._matrix[index] for index in range(self._extra)] if self._steps else []
        return extra + [self._matrix[self._extra + index % self.size] for index in held]

    @torch.no_grad()
    def combine(self, weights: Sequence[float] | np.ndarray, out: Tensor | None = None) -> Tensor:
        """``theta(a) = sum_i a_i row_i`` in float32, shape ``(N,)``; a weight of 1 gives its row exactly.

        Args:
            weights: merge weights, oldest row first, shape ``(num_weights,)`` for the whole model or
                ``(groups, num_weights)`` with a vector for each parameter group; normally they sum to 1.
            out: float32 tensor of shape ``(N,)`` to write to; by default the window's own staging row, which the next
                ``combine`` overwrites.

        Raises:
            ValueError: the number of weights is not the number of rows, or one is not finite.
        """
        values = np.asarray(weights, dtype=np.float64)
        rows = self._rows()
        grouped = values.ndim == 2 and self.groups is not None
        if values.shape != ((len(self.groups), len(rows)) if grouped and self.groups else (len(rows),)):
            raise ValueError(f"weights has shape {values.shape}; the window has {len(rows)} rows")
        if not np.isfinite(values).all():
            raise ValueError(f"weights={values.tolist()} are not all finite")
        out = self._staging if out is None else out
        for group, part in self._chunks(grouped):
            accumulator = out[part].zero_()
            for row, value in zip(rows, np.atleast_2d(values)[group], strict=True):
                # Rows of weight zero are not read: sparse merges are cheaper, and a bad row spoils no merge without it.
                if value != 0.0:
                    accumulator.add_(row[part], alpha=float(value))
        return out

    @torch.no_grad()
    def project(self, vector: Tensor, *, grouped: bool = False) -> np.ndarray:
        """``W @ vector`` in float64, shape ``(num_weights,)``.

        Neighbouring rows are nearly equal, and the differences between the products are what matters. So the products
        are taken with deltas to the newest row and added to that row's product in float64: nothing cancels.

        Args:
            vector: shape ``(N,)``, for instance the flattened gradient of a loss.
            grouped: sum over the columns of each parameter group separately: shape ``(groups, num_weights)``.

        Raises:
            ValueError: ``vector`` has another shape.
        """
        if tuple(vector.shape) != (self.layout.numel,):
            raise ValueError(f"vector has shape {tuple(vector.shape)}; rows have shape ({self.layout.numel},)")
        rows = self._rows()
        products = np.zeros((len(self.groups) if grouped and self.groups else 1, len(rows)))
        for group, part in self._chunks(grouped):
            factor = vector[part].to(device="cpu", dtype=torch.float32)
            newest = rows[-1][part].float()
            products[group, -1] += float(torch.dot(newest, factor))
            for index, row in enumerate(rows[:-1]):
                products[group, index] += float(torch.dot(row[part].float() - newest, factor))
        products[:, :-1] += products[:, -1:]
        return products if grouped else products[0]

    @torch.no_grad()
    def gram(self, *, grouped: bool = False) -> np.ndarray:
        """Inner products of the rows' deltas to the newest row, shape ``(num_weights, num_weights)``, in float64.

        ``d' G d`` with merge weights' differences ``d`` that sum to 0 is the squared distance between two merges.

        Args:
            grouped: over the columns of each parameter group separately: shape ``(groups, num_weights, num_weights)``.
        """
        rows = self._rows()
        count = len(self.groups) if grouped and self.groups else 1
        products = torch.zeros(count, len(rows), len(rows), dtype=torch.float64)
        for group, part in self._chunks(grouped):
            newest = rows[-1][part].float()
            deltas = torch.stack([row[part].float() - newest for row in rows])
            products[group] += (deltas @ deltas.T).double()
        return (products if grouped else products[0]).numpy()

    def _chunks(self, grouped: bool = False) -> Iterator[tuple[int, slice]]:
        """Pieces of the columns, small enough for the cache, with the parameter group each belongs to."""
        pieces = [(0, 0, self.layout.numel)]
        if grouped and self.groups is not None:
            slots = zip(self.groups.members, self.layout.slots, strict=True)
            pieces = [(group, slot.offset, slot.offset + slot.numel) for group, slot in slots]
        for group, first, last in pieces:
            for start in range(first, last, _CHUNK):
                yield group, slice(start, min(start + _CHUNK, last))

    def state_dict(self) -> dict[str, Any]:
        """The steps, and the rows (and the mean begun) as tensors that share memory with the window."""
        state: dict[str, Any] = {"steps": list(self._steps), "dtype": self.dtype, "rows": self._rows()}
        return state | ({} if self._mean is None else {"mean": self._mean, "sampled": self._sampled})

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the rows of a ``state_dict``, the newest ones if it holds more than fit.

        Raises:
            ValueError: the rows have another length, or are means where this window's are not (or the other way
                round), or the running sums of BEMA are missing or left over.
        """
        steps, rows = list(state["steps"]), list(state["rows"])
        if ("mean" in state) is self.newest_is_live:
            raise ValueError("the saved window's rows are means and this one's are not, or the other way round")
        extra = len(rows) - len(steps)
        if steps and extra != self._extra:
            raise ValueError(f"the saved window has {extra} running sums, this one {self._extra}: the search differs")
        wrong = [tuple(row.shape) for row in rows if tuple(row.shape) != (self.layout.numel,)]
        if wrong:
            raise ValueError(f"a saved row has shape {wrong[0]}; this model's rows have shape ({self.layout.numel},)")
        kept = min(len(steps), self.size)
        for index, row in enumerate(rows[:extra] + rows[len(rows) - kept :]):
            self._matrix[index].copy_(row)
        self._steps = steps[len(steps) - kept :]
        self._pushed = kept
        if self._mean is not None:
            self._mean.copy_(state["mean"])
            self._sampled = state["sampled"]
