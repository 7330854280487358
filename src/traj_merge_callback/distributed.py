"""The ranks that train one model together: the collectives used here, and their single-process forms.

Every rank runs the same merge. What depends on time or on one machine's arithmetic is decided by rank 0 and broadcast.
What can fail on one rank alone is followed by an all-reduce of an error flag, so that all ranks go on or all give up.
"""

from __future__ import annotations

import datetime
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
# Process groups of some of the ranks, by the group of all ranks and by rank numbers.
_subgroups: dict[tuple[Any, tuple[int, ...]], Any] = {}


class FailedOnAllRanks(RuntimeError):
    """One rank failed, and every rank knows: all give up the same work, and no collective is left waiting."""


class CollectiveTimeout(RuntimeError):
    """A rank did not take part in a collective in time: the ranks cannot merge together any more."""


class Processes:
    """All ranks of a run, with a gloo group of their own: training's collectives are never mixed with these.

    Every rank constructs one, at the same place in its program. Where ``torch.distributed`` is not initialized, or has
    one rank, there is no group, and every method returns at once.

    Args:
        timeout: seconds that a collective may take.
        alone: this process works for itself, whatever other ranks there are.
    """

    def __init__(self, timeout: float = 600.0, *, alone: bool = False) -> None:
        self.timeout = timeout
        self._group: Any = None  # of all ranks
        self.rank, self.size = 0, 1
        if not alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self._group = dist.new_group(timeout=datetime.timedelta(seconds=timeout), backend="gloo")

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is the rank that decides, logs, and writes what is written once."""
        return self.rank == 0

    # Collectives over all ranks

    def all_reduce_max(self, *values: float) -> list[float]:
        """The largest of each value over all ranks."""
        if self._group is None:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64)
        with collective_timeout(self.timeout):
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group)
        return found.tolist()

    def all_gather_array(self, values: np.ndarray) -> np.ndarray:
        """The float64 arrays of all ranks, which have the same shape, as ``(ranks, *shape)``."""
        mine = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))
        if self._group is None:
            return mine[None].numpy()
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with collective_timeout(self.timeout):
            dist.all_gather(found, mine, group=self._group)
        return torch.stack(found).numpy()

    def all_gather_object(self, value: T) -> list[T]:
        """The small objects of all ranks."""
        found: list[Any] = [value]
        if self._group is not None:
            found = [None] * self.size
            with collective_timeout(self.timeout):
                dist.all_gather_object(found, value, group=self._group)
        return found

    def from_rank0(self, make: Callable[[], T]) -> T:
        """Call ``make`` on rank 0 and broadcast what it returns.

        Raises:
            Exception: on rank 0 what ``make`` raised.
            FailedOnAllRanks: on the other ranks, that it did.
        """
        if self._group is None:
            return make()
        made: list[Any] = [None, None]
        error: Exception | None = None
        if self.is_rank_zero:
            try:
                made[0] = make()
            except Exception as raised:
                error, made[1] = raised, _described(raised)
        with collective_timeout(self.timeout):
            dist.broadcast_object_list(made, src=0, group=self._group)
        if error is not None:
            raise error
        if made[1] is not None:
            raise FailedOnAllRanks(f"rank 0 failed: {made[1]}")
        return made[0]

    def all_reduce_error(self, error: BaseException | None, *values: float) -> list[float]:
        """The largest of each value over all ranks, if no rank has an error.

        Raises:
            BaseException: on the ranks that have one, their own error.
            FailedOnAllRanks: on the others.
            CollectiveTimeout: a rank does not answer, and this one has no error of its own.
        """
        if self._group is None or isinstance(error, CollectiveTimeout):
            if error is not None:
                raise error
            return list(values)
        failed, *found = self.all_reduce_max(float(error is not None), *values)
        if not failed:
            return found
        described = self.all_gather_object(None if error is None else _described(error))
        if error is not None:
            raise error
        failures = [f"rank {rank} failed: {text}" for rank, text in enumerate(described) if text is not None]
        raise FailedOnAllRanks("; ".join(failures[:3]))

    @contextmanager
    def raise_on_all(self) -> Iterator[None]:
        """Run a block that contains no collective; afterwards every rank continues, or every rank raises."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        self.all_reduce_error(error)

    # Groups of some ranks

    def subgroup(self, ranks: Sequence[int]) -> Any:
        """A process group of some ranks, on training's own devices; these ranks call this, and no others have to.

        It stays for as long as the process lives: torch gives groups that are made this way the same name each time,
        and what a first one left in the store would confuse a second.
        """
        key = (dist.group.WORLD, tuple(ranks))
        if key not in _subgroups:
            limit = datetime.timedelta(seconds=self.timeout)
            _subgroups[key] = dist.new_group(list(ranks), timeout=limit, use_local_synchronization=True)
        return _subgroups[key]

    def local_ranks(self) -> list[int]:
        """The ranks on this machine."""
        hosts = self.all_gather_object(socket.gethostname())
        return [rank for rank, host in enumerate(hosts) if host == hosts[self.rank]]

    def close(self) -> None:
        """Destroy the group of all ranks; a rank that still waits in it gets an error."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None


@contextmanager
def collective_timeout(timeout: float) -> Iterator[None]:
    """Turn what a collective raises into :class:`CollectiveTimeout`."""
    try:
        yield
    except RuntimeError as error:
        raise CollectiveTimeout(
            f"a rank failed, ended, or did not answer within {timeout:g} s (process_timeout): {error}"
        ) from error


def all_gather_into(out: Tensor, part: Tensor, group: Any) -> None:
    """Fill ``out`` with the ``part`` of each rank of a group, all of one shape, in the order of the ranks."""
    # Where there is a newer name the older one warns.
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    gather(out, part, group=group)


def reduce_scatter_sum(out: Tensor, whole: Tensor, group: Any) -> None:
    """Fill ``out`` with this rank's slice of the sum of ``whole`` over the ranks of a group."""
    scatter = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
    scatter(out, whole, group=group)


def several_ranks() -> bool:
    """Whether ``torch.distributed`` is initialized with more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
