"""Gathering the parameters of FSDP modules, and scattering their gradients, in step with the other processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..distributed import CollectiveTimeout, Processes, all_gather_into, collective_timeout, reduce_scatter_sum
from ..pieces import is_known, make_known
from ..window.layout import ParameterLayout, unwrap
from ..window.sharding import Unit


@dataclass(frozen=True)
class _Exchange:
    kind: str
    index: int
    dtype: torch.dtype
    device: torch.device


class Units:
    """The units of a model, in the order in which they were found, and the exchanges that their passes need.

    A process whose pass fails halfway takes part, with nothing to give, in the exchanges of the rest of it, in the
    order that the first pass had; so the others end theirs, and learn of it then. In a first pass processes ask one
    another before each exchange.

    Args:
        model: the model; wrappers (compile, DDP) are looked through.
        layout: of this process's columns.
        processes: that train the model together.
    """

    def __init__(self, model: nn.Module, layout: ParameterLayout, processes: Processes) -> None:
        self._units: list[Unit] = layout.sharding.units
        self.processes = processes
        # Every process is in as many groups, which stand in the same order.
        all_ranks = dict.fromkeys(unit.ranks for unit in self._units if len(unit.ranks) > 1)
        self._groups = {ranks: processes.subgroup(ranks) for ranks in all_ranks}
        counts = processes.all_gather_array(np.array([slot.numel for slot in layout.slots])).astype(int)
        tensors = layout.tensors(unwrap(model))
        places = [[n for n, slot in enumerate(layout.slots) if slot.shard.unit == index] for index in range(len(self))]
        self.slots = [[layout.slots[place] for place in chosen] for chosen in places]
        self.keys = [[id(tensors[place]) for place in chosen] for chosen in places]
        held = [counts[list(unit.ranks)][:, chosen] for unit, chosen in zip(self, places, strict=True)]
        self._ranges = [_ranges(numels) for numels in held]
        # Columns of a unit in the process that has most of them.
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
        """The columns of a unit that has slots, in this process's rows."""
        slots = self.slots[index]
        return slice(slots[0].offset, slots[-1].offset + slots[-1].numel)

    @contextmanager
    def one_pass(self, kind: str) -> Iterator[None]:
        """One pass through the model; passes of one kind gather and scatter the same units in the same order.

        Raises:
            FailedOnAllRanks: in a first pass, that another process failed.
        """
        self._expected, self._done = self._orders.get(kind), []
        error: Exception | None = None
        try:
            yield
        except CollectiveTimeout:
            raise
        except Exception as raised:
            error = raised
        if error is not None and is_known(error):
            raise error
        if self._expected is None:
            self._in_step(error, ended=True)
            self._orders[kind] = self._done
        else:
            # Also where a process had nothing to compute, because its batch has no targets.
            for exchange in self._expected[len(self._done) :]:
                self._take_part(exchange)
        if error is not None:
            raise error

    def _in_step(self, error: Exception | None, *, ended: bool) -> None:
        try:
            at_end, not_at_end = self.processes.all_reduce_error(error, float(ended), -float(ended))
            if at_end != -not_at_end:
                raise RuntimeError("processes do not gather the same modules in a forward pass")
        except BaseException as agreed:
            make_known(agreed)
            raise

    def gather(self, index: int, part: Tensor, dtype: torch.dtype | None) -> list[Tensor]:
        """The whole tensors of a unit.

        Args:
            index: of the unit.
            part: its columns in this process.
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
        """Gradients of a unit's tensors, summed over processes, as its columns in this process, like ``part``."""
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
        """Gather columns, as many times the longest as there are processes, or scatter so many."""
        ranks, longest = self._units[index].ranks, self._longest[index]
        # Before anything that others wait for: there may not be enough memory.
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

    def _take_part(self, exchange: _Exchange) -> None:
        """Be there for an exchange of the others."""
        longest = self._longest[exchange.index]
        columns = 0 if exchange.kind == "gather" else longest * len(self._units[exchange.index].ranks)
        values = torch.zeros(columns, dtype=exchange.dtype, device=exchange.device)
        self._exchange(exchange.kind, exchange.index, values)


def _ranges(numels: np.ndarray) -> list[list[slice]]:
    """For each tensor, which of each process's columns are its own; ``numels`` has shape ``(processes, tensors)``."""
    ends = numels.cumsum(axis=1)
    pairs = zip((ends - numels).T.tolist(), ends.T.tolist(), strict=True)
    return [[slice(*ends) for ends in zip(first, last, strict=True)] for first, last in pairs]
