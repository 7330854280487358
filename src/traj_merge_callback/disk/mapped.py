"""Rows in files that are mapped into memory (``window_storage="disk"``)."""

from __future__ import annotations

import errno
import math
import os
import shutil
import socket
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..distributed import Processes
from ..window.memory import NoRoom, in_bytes, what_fits
from ..window.storage import DTYPES, Allocate, rows_nbytes

# What systems answer that cannot reserve space in a file system.
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)


def on_disk(folder: Path, processes: Processes) -> Allocate:
    """Rows in a folder's file system, mapped into memory: the system keeps in RAM what fits; a collective.

    Their files have no names: no other rank, run or container can write to them, and their space is free again however
    this process ends. Their space is reserved before they are mapped, because a write to mapped memory that finds the
    disk full kills the process.

    Raises:
        OSError: the folder cannot be written to.
    """
    with processes.raise_on_all():
        folder.mkdir(parents=True, exist_ok=True)
        place = (socket.gethostname(), folder.stat().st_dev)
        free = shutil.disk_usage(folder).free
    # Here all ranks know what is free, and none has taken any of it.
    return _OnDisk(folder, free, processes.all_gather_object(place).count(place))


def unnamed(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in a file without a name, mapped into memory.

    Raises:
        OSError: the folder's file system has too little space, or cannot be written to.
    """
    size, free = math.prod(shape) * dtype.itemsize, shutil.disk_usage(folder).free
    try:
        return _mapped(folder, shape, dtype, fits=size <= free)
    except OSError as error:
        text = f"{in_bytes(size)} are needed in {folder}, and {in_bytes(free)} are free; TMPDIR names another folder"
        raise OSError(error.errno, f"{error.strerror}: {text}") from error


def _mapped(folder: Path, shape: tuple[int, ...], dtype: torch.dtype, *, fits: bool) -> Tensor:
    """A tensor in a file without a name, whose space is reserved, where the system can do that.

    Args:
        folder: on whose file system.
        shape, dtype: of the tensor.
        fits: whether there is enough space by what the file system says, for systems that cannot reserve it.
    """
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _UNSUPPORTED:
                raise
            if not fits:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            os.truncate(file.fileno(), size)
        mapped = np.memmap(file, dtype=np.uint8, mode="r+", shape=(size,))
    return torch.from_numpy(mapped).view(dtype).view(shape)


class _OnDisk:
    """Allocates one window's rows.

    Args:
        folder: on whose file system.
        free: bytes free there.
        ranks: how many ranks share them.
    """

    def __init__(self, folder: Path, free: int, ranks: int) -> None:
        self._folder = folder
        self._free = free
        self._ranks = ranks
        self._rows: tuple[int, int, str] | None = None  # how many, of how many numbers, of which dtype

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor in a file of its own.

        Raises:
            NoRoom: there is too little space for all rows, with the numbers.
        """
        if self._rows is None:  # the first tensor is that of the rows, and others belong to it
            kind = next(kind for kind, known in DTYPES.items() if known is dtype)
            self._rows = (shape[0], shape[1], kind)
            if rows_nbytes(*self._rows) > self._free:
                raise self._no_space(errno.ENOSPC)
        try:
            fits = rows_nbytes(*self._rows) <= self._free // self._ranks
            return _mapped(self._folder, shape, dtype, fits=fits)
        except OSError as error:
            raise self._no_space(error.errno or errno.ENOSPC) from error

    def _no_space(self, number: int) -> NoRoom:
        assert self._rows is not None
        (count, numel, dtype), share = self._rows, self._free // self._ranks
        fits = what_fits(lambda rows, kind: rows_nbytes(rows, numel, kind), count, dtype, share)
        ranks = f" for each of {self._ranks} ranks" if self._ranks > 1 else ""
        return NoRoom(
            number,
            f"{os.strerror(number)}: window_storage='disk' needs {in_bytes(rows_nbytes(count, numel, dtype))}{ranks} "
            f"for {count} rows of {dtype}, and {in_bytes(self._free)} are free in {self._folder}; "
            + (f"what would fit: {' or '.join(fits)}, or " if fits else "")
            + "an output_dir with more space",
        )
