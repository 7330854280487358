"""The ranks that train one model together: the collectives used here, and their single-process forms.

Every rank runs the same merge. What depends on time or on one machine's arithmetic is decided by rank 0 and broadcast.
What can fail on one rank alone is followed by an all-reduce of an error flag, so that all ranks go on or all give up.
"""

from __future__ import annotations

import atexit
import datetime
import pickle
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
# Process groups of some of the ranks, by the group of all ranks and by rank numbers.
_subgroups: dict[tuple[Any, tuple[int, ...]], Any] = {}
#: What asks for the end of a program. Everything else that is raised is a failure, also where a library derives it from
#: BaseException, as torch, Rust extensions (``PanicException``) and trio do: ``except ENDS: raise`` stands before
#: ``except BaseException`` wherever failures are caught.
ENDS = (KeyboardInterrupt, SystemExit, GeneratorExit)


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
        self._complete(dist.all_reduce, found, dist.ReduceOp.MAX)
        return found.tolist()

    def all_gather_array(self, values: np.ndarray) -> np.ndarray:
        """The float64 arrays of all ranks, which have the same shape, as ``(ranks, *shape)``."""
        return self._all_gather(torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))).numpy()

    def all_gather_object(self, value: T) -> list[T]:
        """The small objects of all ranks."""
        if self._group is None:
            return [value]
        mine = pickle.dumps(value)
        (longest,) = self.all_reduce_max(len(mine))
        # Shorter ones are padded; pickles know where they end.
        padded = torch.frombuffer(bytearray(mine.ljust(int(longest), b"\0")), dtype=torch.uint8)
        return [pickle.loads(one.numpy().tobytes()) for one in self._all_gather(padded)]

    def _all_gather(self, mine: Tensor) -> Tensor:
        if self._group is None:
            return mine[None]
        found = [torch.empty_like(mine) for _ in range(self.size)]
        self._complete(dist.all_gather, found, mine)
        return torch.stack(found)

    def _complete(self, collective: Callable[..., Any], *arguments: Any) -> None:
        _complete(collective, *arguments, group=self._group, timeout=self.timeout)

    def from_rank0(self, make: Callable[[], T]) -> T:
        """Call ``make`` on rank 0 and broadcast what it returns.

        Raises:
            BaseException: on rank 0 what ``make`` raised.
            FailedOnAllRanks: on the other ranks, that it did.
        """
        if self._group is None:
            return make()
        made: tuple[Any, str | None] = (None, None)
        error: BaseException | None = None
        if self.is_rank_zero:
            try:
                made = make(), None
            except BaseException as raised:
                error, made = raised, (None, described(raised))
        try:
            value, failure = self.all_gather_object(made)[0]
        except CollectiveTimeout:
            if isinstance(error, ENDS):
                raise error from None
            raise
        if error is not None:
            raise error
        if failure is not None:
            raise FailedOnAllRanks(f"rank 0 failed: {failure}")
        return value

    def all_reduce_error(self, error: BaseException | None, *values: float) -> list[float]:
        """The largest of each value over all ranks, if no rank has an error.

        Raises:
            BaseException: on the ranks that have one, their own error.
            FailedOnAllRanks: on the others.
            CollectiveTimeout: a rank does not answer, and this one is not about to end.
        """
        if self._group is None or isinstance(error, CollectiveTimeout):
            if error is not None:
                raise error
            return list(values)
        try:
            failed, *found = self.all_reduce_max(float(error is not None), *values)
        except CollectiveTimeout:
            if isinstance(error, ENDS):
                raise error from None
            raise
        if not failed:
            return found
        texts = self.all_gather_object(None if error is None else described(error))
        if error is not None:
            raise error
        failures = [f"rank {rank} failed: {text}" for rank, text in enumerate(texts) if text is not None]
        raise FailedOnAllRanks("; ".join(failures[:3]))

    @contextmanager
    def raise_on_all(self) -> Iterator[None]:
        """Run a block that contains no collective; afterwards every rank continues, or every rank raises."""
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:
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
        """Leave the group of all ranks, and destroy it if nothing failed in it."""
        if self._group is not None and dist.is_initialized() and self._group not in _failed_groups():
            dist.destroy_process_group(self._group)
        self._group = None


def all_gather_into(out: Tensor, part: Tensor, group: Any, timeout: float) -> None:
    """Fill ``out`` with the ``part`` of each rank of a group, all of one shape, in the order of the ranks.

    Raises:
        CollectiveTimeout: a rank does not answer within ``timeout`` seconds.
    """
    # Where there is a newer name the older one warns.
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    _complete(gather, out, part, group=group, timeout=timeout)


def reduce_scatter_sum(out: Tensor, whole: Tensor, group: Any, timeout: float) -> None:
    """Fill ``out`` with this rank's slice of the sum of ``whole`` over the ranks of a group.

    Raises:
        CollectiveTimeout: a rank does not answer within ``timeout`` seconds.
    """
    scatter = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
    _complete(scatter, out, whole, group=group, timeout=timeout)


def _complete(collective: Callable[..., Any], *arguments: Any, group: Any, timeout: float) -> None:
    """Do a collective, and turn what it raises into :class:`CollectiveTimeout`."""
    work, began = None, time.monotonic()
    try:
        work = collective(*arguments, group=group, async_op=True)
        if work is not None:
            work.wait()
    except RuntimeError as error:
        _failed.append(_Failed(group, work, began + timeout))
        raise CollectiveTimeout(
            f"a rank failed, ended, or did not answer within {timeout:g} s (process_timeout): {error}"
        ) from error


class _Failed(NamedTuple):
    """A collective that failed: threads of torch may still be at work on it, until its time is over."""

    group: Any
    work: Any
    over: float  # on time.monotonic


# Neither these operations nor their groups are given up before the program ends.
_failed: list[_Failed] = []


def _failed_groups() -> list[Any]:
    return [failed.group for failed in _failed]


@atexit.register
def _wait_for_failed() -> None:
    """Let operations end: one that ends while Python does aborts the process, when it frees its tensors."""
    for failed in _failed:
        while failed.work is not None and not failed.work.is_completed() and time.monotonic() < failed.over:
            time.sleep(0.01)


def several_ranks() -> bool:
    """Whether ``torch.distributed`` is initialized with more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def described(error: BaseException) -> str:
    """An exception's type and text in one line; without the text of one that cannot tell it."""
    name = type(error).__name__
    try:
        return f"{name}: {error}"
    except Exception as raised:
        return f"{name} (whose text cannot be had: {type(raised).__name__})"
