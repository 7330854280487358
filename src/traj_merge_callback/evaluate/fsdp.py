"""A candidate's weights in a model sharded by FSDP: whole tensors exist for one FSDP module (a *unit*) at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from ..distributed import (
    ENDS,
    CollectiveTimeout,
    FailedOnAllRanks,
    Processes,
    all_gather_into,
    described,
    reduce_scatter_sum,
)
from ..window.layout import ParameterLayout, Slot
from ..window.memory import let_go
from ..window.names import unwrap
from ..window.pieces import EXCHANGE, Pieces
from ..window.sharding import Unit
from .kept import Kept
from .parking import Parking
from .untouched.isolation import isolated
from .weights import add_gradients, installed, write_into


class ShardedWeights:
    """Weights of which each rank holds its FSDP shards; a unit's tensors are gathered to compute, and freed after it.

    Implements ``Weights`` (see ``weights.py``). Neither FSDP's own state nor its process groups are used: live
    parameters are not gathered, and a failure here cannot block a collective of training. In a pass with gradients the
    innermost units are gathered again during the backward pass (activation checkpointing), so that no rank ever has
    the whole model. Where the model itself checkpoints activations, what it computes again finds whole tensors too.

    Args:
        model: the model being trained; wrappers (compile) are looked through.
        layout: the layout of this rank's columns.
        row: float32, on the model's device, shape ``(layout.numel,)``.
        kept: what every candidate takes from live.
        seed: see ``isolated``.
        units: the model's FSDP units.
        parking: of the other large tensors made here.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: ParameterLayout,
        row: Tensor,
        kept: Kept,
        seed: int,
        units: Units,
        parking: Parking,
    ) -> None:
        self.row = row
        self.kept = kept
        self._parking = parking
        self.model = model
        self._layout = layout
        self._units = units
        # Live shards are not computed with.
        self._isolated = functools.partial(isolated, unwrap(model), seed, watch="never")
        self._gradient: Tensor | None = None
        # This rank's columns of each unit, as the autograd leaves of the present pass.
        self._leaves: dict[int, Tensor] = {}
        # The unit that a recomputation of the model's own has gathered last, and its tensors.
        self._again: tuple[int, dict[int, Tensor]] | None = None
        # Tensors outside of all units, as the present pass computes with them.
        self._plain: list[tuple[Slot, Tensor]] = []

    def gather(self) -> Pieces[None]:
        """Nothing: units are gathered when they compute."""
        return
        yield

    @contextmanager
    def ready(self, gradients: bool) -> Iterator[None]:
        """A context in which the model computes with the candidate's weights, under ``isolated``."""
        model = unwrap(self.model)
        with installed(self._layout, model, self.row, self.kept), self._isolated(gradients=gradients):
            pairs = zip(self._layout.slots, self._layout.tensors(model), strict=True)
            self._plain = [(slot, tensor) for slot, tensor in pairs if slot.shard.unit is None]
            self._leaves, self._again = {}, None
            # Attributes set here are restored by ``isolated``, which saves each module's ``vars``.
            for module in model.modules():
                vars(module)["_parameters"] = _Parameters(module._parameters)
                for kind in ("_forward_pre_hooks", "_forward_hooks"):
                    vars(module)[kind] = _without_fsdp(vars(module)[kind])
            for index, unit in enumerate(self._units):
                inside = unit.module.module if hasattr(unit.module, "_fsdp_wrapped_module") else unit.module
                forward = inside if inside is not unit.module else unit.module.forward
                vars(unit.module)["forward"] = functools.partial(self._forward, index, forward, gradients)
                for key in self._units.keys[index] if gradients else []:
                    for place, name in unit.places[key]:
                        place._parameters.gather_when_read(name, functools.partial(self._recomputed, index, key))  # type: ignore[attr-defined]
            with self._units.one_pass("gradients" if gradients else "forward"):
                yield
            self._again = None

    def _forward(self, index: int, forward: Any, gradients: bool, *args: Any, **kwargs: Any) -> Any:
        """Replaces the forward of a unit's module."""
        run = functools.partial(self._run, index, forward, gradients)
        # Not the outermost unit: its parameters are in use until the end, and its forward, which trainers redirect
        # once, must run only once.
        again = gradients and index > 0 and not self._units[index].has_units and bool(self._units.slots[index])
        if again:
            return checkpoint(run, True, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return run(not gradients, *args, **kwargs)

    def _run(self, index: int, forward: Any, gradients: bool, free: bool, *args: Any, **kwargs: Any) -> Any:
        """Run a unit's forward with its gathered tensors; ``free``: put the shards back afterwards."""
        unit = self._units[index]
        policy = _precision(unit.module)
        dtype = getattr(policy, "param_dtype", None)
        tensors = self._gathered(index, dtype, gradients)
        outermost = index == 0 and getattr(policy, "cast_root_forward_inputs", False)
        if dtype is not None and (policy.cast_forward_inputs or outermost):
            args, kwargs = _cast((args, kwargs), dtype)
        # Not by index, which would gather (see _Parameters).
        replaced = [(place, place[0]._parameters.get(place[1])) for key in tensors for place in unit.places[key]]
        try:
            for key, tensor in tensors.items():
                for module, name in unit.places[key]:
                    module._parameters[name] = tensor  # type: ignore[assignment]
            output = forward(*args, **kwargs)
        finally:
            # Without ``free`` a checkpointed unit inside may need the tensors again in the backward pass.
            if free:
                for (module, name), parameter in replaced:
                    module._parameters[name] = parameter
        return output if getattr(policy, "output_dtype", None) is None else _cast(output, policy.output_dtype)

    def _gathered(self, index: int, dtype: torch.dtype | None, gradients: bool) -> dict[int, Tensor]:
        """The whole tensors of a unit, by the ``id`` of the live parameter each stands for."""
        if not self._units.slots[index]:
            return {}
        mine = self.row[self._units.columns(index)]
        if gradients:
            # A unit that is gathered again in the backward pass uses the same leaf.
            mine = self._leaves.setdefault(index, mine.detach().requires_grad_())
        whole = _Gathered.apply(mine, self._units, index, dtype)
        return dict(zip(self._units.keys[index], whole, strict=True))

    def _recomputed(self, index: int, key: int) -> Tensor:
        """A unit's whole tensor, for a part of the model that computes again after the unit's forward has ended."""
        if self._again is None or self._again[0] != index:
            dtype = getattr(_precision(self._units[index].module), "param_dtype", None)
            self._again = index, self._gathered(index, dtype, True)
        return self._again[1][key]

    def whole(self) -> Pieces[dict[int, Tensor]]:
        """The candidate's tensors of all units, on rank 0's CPU, by the ``id`` of the live parameter; else empty."""
        found = {}
        for index in range(len(self._units)):
            yield EXCHANGE
            with self._units.one_pass(f"unit {index}"):
                for key, tensor in self._gathered(index, None, False).items():
                    if self._units.processes.is_rank_zero:
                        found[key] = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        return found

    def write(self) -> None:
        """Write the candidate's weights into the live shards."""
        write_into(self._layout, self.model, self.row)

    def clear_gradient(self) -> None:
        """Set the accumulated gradient to zero."""
        if self._gradient is None:
            self._gradient = self._parking.hold(torch.empty_like(self.row))
        self._gradient.zero_()

    def add_gradient(self) -> None:
        """Accumulate the gradients of a backward pass; called inside :meth:`ready`."""
        assert self._gradient is not None
        for index, leaf in self._leaves.items():
            if leaf.grad is not None:
                self._gradient[self._units.columns(index)].add_(leaf.grad)
        self._leaves = {}
        add_gradients([slot for slot, _ in self._plain], self._gradient, [tensor for _, tensor in self._plain])

    def gradient(self) -> Pieces[Tensor]:
        """This rank's columns of the accumulated gradient; of tensors outside of all units, this rank's summand."""
        assert self._gradient is not None
        return self._gradient
        yield


class _Parameters(dict[str, Any]):
    """A module's parameters; reading the shard of one gives the whole tensor.

    Only a backward pass reads shards: where the model itself checkpoints activations (a ``checkpoint_wrapper``, or
    ``torch.utils.checkpoint`` in its forward), parts of it compute again when their unit's forward has long ended.
    """

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        super().__init__(parameters)
        self._shards: dict[str, tuple[Any, Callable[[], Tensor]]] = {}

    def gather_when_read(self, name: str, gather: Callable[[], Tensor]) -> None:
        """Let reading this parameter, as long as it is the shard that it is now, call ``gather``."""
        self._shards[name] = self.get(name), gather

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        shard, gather = self._shards.get(name, (None, None))
        return gather() if gather is not None and value is shard else value


@dataclass(frozen=True)
class _Collective:
    """One all-gather or reduce-scatter, as recorded: ``kind`` is "gather" or "scatter", ``index`` the unit's."""

    kind: str
    index: int
    dtype: torch.dtype
    device: torch.device


class Units:
    """The FSDP units of a model, and the collectives that gather their tensors and scatter their gradients.

    If this rank's pass raises, it replays the pass's remaining collectives with zero tensors in the recorded order, so
    that no other rank blocks; the error is raised when the pass ends. The first pass of a kind records the order: in it
    ranks agree before every collective that none has failed, and all raise :class:`FailedOnAllRanks` if one has.

    Args:
        model: the model; wrappers (compile, DDP) are looked through.
        layout: the layout of this rank's columns.
        processes: the ranks that train the model together.
    """

    def __init__(self, model: nn.Module, layout: ParameterLayout, processes: Processes) -> None:
        self._units: list[Unit] = layout.sharding.units
        self.processes = processes
        # Creating a group is a collective of its ranks: units stand in the same order on all ranks, so groups do too.
        all_ranks = dict.fromkeys(unit.ranks for unit in self._units if len(unit.ranks) > 1)
        self._groups = {ranks: processes.subgroup(ranks) for ranks in all_ranks}
        # Columns of each tensor on each rank, shape (ranks, slots).
        counts = processes.all_gather_array(np.array([slot.numel for slot in layout.slots])).astype(int)
        tensors = layout.tensors(unwrap(model))
        places = [[n for n, slot in enumerate(layout.slots) if slot.shard.unit == index] for index in range(len(self))]
        self.slots = [[layout.slots[place] for place in chosen] for chosen in places]
        self.keys = [[id(tensors[place]) for place in chosen] for chosen in places]
        held = [counts[list(unit.ranks)][:, chosen] for unit, chosen in zip(self, places, strict=True)]
        self._ranges = [_ranges(numels) for numels in held]
        # Columns of a unit on the rank that has most of them: all ranks pad to this length.
        self._longest = [int(numels.sum(axis=1).max(initial=0)) for numels in held]
        self._recorded: dict[str, list[_Collective]] = {}
        # Of the present pass: the collectives recorded for its kind (None in a first pass), and those done.
        self._expected: list[_Collective] | None = None
        self._done: list[_Collective] = []

    def __len__(self) -> int:
        return len(self._units)

    def __getitem__(self, index: int) -> Unit:
        return self._units[index]

    def __iter__(self) -> Iterator[Unit]:
        return iter(self._units)

    def columns(self, index: int) -> slice:
        """The columns of a unit in this rank's rows; the unit must have slots."""
        slots = self.slots[index]
        return slice(slots[0].offset, slots[-1].offset + slots[-1].numel)

    @contextmanager
    def one_pass(self, kind: str) -> Iterator[None]:
        """One pass through the model; passes of one kind gather and scatter the same units in the same order.

        Raises:
            FailedOnAllRanks: in a first pass: a rank failed, or ranks do not gather the same units.
            CollectiveTimeout: a rank does not answer.
        """
        self._expected, self._done = self._recorded.get(kind), []
        error: BaseException | None = None
        try:
            yield
        except (FailedOnAllRanks, CollectiveTimeout, *ENDS):
            raise
        except BaseException as raised:
            error = raised
        let_go(error)  # what the pass took may be what the collectives left need
        if self._expected is None:
            self._in_step(error, ended=True)
            self._recorded[kind] = self._done
        else:
            # Collectives are also left where this rank had no backward pass, because its batch has no targets.
            for collective in self._expected[len(self._done) :]:
                self._replay(collective)
        if error is not None:
            raise error

    def _in_step(self, error: BaseException | None, *, ended: bool) -> None:
        """Agree with all ranks, in a first pass, that none has failed and that all, or none, have ended the pass.

        Raises:
            FailedOnAllRanks: a rank has an error (this one's is the cause), or some have ended and others have not.
        """
        try:
            at_end, not_at_end = self.processes.all_reduce_error(error, float(ended), -float(ended))
        except (FailedOnAllRanks, CollectiveTimeout, *ENDS):
            raise
        except BaseException as own:
            failure = f"rank {self.processes.rank} failed: {described(own)}"
            raise FailedOnAllRanks(failure) from own
        if at_end != -not_at_end:
            raise FailedOnAllRanks("ranks do not gather the same modules in a forward pass")

    def gather(self, index: int, mine: Tensor, dtype: torch.dtype | None) -> list[Tensor]:
        """The whole tensors of a unit, in the order of its slots.

        Args:
            index: the unit's index.
            mine: its columns on this rank, flat.
            dtype: the dtype to compute in; None: each tensor's own.
        """
        slots = self.slots[index]
        own = {slot.dtype for slot in slots}
        sent = dtype or (own.pop() if len(own) == 1 else torch.float32)
        flat = self._exchange("gather", index, mine.to(sent)).view(len(self._units[index].ranks), -1)
        found = []
        for slot, ranges in zip(slots, self._ranges[index], strict=True):
            shape = list(slot.shape)
            front = [shape.pop(slot.shard.dim)] if shape else []
            whole = torch.cat([values[range_] for values, range_ in zip(flat, ranges, strict=True)])
            whole = whole.view(*front, *shape)
            found.append((whole.movedim(0, slot.shard.dim) if front else whole).to(dtype or slot.dtype))
        return found

    def scatter(self, index: int, gradients: Sequence[Tensor | None], mine: Tensor) -> Tensor:
        """This rank's columns, like ``mine``, of the gradients of a unit's whole tensors, summed over ranks."""
        flat = torch.zeros(len(self._units[index].ranks), self._longest[index], device=mine.device)
        for slot, gradient, ranges in zip(self.slots[index], gradients, self._ranges[index], strict=True):
            if gradient is None:
                continue
            moved = gradient.movedim(slot.shard.dim, 0) if slot.shape else gradient
            shards = moved.reshape(-1).split([columns.stop - columns.start for columns in ranges])
            for target, columns, values in zip(flat, ranges, shards, strict=True):
                target[columns].copy_(values)
        return self._exchange("scatter", index, flat.view(-1))[: len(mine)]

    def _exchange(self, kind: str, index: int, values: Tensor) -> Tensor:
        """Do one collective of a unit and record it.

        With ``n`` ranks and padded length ``longest``, "gather" turns this rank's columns into a flat tensor of
        ``n * longest`` numbers, and "scatter" such a tensor into ``longest`` numbers summed over ranks.
        """
        ranks, longest = self._units[index].ranks, self._longest[index]
        # Allocate before the collective, so that this rank cannot fail for want of memory while others wait in it.
        one, all_ = values.new_zeros(longest), values
        if kind == "gather":
            all_ = values.new_empty(longest * len(ranks))
            one[: len(values)].copy_(values)
        if self._expected is None:
            self._in_step(None, ended=False)
        if len(ranks) > 1:
            if kind == "gather":
                all_gather_into(all_, one, self._groups[ranks], self.processes.timeout)
            else:
                reduce_scatter_sum(one, all_, self._groups[ranks], self.processes.timeout)
        self._done.append(_Collective(kind, index, values.dtype, values.device))
        if len(ranks) == 1:
            return values
        return all_ if kind == "gather" else one

    def _replay(self, collective: _Collective) -> None:
        """Take part in a recorded collective with zeros."""
        longest = self._longest[collective.index]
        columns = 0 if collective.kind == "gather" else longest * len(self._units[collective.index].ranks)
        values = torch.zeros(columns, dtype=collective.dtype, device=collective.device)
        self._exchange(collective.kind, collective.index, values)


class _Gathered(torch.autograd.Function):
    """Gathers a unit's tensors from this rank's columns; its backward scatters their gradients to columns."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, units: Units, index: int, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.units, ctx.index, ctx.mine = units, index, mine.detach()
        return tuple(units.gather(index, mine, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return ctx.units.scatter(ctx.index, gradients, ctx.mine), None, None, None


def _without_fsdp(hooks: Any) -> Any:
    """A module's hooks without those of FSDP, which gather and free its live parameters."""
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


def _ranges(numels: np.ndarray) -> list[list[slice]]:
    """Where each tensor lies in each rank's columns of a unit, from counts of shape ``(ranks, tensors)``."""
    ends = numels.cumsum(axis=1)
    pairs = zip((ends - numels).T.tolist(), ends.T.tolist(), strict=True)
    return [[slice(*ends) for ends in zip(first, last, strict=True)] for first, last in pairs]
