"""A candidate's weights in the model: what it computes with, and the gradient that backward passes leave."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from ..distributed import all_gather_into, collective_timeout, reduce_scatter_sum
from ..pieces import EXCHANGE, Pieces
from ..window.layout import BufferPlace, ParameterLayout, Slot, clean_name, persistent_buffers, unwrap
from ..window.sharding import EqualShares
from .isolation import delayed_interrupts, isolated


class Weights(Protocol):
    """Room for one candidate after another in a model whose own weights are never written.

    Attributes:
        model: computes with the candidate.
        row: this rank's columns of the candidate, filled by the caller.
    """

    model: nn.Module
    row: Tensor

    def gather(self) -> Pieces[None]:
        """Make the filled row the candidate that :meth:`ready` installs."""

    def ready(self, gradients: bool) -> AbstractContextManager[None]:
        """Context in which the model computes with the candidate; it leaves no trace (see ``isolated``)."""

    def clear_gradient(self) -> None:
        """Begin a new gradient."""

    def add_gradient(self) -> None:
        """Add the gradients of one backward pass, inside :meth:`ready`."""

    def gradient(self) -> Pieces[Tensor]:
        """This rank's columns of the gradient; ranks that hold the same columns return summands of it."""


class WholeWeights:
    """Weights that are all on the device: one process, or DDP, whose ranks gather each candidate once.

    Args:
        model: the model being trained; wrappers (compile, DDP) are looked through.
        layout: of this rank's columns.
        row: float32, on the model's device, for this rank's columns.
        seed: see ``isolated``.
    """

    def __init__(self, model: nn.Module, layout: ParameterLayout, row: Tensor, seed: int) -> None:
        self.row = row
        self.model = model
        self._isolated = functools.partial(isolated, unwrap(model), seed)
        self._gradient: Tensor | None = None
        sharding = layout.sharding
        self._shares = sharding if isinstance(sharding, EqualShares) and len(sharding.ranks) > 1 else None
        self.layout = layout
        self.whole = row
        if self._shares is not None:
            self.layout = ParameterLayout(model, trainable_only=layout.trainable_only)
            self._in_shares = self._shares.share * len(self._shares.ranks)
            self._mine = sum(slot.numel for slot in layout.slots if slot.is_parameter)
            self._parameters = sum(slot.numel for slot in self.layout.slots if slot.is_parameter)
            self.whole = self._new()

    def _new(self) -> Tensor:
        """A whole row, long enough for equal shares of its parameters, of which buffers overwrite the end."""
        size = self.layout.numel if self._shares is None else max(self.layout.numel, self._in_shares)
        return torch.zeros(size, device=self.row.device)

    def gather(self) -> Pieces[None]:
        """See :class:`Weights`."""
        if self._shares is None:
            return
        yield EXCHANGE
        part = self.row.new_zeros(self._shares.share)
        part[: self._mine].copy_(self.row[: self._mine])
        with collective_timeout(self._shares.processes.timeout):
            all_gather_into(self.whole[: self._in_shares], part, self._shares.group)
        self.whole[self._parameters : self.layout.numel].copy_(self.row[self._mine :])

    def installed(self) -> AbstractContextManager[None]:
        """Within the context the model has the weights of the candidate."""
        return installed(self.layout, self.model, self.whole)

    @contextmanager
    def ready(self, gradients: bool) -> Iterator[None]:
        """See :class:`Weights`."""
        with self.installed(), self._isolated(gradients=gradients):
            yield

    def clear_gradient(self) -> None:
        """See :class:`Weights`."""
        self._gradient = self._new() if self._gradient is None else self._gradient.zero_()

    def add_gradient(self) -> None:
        """See :class:`Weights`; buffers and unused parameters have none."""
        assert self._gradient is not None
        add_gradients(self.layout.slots, self._gradient, self.layout.tensors(unwrap(self.model)))

    def gradient(self) -> Pieces[Tensor]:
        """See :class:`Weights`."""
        assert self._gradient is not None
        if self._shares is None:
            return self._gradient
        yield EXCHANGE
        share, found = self.row.new_empty(self._shares.share), torch.zeros_like(self.row)
        with collective_timeout(self._shares.processes.timeout):
            reduce_scatter_sum(share, self._gradient[: self._in_shares], self._shares.group)
        found[: self._mine].copy_(share[: self._mine])
        return found


@contextmanager
def installed(layout: ParameterLayout, model: nn.Module, row: Tensor) -> Iterator[None]:
    """Within the context, ``model`` computes with ``row`` (shape ``(numel,)``) instead of its own weights.

    The live weights' storage is never written: each parameter points elsewhere and is pointed back, so restoring
    is bit-exact whatever happens inside, and optimizers, hooks and compiled graphs keep the same Parameter objects.
    Parameters of FSDP units keep their own weights (see ``fsdp``).

    Args:
        layout: of the row.
        model: the model being trained; wrappers (compile, DDP) are looked through.
        row: shape ``(numel,)``, on any device.
    """
    model = unwrap(model)
    tensors = layout.tensors(model)
    buffers = persistent_buffers(model)
    views = layout.views(row)
    live: list[tuple[Tensor, Tensor]] = []
    replaced: list[tuple[BufferPlace, Tensor]] = []
    with delayed_interrupts():
        try:
            for slot, tensor in zip(layout.slots, tensors, strict=True):
                if slot.is_parameter and slot.shard.unit is None:
                    merged = views[slot.name].to(device=tensor.device, dtype=tensor.dtype)
                    live.append((tensor, tensor.data))
                    tensor.data = merged
            for name, places in buffers.items():
                if (view := views.get(clean_name(name))) is None:
                    continue
                for place in places:
                    buffer = place.tensor
                    replaced.append((place, buffer))
                    merged = view.to(device=buffer.device, dtype=buffer.dtype, copy=True)
                    place.module._buffers[place.name] = merged
            # Autocast keeps low-precision copies of weights by tensor identity, and these just changed content.
            torch.clear_autocast_cache()
            yield
        finally:
            for tensor, data in live:
                tensor.data = data
            for place, buffer in replaced:
                place.module._buffers[place.name] = buffer
            torch.clear_autocast_cache()


def add_gradients(slots: Sequence[Slot], row: Tensor, tensors: list[Tensor]) -> None:
    """Add the gradients of tensors to the columns of a row; a tensor without one adds nothing."""
    for slot, tensor in zip(slots, tensors, strict=True):
        if tensor.grad is not None:
            row[slot.offset : slot.offset + slot.numel].add_(tensor.grad.reshape(-1))
