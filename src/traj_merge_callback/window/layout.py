"""Which tensors of a model are merged, and where each of them lies in a row.

A row is one flat vector of N numbers. :class:`ParameterLayout` maps it to the model: parameters in the order of
``named_parameters`` (tied ones once; under FSDP those of a module that are gathered together side by side), then the
floating-point buffers of the ``state_dict``. With several processes each holds its own columns (see ``sharding``).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..distributed import Processes
from .sharding import EqualShares, Shard, Sharding, find_sharding

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.parallel.DataParallel)


def unwrap(model: nn.Module) -> nn.Module:
    """The module the user wrote, under ``torch.compile``, DataParallel, DistributedDataParallel and DeepSpeed."""
    while True:
        if isinstance(model, _WRAPPERS) or type(model).__name__ == "DeepSpeedEngine":
            model = model.module  # type: ignore[assignment]
        elif isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
            model = original
        else:
            return model


def clean_name(name: str) -> str:
    """A parameter's name without the segments that wrappers of submodules put into it."""
    for segment in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(segment, "")
    return name


@dataclass(frozen=True)
class Slot:
    """One merged tensor: its name in the ``state_dict``, and the place of its numbers in a row.

    Where only a part of the tensor is in this process's rows, ``numel`` counts that part's numbers.
    """

    name: str
    dtype: torch.dtype
    offset: int
    numel: int
    is_parameter: bool
    shard: Shard

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self.shard.shape

    @property
    def whole_numel(self) -> int:
        """How many numbers the whole tensor has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class BufferPlace:
    """A module and the name of its buffer."""

    module: nn.Module
    name: str

    @property
    def tensor(self) -> Tensor:
        """The buffer."""
        buffer = self.module._buffers[self.name]
        assert buffer is not None
        return buffer


class ParameterLayout:
    """The merged tensors of a model, as slices of a flat row of ``numel`` numbers.

    Args:
        model: the model being trained; wrappers (compile, DDP) are looked through.
        trainable_only: keep only parameters that require gradients, so that a LoRA run keeps kilobytes. False keeps
            every floating-point parameter.
        sharding: which part of each tensor is in this process's rows; by default all of it.

    Raises:
        ValueError: nothing to merge, or complex parameters.
    """

    def __init__(self, model: nn.Module, *, trainable_only: bool = True, sharding: Sharding | None = None) -> None:
        self.trainable_only = trainable_only
        model = unwrap(model)
        self.sharding = Sharding(Processes(alone=True)) if sharding is None else sharding
        found = []
        for name, tensor, is_parameter in self._walk(model):
            if tensor.is_complex():
                raise ValueError(f"parameter {name!r} is complex ({tensor.dtype}); only real parameters can be merged")
            found.append((name, tensor.dtype, is_parameter, self.sharding.shard(name, tensor, is_parameter)))
        if not any(is_parameter for _, _, is_parameter, _ in found):
            kind = "parameter that requires gradients" if trainable_only else "floating-point parameter"
            raise ValueError(f"model {type(model).__name__} has no {kind}: there is nothing to merge")
        last = len(self.sharding.units)
        slots: list[Slot] = []
        offset = 0
        for name, dtype, is_parameter, part in sorted(
            found, key=lambda item: last if item[3].unit is None else item[3].unit
        ):
            numel = math.prod(part.local)
            slots.append(Slot(name, dtype, offset, numel, is_parameter, part))
            offset += numel
        self.slots = tuple(slots)
        self.numel = offset

    @classmethod
    def divided(cls, model: nn.Module, processes: Processes, *, trainable_only: bool) -> ParameterLayout:
        """The layout of this process's columns.

        Raises:
            ValueError: the model's parameters are sharded in a way that is not supported, differ between processes, or
                are frozen and sharded.
        """
        model = unwrap(model)
        columns = sum(p.numel() for p in model.parameters() if _is_merged(p, trainable_only))
        layout = cls(model, trainable_only=trainable_only, sharding=find_sharding(model, processes, columns))
        described = repr([(slot.name, slot.shape, slot.dtype) for slot in layout.slots])
        if len(set(processes.all_gather_object(hashlib.sha256(described.encode()).digest()))) > 1:
            raise ValueError(
                "processes have different parameters (pipeline or tensor parallelism?), which is not supported: every "
                f"process must have the same ones, whole or as shards of FSDP; here they begin {described[:100]}..."
            )
        if isinstance(layout.sharding, EqualShares):
            first = next(tensor for _, tensor, is_parameter in layout._walk(model) if is_parameter)
            if len(set(processes.all_gather_object(tuple(first.detach().reshape(-1)[:64].tolist())))) > 1:
                raise ValueError(
                    "processes have different weights that are not shards of one model: merging together needs DDP or "
                    "FSDP (its first step comes after the model is wrapped)"
                )
        if layout.sharding.units:
            frozen = [name for name, p in model.named_parameters() if not _is_merged(p, trainable_only)]
            if frozen:
                raise ValueError(
                    f"parameter {frozen[0]!r} is frozen in a model sharded by FSDP: pass trainable_only=False, so that "
                    "rows hold frozen parameters too"
                )
        return layout

    def _walk(self, model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
        for name, parameter in model.named_parameters():
            if _is_merged(parameter, self.trainable_only):
                yield clean_name(name), parameter, True
        for name, places in persistent_buffers(model).items():
            buffer = places[0].tensor
            if buffer.is_floating_point():
                yield clean_name(name), buffer, False

    def tensors(self, model: nn.Module) -> list[Tensor]:
        """The model's own tensors in the order of ``slots``; under FSDP, shards.

        Raises:
            ValueError: the model's merged parameters are not those of the layout any more (names or shapes changed).
        """
        self.sharding.reshard()
        found = {name: tensor for name, tensor, _ in self._walk(unwrap(model))}
        now = {name: tuple(tensor.shape) for name, tensor in found.items()}
        then = {slot.name: slot.shard.held for slot in self.slots}
        if now != then:
            raise ValueError(f"the model's parameters changed since the first checkpoint: {_difference(then, now)}")
        return [found[slot.name] for slot in self.slots]

    def locals(self, tensors: list[Tensor]) -> list[Tensor]:
        """The parts of the model's tensors that this process's rows hold, in the shapes of :meth:`views`."""
        return [self.sharding.local(slot.shard, tensor) for slot, tensor in zip(self.slots, tensors, strict=True)]

    def volatile(self, model: nn.Module, tensors: list[Tensor]) -> list[bool]:
        """Which of the tensors a forward pass may write: buffers, and embeddings renormalized as they are read."""
        modules = [module for module in unwrap(model).modules() if getattr(module, "max_norm", None) is not None]
        renormalized = {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}
        pairs = zip(self.slots, tensors, strict=True)
        return [not slot.is_parameter or id(tensor) in renormalized for slot, tensor in pairs]

    def views(self, row: Tensor) -> dict[str, Tensor]:
        """The named, shaped views of a flat row of shape ``(numel,)``, in the order of ``slots``."""
        return {slot.name: row[slot.offset : slot.offset + slot.numel].view(slot.shard.local) for slot in self.slots}


def persistent_buffers(model: nn.Module) -> dict[str, list[BufferPlace]]:
    """Buffers that belong to the state_dict: the first name of each, and every place that holds the same tensor."""
    names: dict[int, str] = {}
    places: dict[str, list[BufferPlace]] = {}
    for prefix, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is None or key in module._non_persistent_buffers_set:
                continue
            name = names.setdefault(id(buffer), f"{prefix}.{key}" if prefix else key)
            places.setdefault(name, []).append(BufferPlace(module, key))
    return places


def _is_merged(parameter: Tensor, trainable_only: bool) -> bool:
    return parameter.requires_grad if trainable_only else parameter.is_floating_point()


def _difference(then: dict[str, tuple[int, ...]], now: dict[str, tuple[int, ...]]) -> str:
    parts = [f"{name} is new" for name in now.keys() - then.keys()]
    parts += [f"{name} is gone" for name in then.keys() - now.keys()]
    common = then.keys() & now.keys()
    parts += [f"{name} was {then[name]}, is {now[name]}" for name in common if then[name] != now[name]]
    parts = sorted(parts) or ["their order changed"]
    return "; ".join(parts[:5]) + (f"; and {len(parts) - 5} more" if len(parts) > 5 else "")
