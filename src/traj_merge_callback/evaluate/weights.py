"""A candidate's weights in the model: what it computes with, and the gradient that backward passes leave."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from ..distributed import all_gather_into, reduce_scatter_sum
from ..window.layout import BufferPlace, ParameterLayout, Slot, persistent_buffers
from ..window.names import clean_name, unwrap
from ..window.pieces import EXCHANGE, Pieces
from ..window.sharding import EqualShares
from .kept import Kept
from .parking import Parking
from .untouched.isolation import Watch, delayed_signals, isolated


class Weights(Protocol):
    """Room for one candidate's weights beside the live ones: this rank's row, and a way to compute with it.

    Args:
        model: the model that computes with the candidate's weights.
        row: float32, shape ``(layout.numel,)``: this rank's columns of the candidate, filled by the caller.
        kept: what every candidate takes from live.
    """

    model: nn.Module
    row: Tensor
    kept: Kept

    def gather(self) -> Pieces[None]:
        """Called when ``row`` has been filled: exchange what the forward pass needs of other ranks' columns."""

    def ready(self, gradients: bool) -> AbstractContextManager[None]:
        """A context in which the model computes with the candidate's weights, under ``isolated``."""

    def write(self) -> None:
        """Write the candidate's weights into the model's own."""

    def clear_gradient(self) -> None:
        """Set the accumulated gradient to zero."""

    def add_gradient(self) -> None:
        """Accumulate the gradients of a backward pass; called inside :meth:`ready`."""

    def gradient(self) -> Pieces[Tensor]:
        """This rank's columns of the accumulated gradient, shape ``(layout.numel,)``.

        Ranks that hold the same columns may each have a summand of the gradient; ``project(summands=True)`` adds them.
        """


class WholeWeights:
    """Whole weights on the device: one process, or DDP, whose ranks gather each candidate once before evaluating it.

    Args:
        model: the model being trained; wrappers (compile, DDP) are looked through.
        layout: the layout of this rank's columns.
        row: float32, on the model's device, shape ``(layout.numel,)``.
        kept: what every candidate takes from live.
        seed: see ``isolated``.
        parking: of the other large tensors made here.
    """

    def __init__(
        self, model: nn.Module, layout: ParameterLayout, row: Tensor, kept: Kept, seed: int, parking: Parking
    ) -> None:
        self.row = row
        self.kept = kept
        self._parking = parking
        self.model = model
        self._gradient: Tensor | None = None
        sharding = layout.sharding
        self._shares = sharding if isinstance(sharding, EqualShares) and len(sharding.ranks) > 1 else None
        self.layout = layout
        self.whole = row
        if self._shares is not None:
            self.layout = ParameterLayout(model, trainable_only=layout.trainable_only, skipped=layout.skipped)
            self._in_shares = self._shares.share * len(self._shares.ranks)
            self._mine = sum(slot.numel for slot in layout.slots if slot.is_parameter)
            self._parameters = sum(slot.numel for slot in self.layout.slots if slot.is_parameter)
            self.whole = self._new()
        # Frozen parameters that are not merged are computed with as they are in training.
        candidates = {id(tensor) for tensor in self.layout.tensors(unwrap(model))}
        all_candidates = all(id(parameter) in candidates for parameter in unwrap(model).parameters())
        watch: Watch = "first" if all_candidates else "always"
        self._isolated = functools.partial(isolated, unwrap(model), seed, watch=watch)

    def _new(self) -> Tensor:
        """A zero row of the whole model, long enough for the padded shares of all ranks.

        The columns of buffers, which every rank has, begin where the parameters end and overlap the padding.
        """
        size = self.layout.numel if self._shares is None else max(self.layout.numel, self._in_shares)
        return self._parking.hold(torch.zeros(size, device=self.row.device))

    def gather(self) -> Pieces[None]:
        """See :class:`Weights`."""
        if self._shares is None:
            return
        # Before the exchange: memory that lacks on one rank must not keep the others waiting in it.
        share = self.row.new_zeros(self._shares.share)
        share[: self._mine].copy_(self.row[: self._mine])
        yield EXCHANGE
        all_gather_into(self.whole[: self._in_shares], share, self._shares.group, self._shares.processes.timeout)
        self.whole[self._parameters : self.layout.numel].copy_(self.row[self._mine :])

    def installed(self) -> AbstractContextManager[None]:
        """A context in which the model has the candidate's weights."""
        return installed(self.layout, self.model, self.whole, self.kept)

    @contextmanager
    def ready(self, gradients: bool) -> Iterator[None]:
        """See :class:`Weights`."""
        with self.installed(), self._isolated(gradients=gradients):
            yield

    def write(self) -> None:
        """See :class:`Weights`."""
        write_into(self.layout, self.model, self.whole)

    def clear_gradient(self) -> None:
        """See :class:`Weights`."""
        self._gradient = self._new() if self._gradient is None else self._gradient.zero_()

    def add_gradient(self) -> None:
        """See :class:`Weights`; the columns of buffers and unused parameters stay zero."""
        assert self._gradient is not None
        add_gradients(self.layout.slots, self._gradient, self.layout.tensors(unwrap(self.model)))

    def gradient(self) -> Pieces[Tensor]:
        """See :class:`Weights`."""
        assert self._gradient is not None
        if self._shares is None:
            return self._gradient
        share, found = self.row.new_empty(self._shares.share), torch.zeros_like(self.row)
        yield EXCHANGE
        whole, shares = self._gradient[: self._in_shares], self._shares
        reduce_scatter_sum(share, whole, shares.group, shares.processes.timeout)
        found[: self._mine].copy_(share[: self._mine])
        return found


@contextmanager
def installed(layout: ParameterLayout, model: nn.Module, row: Tensor, kept: Kept | None = None) -> Iterator[None]:
    """Within the context, ``model`` computes with ``row`` (shape ``(layout.numel,)``) instead of its own weights.

    What is not merged is that of ``kept``; without it, live's.

    The live weights' storage is never written: each parameter's ``data`` is pointed to the row and back again, so
    restoring is bit-exact whatever happens inside, and optimizers, hooks and compiled graphs keep the same Parameter
    objects. Parameters that belong to an FSDP unit are left as they are (see ``fsdp.py``).

    Raises:
        ValueError: the model's merged parameters are not those of the layout any more.
    """
    model = unwrap(model)
    tensors = layout.tensors(model)
    buffers = persistent_buffers(model)
    views = layout.views(row)
    live: list[tuple[Tensor, Tensor]] = []
    replaced: list[tuple[BufferPlace, Tensor]] = []
    with delayed_signals(), (kept or Kept()).installed():
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
            yield
        finally:
            for tensor, data in live:
                tensor.data = data
            for place, buffer in replaced:
                place.module._buffers[place.name] = buffer


@torch.no_grad()
def write_into(layout: ParameterLayout, model: nn.Module, row: Tensor) -> None:
    """Write ``row``, shape ``(layout.numel,)``, into the model's own parameters and buffers."""
    views, tensors = layout.views(row), layout.tensors(unwrap(model))
    for slot, tensor in zip(layout.slots, layout.locals(tensors), strict=True):
        tensor.copy_(views[slot.name])


def add_gradients(slots: Sequence[Slot], row: Tensor, tensors: Sequence[Tensor]) -> None:
    """Add the ``grad`` of each tensor, if it has one, to its slot's columns of a flat row."""
    for slot, tensor in zip(slots, tensors, strict=True):
        if tensor.grad is not None:
            row[slot.offset : slot.offset + slot.numel].add_(tensor.grad.reshape(-1).to(row.device))
