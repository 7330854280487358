"""Which part of each tensor of a model the rows of this process hold.

One process holds everything. Under DDP, whose processes have the same weights, each process of a machine holds an equal
share of the columns. Under FSDP each process holds the shards that it trains. Tensors that no sharding covers are held
whole by every process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor, nn

from ..distributed import Processes


@dataclass(frozen=True)
class Shard:
    """The part of one tensor in this process's rows.

    The tensor is thought of with the sharded dimension in front, and then flat; parts are contiguous there.

    Args:
        shape: of the whole tensor.
        held: shape that the model's own tensor shows between steps.
        local: shape of the part, with the sharded dimension in front.
        start: where in the flat tensor the part begins.
        dim: the sharded dimension.
        copies: how many processes hold these numbers.
        unit: index of the unit that the tensor is gathered with; None if it is held whole, or gathered with the row.
    """

    shape: tuple[int, ...]
    held: tuple[int, ...]
    local: tuple[int, ...]
    start: int = 0
    dim: int = 0
    copies: int = 1
    unit: int | None = None


@dataclass
class Unit:
    """Parameters of an FSDP module that are gathered together for its forward pass.

    Args:
        module: the FSDP module.
        ranks: of the processes that hold shards of it.
        has_units: whether there are other units inside.
        places: where each parameter is, by its ``id``: a module and an attribute, several if it is tied.
    """

    module: nn.Module
    ranks: tuple[int, ...] = ()
    has_units: bool = False
    places: dict[int, list[tuple[nn.Module, str]]] = field(default_factory=dict)


class Sharding:
    """One process: everything is here.

    Args:
        processes: that train the model together.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.units: list[Unit] = []

    def shard(self, name: str, tensor: Tensor, is_parameter: bool) -> Shard:
        """Which part of a tensor is here."""
        shape = tuple(tensor.shape)
        return Shard(shape, shape, shape, copies=self.processes.size)

    def local(self, shard: Shard, tensor: Tensor) -> Tensor:
        """That part as it is now, in the memory of the live weights."""
        return tensor.detach()

    def reshard(self) -> None:
        """Bring live parameters into the state in which they are trained."""


