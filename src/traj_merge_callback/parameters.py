"""Which tensors of a model are merged, and where each of them lies in a row.

A row is one flat vector of N numbers. :class:`ParameterLayout` maps it to the model: parameters in the order of
``named_parameters`` (tied ones once), then the floating-point buffers of the ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .interrupts import delayed_interrupts

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.parallel.DataParallel)


def unwrap(model: nn.Module) -> nn.Module:
    """The module the user wrote, under ``torch.compile``, DataParallel and DistributedDataParallel."""
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
            model = original
        else:
            return model


def clean_name(name: str) -> str:
    """A parameter's name without the segments that ``torch.compile`` of a submodule puts into it."""
    return name.replace("_orig_mod.", "")


@dataclass(frozen=True)
class Slot:
    """One merged tensor: its name in the ``state_dict``, and the place of its numbers in a row."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    numel: int
    is_parameter: bool


@dataclass(frozen=True)
class _BufferPlace:
    module: nn.Module
    name: str


class ParameterLayout:
    """The merged tensors of a model, as slices of a flat row of ``numel`` numbers.

    Args:
        model: the model being trained; wrappers (compile, DDP) are looked through.
        trainable_only: keep only parameters that require gradients, so that a LoRA run keeps kilobytes. False keeps
            every floating-point parameter.

    Raises:
        ValueError: nothing to merge, complex parameters, or parameters sharded over processes (FSDP, DTensor, ZeRO-3).
    """

    def __init__(self, model: nn.Module, *, trainable_only: bool = True) -> None:
        self.trainable_only = trainable_only
        model = unwrap(model)
        refuse_sharded(model)
        slots: list[Slot] = []
        offset = 0
        for name, tensor, is_parameter in self._walk(model):
            if tensor.is_complex():
                raise ValueError(f"parameter {name!r} is complex ({tensor.dtype}); only real parameters can be merged")
            slots.append(Slot(name, tuple(tensor.shape), tensor.dtype, offset, tensor.numel(), is_parameter))
            offset += tensor.numel()
        if not any(slot.is_parameter for slot in slots):
            kind = "parameter that requires gradients" if trainable_only else "floating-point parameter"
            raise ValueError(f"model {type(model).__name__} has no {kind}: there is nothing to merge")
        self.slots = tuple(slots)
        self.numel = offset

    def _walk(self, model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
        for name, parameter in model.named_parameters():
            wanted = parameter.requires_grad if self.trainable_only else parameter.is_floating_point()
            if wanted:
                yield clean_name(name), parameter, True
        for name, places in _persistent_buffers(model).items():
            buffer = places[0].module._buffers[places[0].name]
            assert buffer is not None
            if buffer.is_floating_point():
                yield clean_name(name), buffer, False

    def tensors(self, model: nn.Module) -> list[Tensor]:
        """The model's tensors in the order of ``slots``.

        Raises:
            ValueError: the model's merged parameters are not those of the layout any more (names or shapes changed).
        """
        found = list(self._walk(unwrap(model)))
        now = {name: tuple(tensor.shape) for name, tensor, _ in found}
        then = {slot.name: slot.shape for slot in self.slots}
        if now != then:
            raise ValueError(f"the model's parameters changed since the first checkpoint: {_difference(then, now)}")
        return [tensor for _, tensor, _ in found]

    def volatile(self, model: nn.Module, tensors: list[Tensor]) -> list[bool]:
        """Which of the tensors a forward pass may write: buffers, and embeddings renormalized as they are read."""
        modules = [module for module in unwrap(model).modules() if getattr(module, "max_norm", None) is not None]
        renormalized = {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}
        pairs = zip(self.slots, tensors, strict=True)
        return [not slot.is_parameter or id(tensor) in renormalized for slot, tensor in pairs]

    def views(self, row: Tensor) -> dict[str, Tensor]:
        """The named, shaped views of a flat row of shape ``(numel,)``, in the order of ``slots``."""
        return {slot.name: row[slot.offset : slot.offset + slot.numel].view(slot.shape) for slot in self.slots}

    @contextmanager
    def installed(self, model: nn.Module, row: Tensor) -> Iterator[None]:
        """Within the context, ``model`` computes with ``row`` (shape ``(numel,)``) instead of its own weights.

        The live weights' storage is never written: each parameter points elsewhere and is pointed back, so restoring
        is bit-exact whatever happens inside, and optimizers, hooks and compiled graphs keep the same Parameter objects.
        """
        model = unwrap(model)
        tensors = self.tensors(model)
        buffers = _persistent_buffers(model)
        views = self.views(row)
        live: list[tuple[Tensor, Tensor]] = []
        replaced: list[tuple[_BufferPlace, Tensor | None]] = []
        with delayed_interrupts():
            try:
                for slot, tensor in zip(self.slots, tensors, strict=True):
                    merged = views[slot.name].to(device=tensor.device, dtype=tensor.dtype)
                    if slot.is_parameter:
                        live.append((tensor, tensor.data))
                        tensor.data = merged
                for name, places in buffers.items():
                    if (view := views.get(clean_name(name))) is None:
                        continue
                    for place in places:
                        buffer = place.module._buffers[place.name]
                        assert buffer is not None
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


def _persistent_buffers(model: nn.Module) -> dict[str, list[_BufferPlace]]:
    """Buffers that belong to the state_dict: the first name of each, and every place that holds the same tensor."""
    names: dict[int, str] = {}
    places: dict[str, list[_BufferPlace]] = {}
    for prefix, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is None or key in module._non_persistent_buffers_set:
                continue
            name = names.setdefault(id(buffer), f"{prefix}.{key}" if prefix else key)
            places.setdefault(name, []).append(_BufferPlace(module, key))
    return places


def refuse_sharded(model: nn.Module) -> None:
    """Raise a ValueError if the model's parameters are spread over processes, which rows cannot hold yet."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh"):
            kind = "a DTensor (FSDP2 or tensor parallelism)"
        elif hasattr(parameter, "ds_id"):
            kind = "partitioned by DeepSpeed ZeRO-3"
        elif type(parameter).__name__ == "FlatParameter" or hasattr(parameter, "_is_flat_param"):
            kind = "flattened by FSDP"
        else:
            continue
        raise ValueError(
            f"parameter {name!r} is {kind}: sharded parameters are not supported yet; "
            "train with a single process or with DDP to use trajectory merging"
        )


def _difference(then: dict[str, tuple[int, ...]], now: dict[str, tuple[int, ...]]) -> str:
    parts = [f"{name} is new" for name in now.keys() - then.keys()]
    parts += [f"{name} is gone" for name in then.keys() - now.keys()]
    common = then.keys() & now.keys()
    parts += [f"{name} was {then[name]}, is {now[name]}" for name in common if then[name] != now[name]]
    parts = sorted(parts) or ["their order changed"]
    return "; ".join(parts[:5]) + (f"; and {len(parts) - 5} more" if len(parts) > 5 else "")
