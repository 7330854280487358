"""Which tensors of a model are merged, which columns of a row hold each of them, and to which group it belongs.

A row is one flat vector of N numbers. :class:`ParameterLayout` maps it to the model: parameters in the order of
``named_parameters`` (tied ones once; under FSDP those of each unit side by side), then the floating-point buffers of
the ``state_dict`` that are finite when the window is made (masks that hold -inf are not). With several ranks each holds
its own columns (see ``sharding``). :func:`parameter_groups` sorts the tensors into groups that may have merge weights
of their own.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..distributed import Processes
from .names import clean_name, unwrap
from .sharding import EqualShares, Shard, Sharding, find_sharding

# What a word of a parameter's name says about the group of its tensor, in the models people train; the first kind that
# matches a whole word counts.
_KINDS = {
    "norms": r"\w*(norm|ln_?\w?|bn\d?)",
    "attention": r"\w*(attn|attention)\w*|[qkvo]_proj|qkv|query|key|value",
    "mlp": r"\w*(mlp|ffn?|feed_?forward|experts?|gate_proj|up_proj|down_proj|dense\w*|c_fc)",
    "embeddings": r"\w*(embed\w*|wte|wpe)",
    "head": r"\w*(lm_head|head|output)",
}


@dataclass(frozen=True)
class Slot:
    """One merged tensor, and the columns of a row that hold this rank's shard of it.

    Args:
        name: of the tensor in the ``state_dict``.
        dtype: of the tensor.
        offset: its first column.
        numel: how many columns it has: the numbers of the shard.
        is_parameter: whether it is a parameter, and no buffer.
        shard: which of the tensor's numbers they are.
    """

    name: str
    dtype: torch.dtype
    offset: int
    numel: int
    is_parameter: bool
    shard: Shard

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor, whatever the shard."""
        return self.shard.shape

    @property
    def whole_numel(self) -> int:
        """How many numbers the whole tensor has, on all ranks together."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class BufferPlace:
    """A module and the attribute that is its buffer."""

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
        sharding: which shard of each tensor this rank's rows hold; by default the whole tensor.
        skipped: names of buffers that are not merged; by default of those that hold a number that is not finite now.

    Raises:
        ValueError: nothing to merge, or complex parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        trainable_only: bool = True,
        sharding: Sharding | None = None,
        skipped: Set[str] | None = None,
    ) -> None:
        self.trainable_only = trainable_only
        model = unwrap(model)
        self.skipped = _not_finite(model) if skipped is None else frozenset(skipped)
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
        for name, dtype, is_parameter, shard in sorted(
            found, key=lambda item: last if item[3].unit is None else item[3].unit
        ):
            numel = math.prod(shard.local)
            slots.append(Slot(name, dtype, offset, numel, is_parameter, shard))
            offset += numel
        self.slots = tuple(slots)
        self.numel = offset
        #: Where the columns of parameters end; those of buffers follow.
        self.parameters_end = sum(slot.numel for slot in slots if slot.is_parameter)

    @classmethod
    def divided(cls, model: nn.Module, processes: Processes, *, trainable_only: bool) -> ParameterLayout:
        """The layout of the columns that this rank holds, of a model that several ranks train.

        Raises:
            ValueError: the model's parameters are sharded in a way that is not supported, differ between ranks, or are
                frozen and sharded.
        """
        model = unwrap(model)
        with processes.raise_on_all():
            _check_parameters(model, trainable_only)
        numel = sum(p.numel() for p in model.parameters() if _is_merged(p, trainable_only))
        # A rank whose own buffers are finite skips those of the others too: all have the same columns.
        with processes.raise_on_all():
            mine = _not_finite(model)
        skipped = frozenset[str]().union(*processes.all_gather_object(mine))
        sharding = find_sharding(model, processes, numel)
        with processes.raise_on_all():
            layout = cls(model, trainable_only=trainable_only, sharding=sharding, skipped=skipped)
        described = repr([(slot.name, slot.shape, slot.dtype) for slot in layout.slots])
        if len(set(processes.all_gather_object(hashlib.sha256(described.encode()).digest()))) > 1:
            raise ValueError(
                "ranks have different parameters (pipeline or tensor parallelism?), which is not supported: every rank "
                f"must have the same ones, whole or as shards of FSDP; here they begin {described[:100]}..."
            )
        if isinstance(layout.sharding, EqualShares):
            first = next(tensor for _, tensor, is_parameter in layout._walk(model) if is_parameter)
            if len(set(processes.all_gather_object(tuple(first.detach().reshape(-1)[:64].tolist())))) > 1:
                raise ValueError(
                    "ranks have different weights that are not shards of one model: merging together needs DDP or FSDP "
                    "(its first step comes after the model is wrapped)"
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
        """The name of every merged tensor, the model's own tensor, and whether it is a parameter."""
        for name, parameter in model.named_parameters():
            if _is_merged(parameter, self.trainable_only):
                yield clean_name(name), parameter, True
        for name, places in persistent_buffers(model).items():
            buffer = places[0].tensor
            if buffer.is_floating_point() and clean_name(name) not in self.skipped:
                yield clean_name(name), buffer, False

    def tensors(self, model: nn.Module) -> list[Tensor]:
        """The model's own tensors in the order of ``slots``; under FSDP, those that hold this rank's shards.

        Raises:
            ValueError: names or shapes of the merged parameters changed since the layout was made.
        """
        self.sharding.reshard()
        found = self._found(model)
        if (change := self._change(found)) is not None:
            raise ValueError(change)
        return [found[slot.name] for slot in self.slots]

    def change(self, model: nn.Module) -> str | None:
        """What makes the model's merged parameters other ones than the layout's, in words; None: nothing."""
        return self._change(self._found(model))

    def _found(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: tensor for name, tensor, _ in self._walk(unwrap(model))}

    def _change(self, found: dict[str, Tensor]) -> str | None:
        now = {name: tuple(tensor.shape) for name, tensor in found.items()}
        then = {slot.name: slot.shard.held for slot in self.slots}
        if now == then:
            return None
        return f"the model's parameters changed since the first checkpoint: {_difference(then, now)}"

    def locals(self, tensors: list[Tensor]) -> list[Tensor]:
        """This rank's shard of each of the model's :meth:`tensors`, no copies, in the shapes of :meth:`views`."""
        return [self.sharding.local(slot.shard, tensor) for slot, tensor in zip(self.slots, tensors, strict=True)]

    def volatile(self, model: nn.Module, tensors: list[Tensor]) -> list[bool]:
        """Which of the model's :meth:`tensors` a forward pass may write: buffers, and embeddings with ``max_norm``."""
        modules = [module for module in unwrap(model).modules() if getattr(module, "max_norm", None) is not None]
        renormalized = {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}
        pairs = zip(self.slots, tensors, strict=True)
        return [not slot.is_parameter or id(tensor) in renormalized for slot, tensor in pairs]

    def pairs(self, row: Tensor, mine: list[Tensor], copied: list[bool]) -> list[tuple[Tensor, Tensor]]:
        """Views of a row's columns, and the numbers of a model that belong there, of the same shapes.

        Args:
            row: shape ``(numel,)``.
            mine: the model's :meth:`locals`.
            copied: which of them are copied now. Neighbours are copied as one: with hundreds of small buffers it is the
                number of copies that takes time on a GPU.
        """

        def kind(item: tuple[Slot, Tensor, bool]) -> object:
            slot, tensor, copy = item
            return (tensor.device, tensor.dtype) if copy else slot.name

        found = []
        for _, run in groupby(zip(self.slots, mine, copied, strict=True), kind):
            slots, tensors, copies = zip(*run, strict=True)
            columns = row[slots[0].offset : slots[-1].offset + slots[-1].numel]
            if copies[0]:
                found.append((columns, torch.cat([tensor.reshape(-1) for tensor in tensors])))
            else:
                found.append((columns.view(slots[0].shard.local), tensors[0]))
        return found

    def views(self, row: Tensor) -> dict[str, Tensor]:
        """Each slot's columns of a row of shape ``(numel,)``, as views shaped like its shard, by name."""
        return {slot.name: row[slot.offset : slot.offset + slot.numel].view(slot.shard.local) for slot in self.slots}


