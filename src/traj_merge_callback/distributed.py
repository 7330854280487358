"""The processes that train one model together: the few collectives used, and their single-process forms.

Every process runs the same merge. What depends on time or on one machine's arithmetic is decided once, by the first
process; what can fail on one process alone is followed by an exchange, so that all go on or all give up.
"""

from __future__ import annotations

import datetime
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
# Groups of some processes, by all processes and their ranks.
_subgroups: dict[tuple[Any, tuple[int, ...]], Any] = {}


class FailedOnAllRanks(RuntimeError):
    """Another process failed at what all of them were doing; nothing is out of step."""


class CollectiveTimeout(RuntimeError):
    """Processes no longer answer one another in time; they cannot merge together any more."""


class Processes:
    """All processes of a run, with a gloo group of their own: training's collectives are never mixed with these.

    Every process of the run constructs one, at the same place in its program. Where ``torch.distributed`` is not
    initialized, or has one process, there is no group, and nothing is ever waited for.

    Args:
        timeout: seconds that processes wait for one another.
        alone: this process works for itself, whatever others there are.
    """

    def __init__(self, timeout: float = 600.0, *, alone: bool = False) -> None:
        self.timeout = timeout
        self._group: Any = None  # of all processes
        self.rank, self.size = 0, 1
        if not alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self._group = dist.new_group(timeout=datetime.timedelta(seconds=timeout), backend="gloo")

    @property
    def group(self) -> Any:
        """The group of all processes; None where there is one process."""
        return self._group

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process decides, logs and writes what is written once."""
        return self.rank == 0

    # What all tell each other

    def all_reduce_max(self, *values: float) -> list[float]:
        """The largest of each value over all processes."""
        if self._group is None:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64)
        with self._timeout():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group)
        return found.tolist()

    def all_gather_array(self, values: np.ndarray) -> np.ndarray:
        """The float64 arrays of all processes, which have the same shape, as ``(processes, *shape)``."""
        mine = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))
        if self._group is None:
            return mine[None].numpy()
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with self._timeout():
            dist.all_gather(found, mine, group=self._group)
        return torch.stack(found).numpy()

    def all_gather_object(self, value: T) -> list[T]:
        """The small objects of all processes."""
        found: list[Any] = [value]
        if self._group is not None:
            found = [None] * self.size
            with self._timeout():
                dist.all_gather_object(found, value, group=self._group)
        return found

    def from_rank0(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in the first process, in all of them.

        Raises:
            Exception: in the first process what ``make`` raised.
            FailedOnAllRanks: in the others, that it did.
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
        with self._timeout():
            dist.broadcast_object_list(made, src=0, group=self._group)
        if error is not None:
            raise error
        if made[1] is not None:
            raise FailedOnAllRanks(f"process 0 failed: {made[1]}")
        return made[0]

    def all_reduce_error(self, error: BaseException | None, *values: float) -> list[float]:
        """The largest of each value, if no process has an error.

        Raises:
            BaseException: in the processes that had one, their own error.
            FailedOnAllRanks: in the others.
            CollectiveTimeout: a process does not answer; an own error comes first.
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
        failures = [f"process {rank} failed: {text}" for rank, text in enumerate(described) if text is not None]
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

    # Groups of some

    def subgroup(self, ranks: Sequence[int]) -> Any:
        """A group of some processes, on training's own devices; all of them call this, and no others have to.

        It stays for as long as the process: torch gives groups that are made this way the same name each time, and what
        a first one left in the store would confuse the second.
        """
        key = (dist.group.WORLD, tuple(ranks))
        if key not in _subgroups:
            limit = datetime.timedelta(seconds=self.timeout)
            _subgroups[key] = dist.new_group(list(ranks), timeout=limit, use_local_synchronization=True)
        return _subgroups[key]

    def local_ranks(self) -> list[int]:
        """The ranks of the processes on this machine."""
        hosts = self.all_gather_object(socket.gethostname())
        return [rank for rank, host in enumerate(hosts) if host == hosts[self.rank]]

    def leads(self, folder: Path) -> bool:
        """Whether this process is the first of those that see the same ``folder``, which it then exists in.

        On a shared file system one process is, on disks of the machines' own one on each machine.
        """
        if self._group is None:
            return True
        name = self.from_rank0(lambda: f".tmp-probe-{uuid.uuid4().hex}")
        with self.raise_on_all():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}-{self.rank}").touch()
        try:
            with self.raise_on_all():
                # By name: a network file system may show an old list of the folder, but it looks up a new name.
                first = next(rank for rank in range(self.size) if (folder / f"{name}-{rank}").exists())
        finally:
            (folder / f"{name}-{self.rank}").unlink(missing_ok=True)
        return first == self.rank

    def close(self) -> None:
        """Give the group of all back; whoever still waits in it gets an error."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None

    @contextmanager
    def _timeout(self) -> Iterator[None]:
        with collective_timeout(self.timeout):
            yield


@contextmanager
def collective_timeout(timeout: float) -> Iterator[None]:
    """Let what a collective raises be an :class:`CollectiveTimeout`."""
    try:
        yield
    except RuntimeError as error:
        raise CollectiveTimeout(
            f"a process failed, ended, or did not answer within {timeout:g} s (process_timeout): {error}"
        ) from error


def all_gather_into(out: Tensor, part: Tensor, group: Any) -> None:
    """``out`` becomes the parts, all of one shape, of a group's processes, in their order."""
    # Where there is a newer name the older one warns.
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    gather(out, part, group=group)


def reduce_scatter_sum(out: Tensor, whole: Tensor, group: Any) -> None:
    """``out`` becomes this process's part of the sum of ``whole`` over a group's processes."""
    scatter = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
    scatter(out, whole, group=group)


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
