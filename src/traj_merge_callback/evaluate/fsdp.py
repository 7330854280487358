"""A candidate's weights in a model sharded by FSDP: gathered for one FSDP module at a time, and freed after it.

FSDP's own state and process groups are not used: live parameters are not gathered, and what fails here cannot hold
training up.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from ..distributed import (
    CollectiveTimeout,
    FailedOnAllRanks,
    Processes,
    all_gather_into,
    collective_timeout,
    reduce_scatter_sum,
)
from ..pieces import EXCHANGE, Pieces
from ..window.layout import ParameterLayout, Slot, unwrap
from ..window.sharding import Unit
from .isolation import isolated
from .weights import add_gradients, installed


@dataclass(frozen=True)
class _Exchange:
    kind: str
    index: int
    dtype: torch.dtype
    device: torch.device


class Units:
    """The FSDP units of a model, in the order in which they were found, and the collectives that gather them.

    A forward or backward pass is a sequence of collectives. If this rank's pass raises, it replays the pass's remaining
    collectives with zero tensors, in the order recorded in the first pass of that kind, so that no other rank blocks;
    the error is raised when the pass ends. In a first pass, where there is no record, ranks exchange an error flag
    before each collective.

    Args:
        model: the model; wrappers (compile, DDP) are looked through.
        layout: of this rank's columns.
        processes: the ranks.
    """

    def __init__(self, model: nn.Module, layout: ParameterLayout, processes: Processes) -> None:
        self._units: list[Unit] = layout.sharding.units
        self.processes = processes
        # Every rank is in as many groups, which stand in the same order.
        all_ranks = dict.fromkeys(unit.ranks for unit in self._units if len(unit.ranks) > 1)
        self._groups = {ranks: processes.subgroup(ranks) for ranks in all_ranks}
        counts = processes.all_gather_array(np.array([slot.numel for slot in layout.slots])).astype(int)
        tensors = layout.tensors(unwrap(model))
        places = [[n for n, slot in enumerate(layout.slots) if slot.shard.unit == index] for index in range(len(self))]
        self.slots = [[layout.slots[place] for place in chosen] for chosen in places]
        self.keys = [[id(tensors[place]) for place in chosen] for chosen in places]
        held = [counts[list(unit.ranks)][:, chosen] for unit, chosen in zip(self, places, strict=True)]
        self._ranges = [_ranges(numels) for numels in held]
        # Columns of a unit on the rank that has most of them.
        self._longest = [int(numels.sum(axis=1).max(initial=0)) for numels in held]
        self._orders: dict[str, list[_Exchange]] = {}
        self._expected: list[_Exchange] | None = None
        self._done: list[_Exchange] = []

    def __len__(self) -> int:
        return len(self._units)

    def __getitem__(self, index: int) -> Unit:
        return self._units[index]

    def __iter__(self) -> Iterator[Unit]:
        return iter(self._units)

    def columns(self, index: int) -> slice:
        """The columns of a unit that has slots, in this rank's rows."""
        slots = self.slots[index]
        return slice(slots[0].offset, slots[-1].offset + slots[-1].numel)

    @contextmanager
    def one_pass(self, kind: str) -> Iterator[None]:
        """One pass through the model; passes of one kind run the same collectives in the same order.

        Raises:
            FailedOnAllRanks: in a first pass, that a rank failed.
        """
        self._expected, self._done = self._orders.get(kind), []
        error: Exception | None = None
        try:
            yield
        except (CollectiveTimeout, FailedOnAllRanks):
            raise
        except Exception as raised:
            error = raised
        if self._expected is None:
            self._in_step(error, ended=True)
            self._orders[kind] = self._done
        else:
            # Also where a rank had nothing to compute, because its batch has no targets.
            for exchange in self._expected[len(self._done) :]:
                self._replay(exchange)
        if error is not None:
            raise error

    def _in_step(self, error: Exception | None, *, ended: bool) -> None:
        """Raise on all ranks if one has an error, or if they are not at the same collective."""
        try:
            at_end, not_at_end = self.processes.all_reduce_error(error, float(ended), -float(ended))
        except (CollectiveTimeout, FailedOnAllRanks):
            raise
        except Exception as own:
            raise FailedOnAllRanks(f"rank {self.processes.rank} failed: {type(own).__name__}: {own}") from own
        if at_end != -not_at_end:
            raise FailedOnAllRanks("ranks do not gather the same modules in a forward pass")

    def gather(self, index: int, part: Tensor, dtype: torch.dtype | None) -> list[Tensor]:
        """The whole tensors of a unit.

        Args:
            index: of the unit.
            part: its columns on this rank.
            dtype: that it computes in; None: each tensor's own.
        """
        slots = self.slots[index]
        own = {slot.dtype for slot in slots}
        sent = dtype or (own.pop() if len(own) == 1 else torch.float32)
        flat = self._exchange("gather", index, part.to(sent)).view(len(self._units[index].ranks), -1)
        found = []
        for slot, ranges in zip(slots, self._ranges[index], strict=True):
            shape = list(slot.shape)
            front = [shape.pop(slot.shard.dim)] if shape else []
            whole = torch.cat([values[part] for values, part in zip(flat, ranges, strict=True)]).view(*front, *shape)
            found.append((whole.movedim(0, slot.shard.dim) if front else whole).to(dtype or slot.dtype))
        return found

    def scatter(self, index: int, gradients: Sequence[Tensor | None], part: Tensor) -> Tensor:
        """Gradients of a unit's tensors, summed over ranks, as its columns on this rank, like ``part``."""
        flat = torch.zeros(len(self._units[index].ranks), self._longest[index], device=part.device)
        for slot, gradient, ranges in zip(self.slots[index], gradients, self._ranges[index], strict=True):
            if gradient is None:
                continue
            moved = gradient.movedim(slot.shard.dim, 0) if slot.shape else gradient
            pieces = moved.reshape(-1).split([columns.stop - columns.start for columns in ranges])
            for target, columns, values in zip(flat, ranges, pieces, strict=True):
                target[columns].copy_(values)
        return self._exchange("scatter", index, flat.view(-1))[: len(part)]

    def _exchange(self, kind: str, index: int, values: Tensor) -> Tensor:
        """One collective: all-gather a unit's columns, padded to the longest shard, or reduce-scatter them."""
        ranks, longest = self._units[index].ranks, self._longest[index]
        # Allocated before the collective: there may not be enough memory.
        part, whole = values.new_zeros(longest), values
        if kind == "gather":
            whole = values.new_empty(longest * len(ranks))
            part[: len(values)].copy_(values)
        if self._expected is None:
            self._in_step(None, ended=False)
        if len(ranks) > 1:
            with collective_timeout(self.processes.timeout):
                if kind == "gather":
                    all_gather_into(whole, part, self._groups[ranks])
                else:
                    reduce_scatter_sum(part, whole, self._groups[ranks])
        self._done.append(_Exchange(kind, index, values.dtype, values.device))
        if len(ranks) == 1:
            return values
        return whole if kind == "gather" else part

    def _replay(self, exchange: _Exchange) -> None:
        """Take part in a collective of the others with zeros."""
        longest = self._longest[exchange.index]
        columns = 0 if exchange.kind == "gather" else longest * len(self._units[exchange.index].ranks)
        values = torch.zeros(columns, dtype=exchange.dtype, device=exchange.device)
        self._exchange(exchange.kind, exchange.index, values)


