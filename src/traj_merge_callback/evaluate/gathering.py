"""How the columns of a candidate become weights that a model computes with, and gradients become columns again."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from ..distributed import all_gather_into, collective_timeout, reduce_scatter_sum
from ..pieces import EXCHANGE, Pieces
from ..window.layout import ParameterLayout, Slot, unwrap
from ..window.sharding import EqualShares
from ..window.window import CheckpointWindow
from .heldout import device_of
from .isolation import isolated
from .units import Units


class Weights(Protocol):
    """The weights of one candidate after another, in a model whose own are never written.

    Args:
        model: that computes with them.
        row: this process's columns of the candidate, to be filled.
    """

    model: nn.Module
    row: Tensor

    def gather(self) -> Pieces[None]:
        """The row has been filled: make it the candidate at hand."""

    def ready(self, gradients: bool) -> AbstractContextManager[None]:
        """Within the context the model computes with the candidate, without a trace (see ``isolated``)."""

    def clear_gradient(self) -> None:
        """Begin a new gradient."""

    def add_gradient(self) -> None:
        """Add what a backward pass inside :meth:`ready` has left."""

    def gradient(self) -> Pieces[Tensor]:
        """This process's columns of the gradient, or of a summand of it where others hold the same columns."""


class WholeWeights:
    """Weights that are all on the device: one process, or DDP, whose processes gather each candidate once.

    Args:
        model: the model being trained; wrappers (compile, DDP) are looked through.
        layout: of this process's columns.
        row: float32, on the model's device, for this process's columns.
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
        return self.layout.installed(self.model, self.whole)

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
        _add_gradients(self.layout.slots, self._gradient, self.layout.tensors(unwrap(self.model)))

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


class ShardedWeights:
    """Weights that are gathered for the forward pass of one FSDP module at a time, and freed after it.

    Neither FSDP's own state nor its process groups are used: live parameters are not gathered, and what fails here
    cannot hold training up. In a pass with gradients the innermost modules gather once more during the backward pass,
    so that there too no process ever has the whole model.

    Args:
        model, layout, row, seed: see :class:`WholeWeights`.
        units: the FSDP modules.
    """

    def __init__(self, model: nn.Module, layout: ParameterLayout, row: Tensor, seed: int, units: Units) -> None:
        self.row = row
        self.model = model
        self._layout = layout
        self._units = units
        self._isolated = functools.partial(isolated, unwrap(model), seed)
        self._gradient: Tensor | None = None
        self._leaves: dict[int, Tensor] = {}
        # What is held whole, as it takes gradients.
        self._plain: list[tuple[Slot, Tensor]] = []

    def gather(self) -> Pieces[None]:
        """See :class:`Weights`; units are gathered when they compute."""
        return
        yield

    @contextmanager
    def ready(self, gradients: bool) -> Iterator[None]:
        """See :class:`Weights`."""
        model = unwrap(self.model)
        with self._layout.installed(model, self.row), self._isolated(gradients=gradients):
            pairs = zip(self._layout.slots, self._layout.tensors(model), strict=True)
            self._plain = [(slot, tensor) for slot, tensor in pairs if slot.shard.unit is None]
            self._leaves = {}
            for module in model.modules():
                vars(module)["_parameters"] = dict(module._parameters)
                for kind in ("_forward_pre_hooks", "_forward_hooks"):
                    vars(module)[kind] = _without_fsdp(vars(module)[kind])
            for index, unit in enumerate(self._units):
                inside = unit.module.module if hasattr(unit.module, "_fsdp_wrapped_module") else unit.module
                forward = inside if inside is not unit.module else unit.module.forward
                vars(unit.module)["forward"] = functools.partial(self._forward, index, forward, gradients)
            with self._units.one_pass("gradients" if gradients else "forward"):
                yield

    def _forward(self, index: int, forward: Any, gradients: bool, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(self._run, index, forward, gradients)
        # Not the outermost module, whose parameters are needed to the end; and trainers redirect its forward, once.
        again = gradients and index > 0 and not self._units[index].has_units and bool(self._units.slots[index])
        if again:
            return checkpoint(run, True, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return run(not gradients, *args, **kwargs)

    def _run(self, index: int, forward: Any, gradients: bool, free: bool, *args: Any, **kwargs: Any) -> Any:
        unit = self._units[index]
        policy = _precision(unit.module)
        dtype = getattr(policy, "param_dtype", None)
        tensors = self._gathered(index, dtype, gradients)
        outermost = index == 0 and getattr(policy, "cast_root_forward_inputs", False)
        if dtype is not None and (policy.cast_forward_inputs or outermost):
            args, kwargs = _cast((args, kwargs), dtype)
        replaced = [(place, place[0]._parameters[place[1]]) for key in tensors for place in unit.places[key]]
        try:
            for key, tensor in tensors.items():
                for module, name in unit.places[key]:
                    module._parameters[name] = tensor  # type: ignore[assignment]
            output = forward(*args, **kwargs)
        finally:
            # Where a module inside computes again in the backward pass it may need them there.
            if free:
                for (module, name), parameter in replaced:
                    module._parameters[name] = parameter
        return output if getattr(policy, "output_dtype", None) is None else _cast(output, policy.output_dtype)

    def _gathered(self, index: int, dtype: torch.dtype | None, gradients: bool) -> dict[int, Tensor]:
        """The whole tensors of a unit, by the ``id`` of the live parameter they stand for."""
        if not self._units.slots[index]:
            return {}
        part = self.row[self._units.columns(index)]
        if gradients:
            # Unit and columns are the same when they are gathered again: so is the leaf.
            part = self._leaves.setdefault(index, part.detach().requires_grad_())
        whole = _Gathered.apply(part, self._units, index, dtype)
        return dict(zip(self._units.keys[index], whole, strict=True))

    def whole(self) -> Pieces[dict[int, Tensor]]:
        """The candidate's tensors that units gather, on the CPU of the first process, by the live ones' ``id``."""
        found = {}
        for index in range(len(self._units)):
            yield EXCHANGE
            with self._units.one_pass(f"unit {index}"):
                for key, tensor in self._gathered(index, None, False).items():
                    if self._units.processes.is_rank_zero:
                        found[key] = tensor.to("cpu", copy=True)
        return found

    def clear_gradient(self) -> None:
        """See :class:`Weights`."""
        self._gradient = torch.zeros_like(self.row) if self._gradient is None else self._gradient.zero_()

    def add_gradient(self) -> None:
        """See :class:`Weights`."""
        assert self._gradient is not None
        for index, leaf in self._leaves.items():
            if leaf.grad is not None:
                self._gradient[self._units.columns(index)].add_(leaf.grad)
        self._leaves = {}
        _add_gradients([slot for slot, _ in self._plain], self._gradient, [tensor for _, tensor in self._plain])

    def gradient(self) -> Pieces[Tensor]:
        """See :class:`Weights`."""
        assert self._gradient is not None
        return self._gradient
        yield


def weights_in(model: nn.Module, window: CheckpointWindow, seed: int, *, units: Units | None = None) -> Weights:
    """Room for the weights of one candidate of a window.

    Args:
        model: the model being trained.
        window: the checkpoints.
        seed: see ``isolated``.
        units: the FSDP modules of a model that has some.
    """
    row = window.staging_on(device_of(model))
    if units is not None:
        return ShardedWeights(model, window.layout, row, seed, units)
    return WholeWeights(model, window.layout, row, seed)


class _Gathered(torch.autograd.Function):
    """Columns to a unit's tensors, and back."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, units: Units, index: int, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.units, ctx.index, ctx.part = units, index, part.detach()
        return tuple(units.gather(index, part, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return ctx.units.scatter(ctx.index, gradients, ctx.part), None, None, None


def _without_fsdp(hooks: Any) -> Any:
    """A module's hooks but those that gather its parameters."""
    ours = {key: hook for key, hook in hooks.items() if not _is_of_fsdp(hook)}
    return type(hooks)(ours)


def _is_of_fsdp(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp")


def _precision(module: nn.Module) -> Any:
    """An FSDP module's mixed precision policy, or None."""
    if hasattr(module, "_get_fsdp_state"):
        return module._get_fsdp_state()._mp_policy  # type: ignore[operator]
    return getattr(module, "mixed_precision", None)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, values)


def _add_gradients(slots: Sequence[Slot], row: Tensor, tensors: list[Tensor]) -> None:
    for slot, tensor in zip(slots, tensors, strict=True):
        if tensor.grad is not None:
            row[slot.offset : slot.offset + slot.numel].add_(tensor.grad.reshape(-1))