class EqualShares(Sharding):
    """DDP: the processes of a machine divide the columns among themselves.

    Args:
        processes: that train the model together.
        columns: how many numbers the merged parameters have.
    """

    def __init__(self, processes: Processes, columns: int) -> None:
        super().__init__(processes)
        self.ranks = processes.local_ranks()
        if len(set(processes.all_gather_object(len(self.ranks)))) > 1:
            # Machines with unlike numbers of processes have no columns in common: each process holds all of them.
            self.ranks = [processes.rank]
        self.group = processes.subgroup(self.ranks)
        self.share = -(-columns // len(self.ranks))
        self._first = self.ranks.index(processes.rank) * self.share
        self._seen = 0

    def shard(self, name: str, tensor: Tensor, is_parameter: bool) -> Shard:
        """See :class:`Sharding`; called for one tensor after the other, in the order of the columns."""
        if not is_parameter:
            return super().shard(name, tensor, is_parameter)
        offset, self._seen = self._seen, self._seen + tensor.numel()
        first, last = (min(max(end - offset, 0), tensor.numel()) for end in (self._first, self._first + self.share))
        machines = self.processes.size // len(self.ranks)
        shape = tuple(tensor.shape)
        return Shard(shape, shape, (last - first,), first, copies=machines)

    def local(self, shard: Shard, tensor: Tensor) -> Tensor:
        """See :class:`Sharding`."""
        return tensor.detach().reshape(-1)[shard.start : shard.start + math.prod(shard.local)].view(shard.local)


class FullyShardedColumns(Sharding):
    """FSDP: parameters are sharded by torch, and rows hold the shards.

    Args:
        processes: that train the model together.
        model: the model, with ``fully_shard`` applied to it or wrapped in ``FullyShardedDataParallel``.

    Raises:
        ValueError: parameters that are sharded in a way that is not supported; the message says how, and what is.
    """

    def __init__(self, processes: Processes, model: nn.Module) -> None:
        super().__init__(processes)
        for module in model.modules():
            _reshard(module)
        self._unit_of: dict[int, int] = {}
        self._visited: set[int] = set()
        self._flat: dict[int, tuple[tuple[int, ...], int, int, tuple[int, ...]]] = {}
        self._walk(model, None)
        for unit in self.units:
            handle = getattr(unit.module, "_handle", None)
            if handle is not None:
                self._note_flat(unit, handle)

    def _walk(self, module: nn.Module, current: int | None) -> None:
        """Find the units, and which of them each parameter belongs to: that of the nearest FSDP module above."""
        if id(module) in self._visited:
            return
        self._visited.add(id(module))
        if is_fsdp(module):
            if current is not None:
                self.units[current].has_units = True
            current = len(self.units)
            self.units.append(Unit(module))
        for name, parameter in module._parameters.items():
            if parameter is None or current is None:
                continue
            known = self._unit_of.setdefault(id(parameter), current)
            if known != current:
                # Tied across units: it is there for as long as the outermost module computes.
                places = self.units[known].places.pop(id(parameter))
                self.units[0].places[id(parameter)] = places
                known = self._unit_of[id(parameter)] = 0
            self.units[known].places.setdefault(id(parameter), []).append((module, name))
        for child in module.children():
            self._walk(child, current)

    def _note_flat(self, unit: Unit, handle: object) -> None:
        """FSDP1: where this process's shard of a flat parameter lies in the original ones."""
        flat = handle.flat_param  # type: ignore[attr-defined]
        if not handle._use_orig_params:  # type: ignore[attr-defined]
            raise ValueError(
                "FSDP's flat parameters cannot be merged: construct FSDP with use_orig_params=True "
                "(Accelerate: fsdp_use_orig_params: true)"
            )
        if not handle.uses_sharded_strategy:  # type: ignore[attr-defined]
            return
        ranks = tuple(dist.get_process_group_ranks(handle.process_group))  # type: ignore[attr-defined]
        for parameter, shape, info in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
            start = info.intra_param_start_idx if info.in_shard else 0
            self._flat[id(parameter)] = (tuple(shape), start, info.numel_in_shard or 0, ranks)

    def shard(self, name: str, tensor: Tensor, is_parameter: bool) -> Shard:
        """See :class:`Sharding`."""
        unit = self._unit_of.get(id(tensor))
        if id(tensor) in self._flat:
            assert unit is not None
            shape, start, numel, ranks = self._flat[id(tensor)]
            self._join(unit, ranks, name)
            return Shard(shape, (numel,), (numel,), start, copies=self.processes.size // len(ranks), unit=unit)
        if not hasattr(tensor, "device_mesh"):
            return super().shard(name, tensor, is_parameter)
        return self._dtensor_shard(name, tensor, unit)

    def _dtensor_shard(self, name: str, tensor: Tensor, unit: int | None) -> Shard:
        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        shape = tuple(tensor.shape)
        sharded = [index for index, placement in enumerate(placements) if not placement.is_replicate()]
        known = all(type(placements[index]).__name__ == "Shard" for index in sharded)
        if unit is None or len(sharded) > 1 or not known:
            raise ValueError(
                f"parameter {name!r} is a DTensor with placements {placements}: tensor parallelism is not supported; "
                "shard with FSDP (fully_shard) over one dimension of the mesh, or with DDP"
            )
        copies = (
            self.processes.size
            // mesh.size()
            * math.prod(mesh.size(index) for index in range(mesh.ndim) if index not in sharded)
        )
        if not sharded:
            self._join(unit, (self.processes.rank,), name)
            return Shard(shape, shape, shape, copies=copies, unit=unit)
        group = mesh.get_group(sharded[0])
        dim, count, place = placements[sharded[0]].dim, mesh.size(sharded[0]), mesh.get_local_rank(sharded[0])
        local = tensor.to_local().movedim(dim, 0)  # type: ignore[attr-defined]
        first = min(place * -(-tensor.shape[dim] // count), tensor.shape[dim])
        self._join(unit, tuple(dist.get_process_group_ranks(group)), name)
        start = first * math.prod(local.shape[1:])
        return Shard(shape, shape, tuple(local.shape), start, dim, copies, unit)

    def _join(self, unit: int, ranks: tuple[int, ...], name: str) -> None:
        if self.units[unit].ranks not in ((), ranks):
            raise ValueError(f"parameter {name!r} is sharded over other processes than the rest of its FSDP module")
        self.units[unit].ranks = ranks

    def local(self, shard: Shard, tensor: Tensor) -> Tensor:
        """See :class:`Sharding`."""
        if hasattr(tensor, "to_local"):
            return tensor.detach().to_local().movedim(shard.dim, 0)  # type: ignore[attr-defined]
        return tensor.detach()

    def reshard(self) -> None:
        """Free whole parameters that a validation has left behind; the next forward pass gathers them again."""
        for unit in self.units:
            _reshard(unit.module)


def is_fsdp(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to a module, or it is a FullyShardedDataParallel."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return isinstance(module, (FSDPModule, FullyShardedDataParallel))


def has_fsdp(model: nn.Module) -> bool:
    """Whether a model's parameters, or some of them, are sharded by FSDP."""
    return any(is_fsdp(module) for module in model.modules())


def _reshard(module: nn.Module) -> None:
    if is_fsdp(module) and hasattr(module, "reshard"):  # FSDP1 does so by itself
        module.reshard()  # type: ignore[operator]


def find_sharding(model: nn.Module, processes: Processes, columns: int) -> Sharding:
    """How the rows of a model are divided among processes.

    Args:
        model: the model, without wrappers.
        processes: that train it together.
        columns: how many numbers its merged parameters have, where they are not sharded.

    Raises:
        ValueError: its parameters are sharded in a way that is not supported.
    """
    if has_fsdp(model):
        return FullyShardedColumns(processes, model)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ValueError(
                f"parameter {name!r} is partitioned by DeepSpeed ZeRO stage 3, which is not supported: "
                "use FSDP, or ZeRO stage 1 or 2"
            )
        if hasattr(parameter, "device_mesh"):
            raise ValueError(
                f"parameter {name!r} is a DTensor outside of FSDP: tensor parallelism is not supported; use FSDP "
                "(fully_shard) or DDP"
            )
    return EqualShares(processes, columns) if processes.size > 1 else Sharding(processes)
