"""Writing files and folders so that each exists whole or not at all, and the thread that writes them."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..distributed import Processes
from ..window.devices import worker
from .checksums import checksums_of

T = TypeVar("T")
TEMPORARY = ".tmp-"
# A folder of ours holds one of these.
_DOCUMENTS = ("state.json", "merge.json", "traj-merge-figures.json")
logger = logging.getLogger("traj_merge_callback")


@contextmanager
def whole_folder(
    target: Path, temporary: Path | None = None, replaces: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` when the block ends well, and vanishes when it raises.

    A folder of ours that is already at ``target`` is replaced; it stays until the new one is complete on disk.

    Args:
        target: the folder.
        temporary: a folder that is there; by default one is made beside ``target``, and the parents of both.
        replaces: whether a folder of ours may be replaced; by default every one.
    """
    try:
        if temporary is None:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = temporary_path(target)  # known before it is there, should somebody interrupt just then
            temporary.mkdir()
        yield temporary
        for path in sorted(temporary.rglob("*")):
            if path.is_dir() or path.stat().st_nlink == 1:  # a file that another folder shares is on the disk already
                _flush(path)
        _flush(temporary)
        _make_way(target, replaces)
        _rename(temporary, target)
        _flush(target.parent)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def shared_folder(
    target: Path,
    processes: Processes,
    staging: Path | None = None,
    *,
    describe: Callable[[dict[str, str]], None],
    replaces: Callable[[Path], bool] | None = None,
) -> Iterator[Path]:
    """:func:`whole_folder` for several ranks: it becomes ``target`` when the block has ended well on all of them.

    Args:
        target: the folder, on a file system that all ranks share.
        processes: the ranks, all of which enter the block.
        staging: the temporary folder is made there, if all ranks see it, and not beside ``target``, whose parent may
            vanish at any time and is never made.
        describe: called on rank 0 when all ranks have written, with the checksum of every file by its name, to write
            the file that describes the others; what it raises stays without a target.
        replaces: see :func:`whole_folder`.

    Raises:
        OSError: the folder is not the same for all ranks, or ``staging`` is given and there is no parent any more.
        Exception: what went wrong here, or that something did on another rank.
    """
    before = target.parent.stat() if staging is not None and target.parent.is_dir() else None
    temporary = processes.from_rank0(lambda: _make_temporary(target, staging))
    if staging is not None and processes.all_reduce_max(float(not temporary.is_dir()))[0]:
        processes.from_rank0(lambda: remove_tree(temporary))
        temporary = processes.from_rank0(lambda: _make_temporary(target, target.parent))
    with ExitStack() as stack:
        if processes.is_rank_zero:
            stack.enter_context(whole_folder(target, temporary, replaces))
        with processes.raise_on_all():
            if not temporary.is_dir():
                raise OSError(
                    f"rank {processes.rank} does not see {target.parent}, where rank 0 writes: files of several ranks "
                    "need a folder on a file system that all ranks share"
                )
        with processes.raise_on_all():
            yield temporary
        with processes.raise_on_all():
            mine = checksums_of(temporary, processes.rank)
        checksums = {name: one for found in processes.all_gather_object(mine) for name, one in found.items()}
        processes.from_rank0(lambda: describe(checksums))

        def finish() -> None:
            stack.close()
            if before is not None:  # trainers remove their oldest checkpoints by these times
                os.utime(target.parent, ns=(before.st_atime_ns, before.st_mtime_ns))

        processes.from_rank0(finish)


def _make_temporary(target: Path, staging: Path | None = None) -> Path:
    """A new temporary folder for ``target``: in ``staging`` if it can be renamed from there, else beside it."""
    if staging is None:
        target.parent.mkdir(parents=True, exist_ok=True)
    elif staging != target.parent:
        with suppress(OSError):
            staging.mkdir(parents=True, exist_ok=True)
            if staging.stat().st_dev == target.parent.stat().st_dev:
                temporary = temporary_path(staging / target.name)
                temporary.mkdir()
                return temporary
    temporary = temporary_path(target)
    temporary.mkdir()
    return temporary


def _make_way(target: Path, replaces: Callable[[Path], bool] | None) -> None:
    """Remove what is at ``target`` if it is ours and may be replaced; what is not is given another name."""
    if not os.path.lexists(target):
        return
    ours = target.is_dir() and not target.is_symlink() and any((target / name).is_file() for name in _DOCUMENTS)
    if ours and (replaces is None or replaces(target)):
        remove_folder(target)
    else:
        level, whose = (logging.INFO, "of another run") if ours else (logging.WARNING, "not ours")
        logger.log(level, "%s was there and is %s; it is now %s", target, whose, set_aside(target))


