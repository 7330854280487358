"""Free memory, looked at before a window takes it, and what to do where memory has run out all the same."""

from __future__ import annotations

import functools
import math
import re
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from ..distributed import Processes, described
from . import devices
from .storage import Allocate, Ring, in_memory

_ROOT = Path("/")
# Of control groups, version 2 (which has no name) and 1: where they are, their files, the prefix in memory.stat.
_GROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", ""),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}
# Allocators and libraries have classes of their own for this, or none.
_RAN_OUT = re.compile(r"MemoryError|out of memory|not enough memory|allocate memory|ALLOC_FAILED", re.IGNORECASE)


class NoRoom(OSError):
    """A window does not fit into memory or on a disk. The message has the numbers, and says what would fit."""


def free_memory(device: torch.device) -> tuple[float, float]:
    """Bytes of the CPU's or a GPU's memory that can be taken, and its bytes; infinite where that is not known.

    On Linux the least of what the machine has and of what its control groups (containers, job schedulers) leave.
    """
    if device.type != "cpu":
        return devices.free_memory(device)
    try:
        lines = (_ROOT / "proc/meminfo").read_text().splitlines()
        groups = (_ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf, math.inf
    kilobytes = {name: float(number.split()[0]) for name, _, number in (line.partition(":") for line in lines)}
    found = [(1024 * kilobytes["MemAvailable"], 1024 * kilobytes["MemTotal"])]
    for line in groups:
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            found += _left_by_groups(controller, path) if controller in _GROUPS else []
    return min(free for free, _ in found), min(total for _, total in found)


def _left_by_groups(controller: str, path: str) -> list[tuple[float, float]]:
    """What a control group and those above it leave; in a container their folders may have other paths."""
    mount, limit, used, prefix = _GROUPS[controller]
    found = []
    for folder in (_ROOT / mount / path.lstrip("/"), *(_ROOT / mount / path.lstrip("/")).parents):
        if not folder.is_relative_to(_ROOT / mount):
            break
        try:
            total = float((folder / limit).read_text())
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # Pages of files that were read count as used, and are given up for whoever needs them.
            files = sum(float(counts[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))
            found.append((total - float((folder / used).read_text()) + files, total))
        except (OSError, ValueError, KeyError):  # no such group, or "max", or no such count
            continue
    return found


def check_free(nbytes: int, what: str) -> None:
    """Check that there is CPU memory for so many bytes, beside what is left to training.

    Raises:
        NoRoom: there is not.
    """
    free, total = free_memory(torch.device("cpu"))
    if nbytes + devices.ROOM * total > free:
        raise NoRoom(
            f"{what} takes {in_bytes(nbytes)} of memory; {in_bytes(free)} are free, {in_bytes(devices.ROOM * total)} "
            "of which are left to training"
        )


def in_bytes(count: float) -> str:
    """A number of bytes for a message."""
    if count >= 1e12:
        return f"{count / 1e9:.0f} GB"
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def what_fits(nbytes: Callable[[int, str], int], count: int, dtype: str, room: float) -> list[str]:
    """The options with which a window would fit into so many bytes.

    Args:
        nbytes: what so many rows of a dtype take there.
        count, dtype: of the window that does not fit.
        room: bytes.
    """

    def most(kind: str) -> int:
        beside, one = (nbytes(rows, kind) for rows in (0, 1))
        return int((room - beside) // (one - beside)) if one > beside else 0

    rows, smaller = min(most(dtype), count - 1), 0 if dtype == "int8" else most("int8")
    found = ["dtype='int8'"] if smaller >= count else []
    found += [f"window_size={rows}"] if rows >= 2 else []
    if not found and smaller >= 2:
        found = [f"dtype='int8' with window_size={smaller}"]
    return found


class _Place(NamedTuple):
    """Memory that a window takes, and who takes of the same: a machine, and of its GPUs each rank has its own."""

    machine: str
    owner: int
    nbytes: int


def check_room(
    make: Callable[[int, str, Allocate, Allocate], Ring],
    count: int,
    dtype: str,
    processes: Processes,
    *,
    rows_on: torch.device | None,
    disk_free: float,
) -> None:
    """Whether there is memory for a window, with those of all ranks of a machine, before any is taken; a collective.

    Args:
        make: from a number of rows, their dtype, and where they and what is beside them are kept.
        count, dtype: of the rows.
        processes: the ranks.
        rows_on: the device whose memory they take; None: none. What is beside them is in CPU memory.
        disk_free: bytes free on a disk that rows could be kept on instead.

    Raises:
        NoRoom: on all ranks, if it does not fit on one of them.
    """
    cpu = torch.device("cpu")
    for device in dict.fromkeys((cpu, rows_on or cpu)):
        nbytes = functools.partial(_nbytes, make, device, rows_on)
        owner = processes.rank if device.type == "cuda" else -1
        mine = _Place(socket.gethostname(), owner, nbytes(count, dtype))
        (free, total), all_places = free_memory(device), processes.all_gather_object(mine)
        shared = [place.nbytes for place in all_places if place[:2] == mine[:2]]
        left = devices.ROOM * total
        with refused_on_all(processes, count):
            if sum(shared) + left > free:
                ranks, name = len(shared), "memory" if device == cpu else str(device)
                fits = what_fits(nbytes, count, dtype, (free - left) / ranks)
                if device == rows_on and ranks * (mine.nbytes - nbytes(0, dtype)) <= disk_free:
                    fits.append("window_storage='disk'")
                beside = ", with what is kept beside them," if device == cpu else ""
                together = f" in {ranks} ranks" if ranks > 1 else ""
                raise NoRoom(
                    f"window_size={count}: {count} rows of {dtype}{beside} take {in_bytes(sum(shared))} of {name}"
                    f"{together}; {in_bytes(free)} are free, {in_bytes(left)} of which are left to training; "
                    + (f"what would fit: {' or '.join(fits)}" if fits else "no window of this model would fit")
                )


def _nbytes(
    make: Callable[[int, str, Allocate, Allocate], Ring],
    device: torch.device,
    rows_on: torch.device | None,
    count: int,
    dtype: str,
) -> int:
    """Bytes that a window takes of a device's memory."""
    nowhere = in_memory(device=torch.device("meta"))
    ring = make(count, dtype, nowhere, nowhere)
    rows = ring.rows.nbytes
    return (rows if device == rows_on else 0) + (ring.nbytes - rows if device.type == "cpu" else 0)


@contextmanager
def refused_on_all(processes: Processes, count: int) -> Iterator[None]:
    """Run a block that contains no collective; if memory for ``count`` rows lacks on one rank, all raise the same.

    Raises:
        NoRoom: there is no room on this rank or on another.
    """
    refusal: NoRoom | None = None
    with processes.raise_on_all():
        try:
            yield
        except NoRoom as error:
            refusal = error
        except Exception as error:
            if not ran_out(error):
                raise
            refusal = NoRoom(f"window_size={count}: the memory could not be taken ({described(error)})")
    said = processes.all_gather_object(None if refusal is None else str(refusal))
    for text in said:
        if text is not None:
            raise NoRoom(text)


def ran_out(error: BaseException) -> bool:
    """Whether an exception, or one that caused it, says that memory ran out."""
    while not _RAN_OUT.search(described(error)):
        if error.__cause__ is None:
            return False
        error = error.__cause__
    return True


def let_go(error: BaseException | None) -> None:
    """Free what the functions still hold that an exception has left.

    They hold their exception and it holds them: without this tensors stay until the garbage collector finds the cycle.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