def _ranges(numels: np.ndarray) -> list[list[slice]]:
    """For each tensor, which of each rank's columns are its own; ``numels`` has shape ``(ranks, tensors)``."""
    ends = numels.cumsum(axis=1)
    pairs = zip((ends - numels).T.tolist(), ends.T.tolist(), strict=True)
    return [[slice(*ends) for ends in zip(first, last, strict=True)] for first, last in pairs]


class ShardedWeights:
    """Weights that are gathered for the forward pass of one FSDP module at a time, and freed after it.

    In a pass with gradients the innermost modules gather once more during the backward pass, so that there too no rank
    ever has the whole model.

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
        # Parameters that no unit gathers: their slots, and the tensors that collect their gradients.
        self._plain: list[tuple[Slot, Tensor]] = []

    def gather(self) -> Pieces[None]:
        """See :class:`Weights`; units are gathered when they compute."""
        return
        yield

    @contextmanager
    def ready(self, gradients: bool) -> Iterator[None]:
        """See :class:`Weights`."""
        model = unwrap(self.model)
        with installed(self._layout, model, self.row), self._isolated(gradients=gradients):
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
        """The candidate's tensors that units gather, on the CPU of rank 0, by the live ones' ``id``."""
        found = {}
        for index in range(len(self._units)):
            yield EXCHANGE
            with self._units.one_pass(f"unit {index}"):
                for key, tensor in self._gathered(index, None, False).items():
                    if self._units.processes.is_rank_zero:
                        found[key] = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
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
        add_gradients([slot for slot, _ in self._plain], self._gradient, [tensor for _, tensor in self._plain])

    def gradient(self) -> Pieces[Tensor]:
        """See :class:`Weights`."""
        assert self._gradient is not None
        return self._gradient
        yield


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