def _rename(temporary: Path, target: Path) -> None:
    try:
        temporary.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # Containers may mount folders of one disk separately, and nothing is renamed from one mount to another.
        with whole_folder(target, _make_temporary(target, target.parent)) as copied:
            shutil.copytree(temporary, copied, dirs_exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_path(path: Path) -> Path:
    """A name beside ``path`` that nobody else has, also not in another container on the same disk."""
    return path.with_name(f"{TEMPORARY}{path.name}-{uuid.uuid4().hex}")


def write_tensors(path: Path, tensors: dict[str, Tensor], processes: Processes) -> None:
    """Write a rank's safetensors file into a :func:`shared_folder`."""
    save_file(tensors, path)
    if not processes.is_rank_zero:  # which flushes its own files before the folder becomes the target
        _flush(path)


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace the content of a file in one step, see :func:`clear_for_file`; text is written in UTF-8."""
    clear_for_file(path)
    temporary = temporary_path(path)
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        _flush(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def make_folder(path: Path) -> Path:
    """Make a folder, and those above it, if it is not there."""
    path.mkdir(parents=True, exist_ok=True)
    return path


def clear_for_file(path: Path) -> None:
    """Before a file of ours is written at ``path``: what is there and is no regular file is given another name.

    A link would lead the writing elsewhere, a pipe would wait for a reader, and a folder would fail it.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            logger.warning("%s was there and is no file of ours; it is now %s", path, set_aside(path))


def set_aside(path: Path) -> Path:
    """Give what is at ``path``, a link included, another name: ``metrics.1.jsonl`` for ``metrics.jsonl``."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.stem}.{number}{path.suffix}")):
        number += 1
    path.rename(aside)
    return aside


def set_aside_before(path: Path) -> list[Path]:
    """What has names now that :func:`set_aside` gives to what is at ``path``."""
    names = rf"{re.escape(path.stem)}\.\d+{re.escape(path.suffix)}"
    return [one for one in path.parent.glob("*") if re.fullmatch(names, one.name)]


def remove_folder(path: Path) -> None:
    """Remove a folder; a reader, or a process killed halfway, never sees it with files missing."""
    doomed = temporary_path(path)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_tree(path: Path) -> None:
    """Remove a folder that nobody reads any more, if it is there."""
    shutil.rmtree(path, ignore_errors=True)


def check_space(path: Path, nbytes: int) -> None:
    """Check that so many bytes may be written at a path that is yet to be made.

    Raises:
        OSError: its file system has too little space, with the numbers.
    """
    there = next(folder for folder in path.absolute().parents if folder.is_dir())
    if (free := shutil.disk_usage(there).free) < nbytes:
        raise OSError(
            errno.ENOSPC, f"{path} needs {nbytes / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free: name another folder"
        )


def point_link(link: Path, target_name: str) -> None:
    """Let the symbolic link ``link`` point to its neighbour ``target_name``, in one step.

    Raises:
        OSError: the file system has no links, or something else is there.
    """
    if os.path.lexists(link) and not link.is_symlink():
        raise FileExistsError(f"{link} is there and is not a link")
    temporary = temporary_path(link)
    try:
        temporary.symlink_to(target_name, target_is_directory=True)
        temporary.replace(link)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path, of: str = "*") -> None:
    """Remove what a killed process left half-written in ``folder``: what :func:`temporary_path` names, and no more.

    Args:
        folder: where no other process writes what the pattern names.
        of: a glob pattern of what was to be written.
    """
    for path in folder.glob(f"{TEMPORARY}{of}-{'[0-9a-f]' * 32}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Hand a file's or folder's content to the disk, so that a rename cannot reach it first."""
    if os.name == "nt":  # which flushes neither folders nor files opened for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Writer:
    """One thread that writes files in the order in which they are submitted.

    It ends, with everything written, when it is closed or when Python exits.

    Args:
        device: of the tensors that are written.
    """

    def __init__(self, device: torch.device) -> None:
        self._thread = worker("traj-merge-writer", device)
        self._unwatched: list[tuple[str, Future[Any]]] = []

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Write something; the caller asks for the result."""
        return self._thread.submit(job)

    def submit_unwatched(self, job: Callable[[], None], what: str) -> None:
        """Write something that nobody waits for; :meth:`finished` tells how it went."""
        self._unwatched.append((what, self._thread.submit(job)))

    def finished(self) -> Iterator[tuple[str, Future[Any]]]:
        """The unwatched jobs that were done since the last time, and what they were."""
        while self._unwatched and self._unwatched[0][1].done():
            yield self._unwatched.pop(0)

    def wait(self) -> None:
        """Wait until everything submitted is written, well or not."""
        wait([self._thread.submit(int)])

    def close(self) -> None:
        """Wait, and end the thread."""
        self._thread.shutdown(wait=True)
