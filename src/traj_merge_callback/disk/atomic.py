"""Writing files and folders so that each exists whole or not at all, whatever kills the process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..distributed import Processes

_TEMPORARY = ".tmp-"


@contextmanager
def whole_folder(target: Path, tag: str | None = None) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` when the block ends well, and vanishes when it raises.

    A folder that is already at ``target`` is replaced; it stays until the new one is complete on disk.

    Args:
        target: the folder.
        tag: makes the temporary folder's name unique; by default the process's number does.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target, tag or str(os.getpid()))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            _flush(path)
        _flush(temporary)
        if target.exists():
            remove_folder(target)
        temporary.rename(target)
        _flush(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def shared_folder(target: Path, processes: Processes, *, leads: bool) -> Iterator[Path]:
    """:func:`whole_folder` for several processes: it becomes ``target`` when the block has ended well in all of them.

    Args:
        target: the folder; several processes may see the same one, or each its own.
        processes: that enter the block.
        leads: whether this process makes the folder, for all that see it. Where several do, the first process's is
            there last.

    Raises:
        Exception: what went wrong here, or that something did in another process.
    """
    tag = processes.from_rank0(lambda: f"{os.getpid()}-shared")
    with ExitStack() as stack:
        with processes.raise_on_all():
            if leads:
                stack.enter_context(whole_folder(target, tag))
        with processes.raise_on_all():
            yield _temporary(target, tag)
        with processes.raise_on_all():
            if not processes.is_rank_zero:
                stack.close()
        processes.from_rank0(stack.close)


def _temporary(target: Path, tag: str) -> Path:
    return target.parent / f"{_TEMPORARY}{target.name}-{tag}"


def write_whole(path: Path, text: str) -> None:
    """Replace the content of a file in one step."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        _flush(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_folder(path: Path) -> None:
    """Remove a folder; a reader, or a process killed halfway, never sees it with files missing."""
    doomed = path.with_name(f"{_TEMPORARY}{path.name}-{os.getpid()}-removed")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def point_link(link: Path, target_name: str) -> None:
    """Let the symbolic link ``link`` point to its neighbour ``target_name``, in one step."""
    temporary = link.with_name(f"{_TEMPORARY}{link.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target_name, target_is_directory=True)
    temporary.replace(link)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written in ``folder``."""
    for path in folder.glob(f"{_TEMPORARY}*"):
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
