"""The window: the last k checkpoints of a run that goes on, captured from the model that is trained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..distributed import Processes
from ..search.spans import Span
from . import products
from .capture import Capture
from .layout import ParameterLayout
from .matrix import Matrix
from .memory import check_room, refused_on_all
from .modes import evaluated
from .storage import DTYPES, Allocate, DenseRows, Ring, in_memory
from .stored import StoredRow


class CheckpointWindow(Matrix):
    """The last ``size`` checkpoints of a model, oldest first, in memory allocated once.

    Args:
        model: the model to keep; its merged tensors (see :class:`ParameterLayout`) define the N columns.
        size: k, the number of rows, at least 2.
        dtype: how a row is kept: "float32", "bfloat16", "int8" (deltas to a float32 anchor, with a scale for every 64),
            or "auto": bfloat16 if all merged tensors are bfloat16 (then nothing is lost), float32 otherwise.
        trainable_only: keep only parameters that require gradients.
        average_rate: for BEMA: a function from a step to beta_t. Two more rows, the *leading rows*, then stand in front
            of the window, always float32: the first checkpoint ever pushed (theta_0), and
            ``EMA_t = (1 - beta_t) EMA_{t-1} + beta_t theta_t`` over all pushes.
        mean_rows: a row is the mean of the model at its push and at every :meth:`sample` since the push before. Live,
            as it was at the last push, is one more row behind these.
        multiscale: to make room for a new row two neighbouring rows become one, their mean, so that few rows reach far
            back; else the oldest row leaves. Needs ``mean_rows``.
        groups: parameter groups that may have merge weights of their own (see :func:`parameter_groups`).
        allocate: where rows are kept; by default in CPU memory, pinned when the model is on a CUDA device.
        rows_on: the device whose memory rows are kept in instead.
        disk_free: bytes free on a disk that could have the rows, which a refusal for want of memory then names.
        buffered: copy live weights to a row in memory first, as happens anyway where rows are no exact copies, and from
            there to their row; for rows on disk, which an optimizer step should not wait for.
        asynchronous: :meth:`push` and :meth:`sample` return before the copy is made; the next optimizer step (see
            :class:`Capture`) and everything that reads rows wait for it.
        processes: the ranks that train the model together. Each holds the columns of its own shards (FSDP), or an equal
            share of all columns (DDP); N, rows and vectors are of these columns, and the results of :meth:`project` and
            :meth:`gram` are summed over ranks.

    Memory in bytes per merged number: a row takes 4 as float32, 2 as bfloat16, 1.0625 as int8 (and their anchor 4); the
    staging row for a merged model 4; the row where live weights arrive another 4 (2 for a bfloat16 model), unless rows
    are exact copies (float32, or bfloat16 of a bfloat16 model) and not buffered; the running mean 4; the leading rows 8
    together.

    Example::

        window = CheckpointWindow(model, size=8)
        window.push(model, step=100)
        window.push(model, step=200)
        average = window.combine([0.5, 0.5])  # shape (N,)

    Raises:
        ValueError: ``size`` below 2, an unknown ``dtype``, or a model that cannot be merged.
        NoRoom: there is not enough memory, with the numbers and what would fit; on all ranks, if it is so on one.
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
        multiscale: bool = False,
        groups: str | Mapping[str, list[str]] | None = None,
        allocate: Allocate | None = None,
        rows_on: torch.device | None = None,
        disk_free: float = 0.0,
        buffered: bool = False,
        asynchronous: bool = False,
        processes: Processes | None = None,
    ) -> None:
        if size < 2:
            raise ValueError(f"size={size}: a window needs at least 2 rows for there to be something to merge")
        processes = Processes(alone=True) if processes is None else processes
        super().__init__(ParameterLayout.divided(model, processes, trainable_only=trainable_only), groups, processes)
        all_bfloat16 = all(slot.dtype is torch.bfloat16 for slot in self.layout.slots)
        if dtype == "auto":
            dtype = "bfloat16" if all_bfloat16 else "float32"
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not one of {['auto', *DTYPES]}")
        devices = [tensor.device for tensor in self.layout.tensors(model)]
        self._device = next((device for device in devices if device.type == "cuda"), devices[0])

        def ring(count: int, kept_as: str, rows: Allocate, beside: Allocate) -> Ring:
            exact = (
                not mean_rows and not buffered and (kept_as == "float32" or (kept_as == "bfloat16" and all_bfloat16))
            )
            return Ring(
                count,
                self.layout.numel,
                kept_as,
                live=None if exact else torch.bfloat16 if all_bfloat16 else torch.float32,
                leading=average_rate is not None,
                mean=mean_rows,
                multiscale=multiscale,
                allocate=rows,
                allocate_beside=beside,
            )

        beside = in_memory(pinned=self._device.type == "cuda")
        rows = allocate or (beside if rows_on is None else in_memory(device=rows_on))
        room = None if allocate else rows_on or torch.device("cpu")
        check_room(ring, size, dtype, self.processes, rows_on=room, disk_free=disk_free)
        with refused_on_all(self.processes, size):
            self._ring = ring(size, dtype, rows, beside)
        self._average_rate = average_rate
        self._capture = Capture(asynchronous=asynchronous, device=self._device)
        # What the last capture was of, whether it has been waited for, and whether it was left out as not finite.
        self._last: Literal["row", "sample"] | None = None
        self._settled, self._left_out = True, False

    @property
    def size(self) -> int:
        """k, the number of rows there can be."""
        return self._ring.size

    @property
    def dtype(self) -> str:
        """How rows are kept."""
        return self._ring.dtype

    @property
    def spans(self) -> tuple[Span, ...]:
        """See :class:`Matrix`: of the rows held now, at most ``size``, and of live beside rows that are means."""
        spans = self._ring.spans
        return (*spans, Span(spans[-1].last, spans[-1].last, 1)) if self._ring.live_is_beside else tuple(spans)

    @property
    def num_weights(self) -> int:
        """See :class:`Matrix`: ``len(self)``, and two more in front for the leading rows."""
        return len(self._ring.in_order())

    @property
    def nbytes(self) -> int:
        """Bytes of everything that was allocated at construction."""
        return self._ring.nbytes

    @property
    def row_nbytes(self) -> int:
        """Bytes that one row takes, without the anchor that all int8 rows share."""
        return sum(tensor.nbytes for tensor in self._ring.rows.state(0).values())

    @property
    def waited_s(self) -> float:
        """Seconds that optimizer steps have waited for captures."""
        return self._capture.waited_s

    # Capturing

    @torch.no_grad()
    def sample(self, model: nn.Module, step: int) -> None:
        """Add the model's weights to the mean that the next :meth:`push` completes; reads and writes no row.

        Raises:
            ValueError: the rows of this window are not means, or the model's parameters changed names or shapes.
        """
        ring = self._ring
        if ring.mean is None:
            raise ValueError("this window's rows are single checkpoints: construct it with mean_rows=True")
        self.settle()
        share = 1.0 / (ring.sampled + 1)

        def accumulate(arrival: Tensor, finite: bool) -> None:
            if finite and arrival is not ring.mean:
                ring.accumulate(arrival, share)

        if self._device.type == "cpu":
            self._copy_live(model, "sample", accumulate, ring.mean, share)
        else:  # staging is for merges on the CPU
            self._copy_live(model, "sample", accumulate, ring.staging)
        ring.count_sample(step)

    @torch.no_grad()
    def push(self, model: nn.Module, step: int, spoiled: Collection[str] = ()) -> None:
        """Make the model's weights, or their mean with those sampled, the newest row; for room see ``multiscale``.

        Weights that are not finite become no row, though room was made; what was sampled before is forgotten then.

        Args:
            model: the model.
            step: of its weights.
            spoiled: names of rows that leave a full window before any other.

        Raises:
            ValueError: ``step`` is not after the newest row's, or the model's parameters changed names or shapes.
        """
        self.settle()
        ring = self._ring
        if ring.spans and step <= ring.spans[-1].last:
            raise ValueError(f"step={step} is not after the newest checkpoint's step {ring.spans[-1].last}")
        room, first, renew = ring.room(step, spoiled), not ring.spans, ring.pushed % ring.size == 0
        anew, ring.averages_anew = first or ring.averages_anew, False
        share, target = 1.0 / (ring.sampled + 1), ring.arrival
        if target is None:
            assert isinstance(ring.rows, DenseRows)
            target = ring.rows.row(room.place)

        def write_rows(arrival: Tensor, finite: bool) -> None:
            ring.clear_room(room)
            if not finite:
                return
            if ring.mean is not None:
                ring.accumulate(arrival, share)
            values = ring.arrival if ring.mean is None else ring.mean
            if values is not None:
                ring.rows.write(room.place, values, renew=renew)
            if ring.leading is not None and self._average_rate is not None:
                start, average = ring.leading.row(0), ring.leading.row(1)
                if first:
                    start.copy_(arrival)
                if anew:
                    average.copy_(arrival)
                else:
                    average.lerp_(arrival.float(), self._average_rate(step))

        self._copy_live(model, "row", write_rows, target)
        ring.count_sample(step)
        ring.add(Span(ring.sampled_from, step, ring.sampled), room)
        ring.sampled = 0

    def forget_samples(self) -> None:
        """Begin the mean row anew: the next sample, or push, is its first."""
        self.settle()
        self._ring.sampled, self._last = 0, None

    def _copy_live(
        self,
        model: nn.Module,
        kind: Literal["row", "sample"],
        then: Callable[[Tensor, bool], None],
        target: Tensor,
        share: float = 1.0,
    ) -> None:
        """Begin to copy live weights to ``target``, shape ``(N,)``, or to add them to it with a share.

        ``then`` is called with the target when it is complete, in the capture's thread if it is asynchronous, and with
        whether all parameters are finite. Of tensors that a forward pass may write a copy is made first, on their
        device. The capture before is settled.
        """

        def arrived(is_finite: bool) -> None:
            if is_finite:
                self._not_finite |= products.finite_buffers(self.layout, self._ring.rows, target)
            then(target, is_finite)

        tensors = self.layout.tensors(model)
        volatile = self.layout.volatile(model, tensors)
        with evaluated(self._capture.with_modes, tensors) as written:
            mine, views = self.layout.locals(tensors), self.layout.views(target)
            slots = zip(self.layout.slots, mine, strict=True)
            parameters = [(views[slot.name], tensor) for slot, tensor in slots if slot.is_parameter]
            self._capture.begin(self.layout.pairs(target, mine, volatile), arrived, share, parameters)
            self._last, self._settled, self._left_out = kind, False, False
            # Where parameters have hooks an optimizer may write in the backward pass (LOMO).
            hooks = (one._backward_hooks or getattr(one, "_post_accumulate_grad_hooks", None) for one in tensors)
            if written or any(hooks):
                self._capture.wait()

    def settle(self) -> None:
        """Wait until the last capture is complete.

        Raises:
            Exception: what went wrong in it; the row that it was to become is no longer in the window.
        """
        settled, self._settled = self._settled, True
        try:
            finite = self._capture.settle()
        except BaseException:
            if not settled and self._last == "row":
                self._ring.drop_newest()
            self._last = None
            raise
        if not (settled or finite):
            self._leave_out()

    def settle_together(self, *values: float) -> list[float]:
        """:meth:`settle` on all ranks; a capture that is not finite on one of them is left out on all. A collective.

        Returns:
            Whether the last capture was left out, as a number, and the largest of each value over all ranks.
        """
        error: BaseException | None = None
        try:
            self.settle()
        except BaseException as raised:
            error = raised
        found = self.processes.all_reduce_error(error, float(self._left_out), *values)
        if found[0]:
            self._leave_out()
        return found

    def _leave_out(self) -> None:
        """Take back the last capture. Where it was a sample that is finite here its numbers stay in the mean."""
        if self._last is not None and not self._left_out:
            (self._ring.drop_newest if self._last == "row" else self._ring.uncount_sample)()
        self._left_out = True

    def drop_since(self, step: int) -> None:
        """Remove the rows that end at this step or later, and what was sampled since the newest row."""
        self.settle()
        self._ring.drop_since(step)
        self._last = None

    def close(self) -> None:
        """Let the last capture finish and stop watching optimizers."""
        self._capture.close()

    def staging_on(self, device: torch.device) -> Tensor:
        """A float32 row, shape ``(N,)``, for a merged model on a device: on the CPU always the same, else a new one."""
        return self._ring.staging if device.type == "cpu" else torch.empty(self.layout.numel, device=device)

    # What the products read

    @property
    def _live(self) -> Tensor | None:
        return self._ring.arrival

    @property
    def _live_is_beside(self) -> bool:
        return self._ring.live_is_beside

    def _stored_rows(self) -> list[StoredRow]:
        """The rows that merge weights belong to, oldest first, once the last capture is complete."""
        self.settle()
        return self._ring.in_order()

    # Keeping and restoring

    def state_dict(self) -> dict[str, Any]:
        """The window's contents, as tensors that share its memory.

        Keys: "spans" of the rows, oldest first: first and last step and number of samples of each; "dtype"; "pushed",
        the number of pushes ever made; "sampled", the number of checkpoints in the running mean, and "sampled_from",
        the step of the first; "rows", the named tensors that each row is stored as; "shared", by name what there is
        beside the rows: the int8 "anchor", the leading rows "start" and "average", the running "mean", and "arrival",
        the live weights of the last push; "not_finite", the names of buffers that rows hold other numbers for.
        """
        self.settle()
        return {**self._ring.state_dict(), "not_finite": sorted(self._not_finite)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the rows of a :meth:`state_dict`, or the newest ones if it holds more than fit.

        Raises:
            ValueError: the rows have another length or dtype, or are means where this window's are not (or the other
                way round), or the leading rows are missing or left over.
        """
        self.settle()
        self._ring.load_state_dict(state)
        self._not_finite = set(state["not_finite"])

    @torch.no_grad()
    def load_rows(self, state: dict[str, Any], read: Callable[[str, Tensor], None]) -> None:
        """Restore rows saved by ranks with other columns, the newest ones if there are more than fit.

        Args:
            state: a :meth:`state_dict` without "rows"; of "shared" only the names are read.
            read: called with the name of a row ("row-00" is the oldest) or of a shared tensor, and a tensor whose first
                N numbers it fills, decoded.

        Raises:
            ValueError: see :meth:`load_state_dict`.
        """
        self.settle()
        self._ring.load_rows(state, read)
        self._not_finite = set(state["not_finite"])