def persistent_buffers(model: nn.Module) -> dict[str, list[BufferPlace]]:
    """The buffers of the ``state_dict``: by the first name of each, every place that holds the same tensor."""
    names: dict[int, str] = {}
    places: dict[str, list[BufferPlace]] = {}
    for prefix, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is None or key in module._non_persistent_buffers_set:
                continue
            name = names.setdefault(id(buffer), f"{prefix}.{key}" if prefix else key)
            places.setdefault(name, []).append(BufferPlace(module, key))
    return places


def _check_parameters(model: nn.Module, trainable_only: bool) -> None:
    """Raise a ValueError if a merged parameter holds no numbers yet, or none that can be averaged."""
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"parameter {name!r} is lazy: run one forward pass of the model first, which gives it a shape"
            )
        if _is_merged(parameter, trainable_only) and parameter.is_meta:
            raise ValueError(
                f"parameter {name!r} is on the meta device, without numbers: load or initialize the weights first "
                "(model.to_empty, from_pretrained without device_map)"
            )
        if _is_merged(parameter, trainable_only) and parameter.dtype.itemsize == 1:
            raise ValueError(
                f"parameter {name!r} is quantised ({parameter.dtype}): freeze it (requires_grad_(False)) and train an "
                "adapter, or train in bfloat16 or float32"
            )


