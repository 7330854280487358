"""Which columns of the window this rank holds: its shard of each tensor of the model.

A single rank holds every column (:class:`Sharding`). Under DDP, where all ranks have the same weights, the ranks of a
machine hold equal shares of the columns (:class:`EqualShares`). Under FSDP each rank holds the shards that it trains
(:class:`FullyShardedColumns`). Buffers, and parameters that are not sharded, are held whole by every rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor, nn

from ..distributed import Processes


@dataclass(frozen=True)
class Shard:
    """The range of one tensor's numbers that this rank's rows hold.

    The range is one of the *flat tensor*: the tensor with its sharded dimension moved to the front, flattened.

    Args:
        shape: of the whole tensor.
        held: shape of the model's own tensor between steps (under FSDP1, of its flat shard).
        local: shape of the shard, with the sharded dimension in front.
        start: where the shard begins in the flat tensor.
        dim: the sharded dimension.
        copies: how many ranks hold these numbers.
        unit: index in ``Sharding.units`` of the FSDP unit that gathers the tensor; None without FSDP, or if it is held
            whole.
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
    """An FSDP unit: an FSDP module and the parameters that are gathered together for its forward pass.

    Args:
        module: the FSDP module.
        ranks: that hold shards of it.
        has_units: whether other units are inside it.
        places: by each parameter's ``id``, the module and attribute where it is; several if it is tied.
    """

    module: nn.Module
    ranks: tuple[int, ...] = ()
    has_units: bool = False
    places: dict[int, list[tuple[nn.Module, str]]] = field(default_factory=dict)


class Sharding:
    """A single rank, which holds every column.

    Args:
        processes: the ranks that train the model together.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.units: list[Unit] = []

    def shard(self, name: str, tensor: Tensor, is_parameter: bool) -> Shard:
        """This rank's shard of a tensor.

        Args:
            name: of the tensor, for errors.
            tensor: the model's own.
            is_parameter: whether it is a parameter, and no buffer.

        Raises:
            ValueError: it is sharded in a way that is not supported.
        """
        shape = tuple(tensor.shape)
        return Shard(shape, shape, shape, copies=self.processes.size)

    def local(self, shard: Shard, tensor: Tensor) -> Tensor:
        """The live weights of a shard, in their own memory, in the shape ``shard.local``."""
        return tensor.detach()

    def reshard(self) -> None:
        """Make the model's parameters shards again, as they are between steps."""


class EqualShares(Sharding):
    """DDP: each rank of a machine holds an equal share of the parameters' columns.

    Args:
        processes: the ranks that train the model together.
        numel: how many numbers the merged parameters have.
    """

    def __init__(self, processes: Processes, numel: int) -> None:
        super().__init__(processes)
        self.ranks = processes.local_ranks()
        if len(set(processes.all_gather_object(len(self.ranks)))) > 1:
            # Machines with unlike numbers of ranks would have unlike shares: each rank holds all columns instead.
            self.ranks = [processes.rank]
        self.group = processes.subgroup(self.ranks)
        self.share = -(-numel // len(self.ranks))
        self._first = self.ranks.index(processes.rank) * self.share
        self._seen = 0  # columns of the parameters that were sharded so far

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
    """FSDP: rows hold the shards that torch has made.

    Args:
        processes: the ranks that train the model together.
        model: the model, with ``fully_shard`` applied to it or wrapped in ``FullyShardedDataParallel``.

    Raises:
        ValueError: parameters are sharded in a way that is not supported; the message says how, and what is.
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
        """Find the units, and each parameter's: that of the nearest FSDP module above it."""
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
                # A parameter tied across units is gathered by the outermost one, for the whole forward pass.
                places = self.units[known].places.pop(id(parameter))
                self.units[0].places[id(parameter)] = places
                known = self._unit_of[id(parameter)] = 0
            self.units[known].places.setdefault(id(parameter), []).append((module, name))
        for child in module.children():
            self._walk(child, current)

    def _note_flat(self, unit: Unit, handle: object) -> None:
        """FSDP1: which range of each original parameter this rank's shard of the flat parameter covers."""
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
        dim, count, rank = placements[sharded[0]].dim, mesh.size(sharded[0]), mesh.get_local_rank(sharded[0])
        local = tensor.to_local().movedim(dim, 0)  # type: ignore[attr-defined]
        first = min(rank * -(-tensor.shape[dim] // count), tensor.shape[dim])
        self._join(unit, tuple(dist.get_process_group_ranks(group)), name)
        start = first * math.prod(local.shape[1:])
        return Shard(shape, shape, tuple(local.shape), start, dim, copies, unit)

    def _join(self, unit: int, ranks: tuple[int, ...], name: str) -> None:
        """Note which ranks hold shards of a unit; all of its parameters must agree."""
        if self.units[unit].ranks not in ((), ranks):
            raise ValueError(f"parameter {name!r} is sharded over other ranks than the rest of its FSDP module")
        self.units[unit].ranks = ranks

    def local(self, shard: Shard, tensor: Tensor) -> Tensor:
        """See :class:`Sharding`."""
        if hasattr(tensor, "to_local"):
            return tensor.detach().to_local().movedim(shard.dim, 0)  # type: ignore[attr-defined]
        return tensor.detach()

    def reshard(self) -> None:
        """Free parameters that FSDP2 left gathered after a validation; the next forward pass gathers them again."""
        for unit in self.units:
            _reshard(unit.module)


def is_fsdp(module: nn.Module) -> bool:
    """Whether a module is an FSDP unit: ``fully_shard`` was applied to it, or it is a FullyShardedDataParallel."""
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


def find_sharding(model: nn.Module, processes: Processes, numel: int) -> Sharding:
    """The sharding of a model's columns, by how it is trained.

    Args:
        model: the model, without wrappers.
        processes: the ranks that train it together.
        numel: how many numbers its merged parameters have; only used where they are not sharded.

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
    return EqualShares(processes, numel) if processes.size > 1 else Sharding(processes)
