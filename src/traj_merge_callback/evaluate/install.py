"""A row in a model: the weights that it computes with, and the gradients that a backward pass leaves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..window.layout import BufferPlace, ParameterLayout, Slot, clean_name, persistent_buffers, unwrap
from .isolation import delayed_interrupts


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