def _not_finite(model: nn.Module) -> frozenset[str]:
    """The names of the floating-point buffers of the ``state_dict`` that hold a number that is not finite."""
    found = {clean_name(name): places[0].tensor for name, places in persistent_buffers(model).items()}
    return frozenset(
        name
        for name, buffer in found.items()
        if buffer.is_floating_point() and (buffer.is_meta or not buffer.float().isfinite().all())
    )


def _is_merged(parameter: Tensor, trainable_only: bool) -> bool:
    return parameter.requires_grad if trainable_only else parameter.is_floating_point()


def _difference(then: dict[str, tuple[int, ...]], now: dict[str, tuple[int, ...]]) -> str:
    changes = [f"{name} is new" for name in now.keys() - then.keys()]
    changes += [f"{name} is gone" for name in then.keys() - now.keys()]
    common = then.keys() & now.keys()
    changes += [f"{name} was {then[name]}, is {now[name]}" for name in common if then[name] != now[name]]
    changes = sorted(changes) or ["their order changed"]
    return "; ".join(changes[:5]) + (f"; and {len(changes) - 5} more" if len(changes) > 5 else "")


@dataclass(frozen=True)
class ParameterGroups:
    """A partition of a layout's slots into named groups.

    Args:
        names: of the groups, in the order of the rows of grouped merge weights.
        members: for each slot of the layout the index of its group.
    """

    names: tuple[str, ...]
    members: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)


def check_groups(groups: str | Mapping[str, list[str]] | None) -> None:
    """Raise a ValueError or TypeError if ``groups`` is neither None nor what :func:`parameter_groups` takes."""
    if groups is None or groups == "blocks":
        return
    if isinstance(groups, str):
        raise ValueError(f"groups={groups!r}: must be None, 'blocks', or a dict of name patterns")
    if not isinstance(groups, Mapping):
        raise TypeError(f"groups={groups!r}: must be None, 'blocks', or a dict of name patterns")
    if not groups:
        raise ValueError("groups={}: give a group, as {'first': ['model.layers.0.*']}; None is without groups")
    for name, patterns in groups.items():
        if not isinstance(name, str):
            raise TypeError(f"groups={groups!r}: the name {name!r} must be a string")
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns) or not patterns:
            raise TypeError(f"groups[{name!r}]={patterns!r}: must be a list of patterns such as ['model.layers.0.*']")


def parameter_groups(layout: ParameterLayout, groups: str | Mapping[str, list[str]]) -> ParameterGroups:
    """Sort the merged tensors of a model into groups.

    Args:
        layout: the merged tensors.
        groups: "blocks": each block's attention, each block's MLP, all norms, embeddings and head; or a mapping from
            group names to lists of patterns of parameter names (shell style, ``*`` for anything). The first group with
            a pattern that matches takes a tensor; tensors that no pattern matches become the group "other".

    Raises:
        ValueError: a group whose patterns match no merged tensor that the groups before it have left.
    """
    if isinstance(groups, str):
        labels = [_block_label(slot.name) for slot in layout.slots]
        names = list(dict.fromkeys(labels))
    else:
        labels = [_pattern_label(slot.name, groups) for slot in layout.slots]
        if empty := [name for name in groups if name not in labels]:
            some = ", ".join(slot.name for slot in layout.slots[:5])
            raise ValueError(f"groups={empty} match no merged tensor; their names are like {some}")
        names = [*groups, *(["other"] if "other" in labels and "other" not in groups else [])]
    return ParameterGroups(tuple(names), tuple(names.index(label) for label in labels))


def _block_label(name: str) -> str:
    words = name.split(".")
    block = next((f"block {word} " for word in words if word.isdigit()), "")
    for kind, pattern in _KINDS.items():
        if any(re.fullmatch(pattern, word.lower()) for word in words):
            # Norms hold so few numbers that those of all blocks share one vector of weights.
            return kind if kind == "norms" else block + kind
    return f"{block}other"


def _pattern_label(name: str, groups: Mapping[str, list[str]]) -> str:
    for group, patterns in groups.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return group
    return "other"
