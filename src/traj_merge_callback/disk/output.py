"""The output folder of a run, and the lock file that keeps other live runs out of it.

A lock says who holds it, and is held for as long as that process lives: on one machine, containers included, the system
knows (``flock``); from other machines a thread is seen to renew the file's time. Nobody has to remove a killed run's.
"""

from __future__ import annotations

import glob
import itertools
import json
import logging
import math
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from .atomic import TEMPORARY, clear_for_file, make_folder, remove_leftovers, temporary_path

try:
    import fcntl
except ImportError:  # on Windows, where only times tell
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("traj_merge_callback")
LOCK = ".traj-merge.lock"
# Seconds between two renewals, and after which a run on another machine that has not renewed its lock is dead.
_BEAT_S, _PATIENCE_S = 5.0, 20.0
# Locks of this process, by their uuid.
_held: weakref.WeakValueDictionary[str, OutputFolder] = weakref.WeakValueDictionary()


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A place for a folder that is to be written, whole or not at all; see :func:`alone` and :func:`vacant`."""
    with alone(output):
        yield vacant(output)


def vacant(output: str | Path) -> Path:
    """The path of a folder that is not there; what a killed process left of it is removed.

    Raises:
        FileExistsError: something is there that is not an empty folder.
    """
    path = Path(output).expanduser().resolve()
    if path.exists() and not (path.is_dir() and all(one.name.startswith(TEMPORARY) for one in path.iterdir())):
        raise FileExistsError(f"output={str(output)!r} is there already: remove it, or name a new folder")
    remove_leftovers(path.parent, of=glob.escape(path.name))
    if path.is_dir():
        remove_leftovers(path)
        for lock in path.glob(f"{TEMPORARY}*.lock"):
            lock.unlink()
        path.rmdir()
    return path


@contextmanager
def alone(output: str | Path) -> Iterator[None]:
    """Keep other commands from writing a folder. The lock is a file beside it, free when its process ends.

    Raises:
        FileExistsError: another command is writing it, or it is a link that leads nowhere.
        OSError: there can be no folder.
    """
    path = Path(output).expanduser()
    if path.is_symlink() and not path.exists():
        raise FileExistsError(f"output={str(output)!r} is a link that leads nowhere: remove it, or name a new folder")
    path = path.resolve()
    if not path.name:
        raise FileExistsError(f"output={str(output)!r} is there already: name a new folder")
    make_folder(path.parent)
    lock = path.with_name(f"{TEMPORARY}{path.name}.lock")
    with ExitStack() as held:
        try:
            clear_for_file(lock)
            file = held.enter_context(lock.open("a"))
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), lock.stat()):  # whoever had it removed it just now
                raise BlockingIOError
            held.callback(_remove, lock)
        except BlockingIOError:
            raise FileExistsError(
                f"output={str(output)!r} is being written by another command: wait for it, or name another folder"
            ) from None
        except OSError as error:  # a file system without locks, or a folder that cannot be written to
            logger.debug("%s cannot be locked: %s", path, error)
        yield


def _remove(lock: Path) -> None:
    with suppress(OSError):  # on Windows while it is open
        lock.unlink()


class OutputFolder:
    """A folder that one live run writes to; whoever comes second gets ``<folder>-2`` and so on.

    Within one process, a run that has done nothing since this one began was given up, and its folder is taken over.

    Args:
        wanted: the folder.
    """

    def __init__(self, wanted: Path) -> None:
        self.path = wanted
        self._wanted = wanted
        self._uuid = uuid.uuid4().hex
        self._began = self._used = time.monotonic()
        self._descriptor: int | None = None
        self._ended = threading.Event()
        self._close: Any = None
        self._thread: threading.Thread | None = None

    def acquire(self) -> Path:
        """Take the folder, or one with a number behind its name; a folder that cannot be locked is used all the same.

        Returns:
            The folder.
        """
        for number in itertools.count(1):
            path = self._wanted if number == 1 else self._wanted.with_name(f"{self._wanted.name}-{number}")
            try:
                holder = self._take(path)
            except OSError as error:
                if path.is_dir():
                    logger.info("%s cannot be locked: %s", path, error)
                else:
                    logger.warning(
                        "output_dir=%r cannot be made (%s): neither snapshots nor metrics.jsonl are written; name a "
                        "folder that can be",
                        str(path),
                        error,
                    )
                return self.path
            if holder is None:
                self.path = path
                break
            logger.debug("%s is held by %s", path, holder)
            if number == 1:
                first = holder
        if self.path != self._wanted:
            logger.warning(
                "another run that is alive writes to %s (%s): this one writes to %s", self._wanted, first, self.path
            )
        return self.path

    def use(self) -> None:
        """Note that the run is alive."""
        self._used = time.monotonic()

    def resume(self) -> None:
        """Note that this run goes on with an earlier one of this process, whatever that one still does."""
        self._began = math.inf

    def check(self) -> None:
        """Make sure that the folder is still this run's.

        Raises:
            OSError: another run has it, or it cannot be locked.
        """
        if self._holds():
            return
        # Somebody may have removed the folder, or it could not be locked before.
        self._let_go()
        if (holder := self._take(self.path)) is not None:
            raise OSError(f"{self.path} was taken over by another run ({holder}); this one writes nothing more to it")

    def release(self) -> None:
        """Give the folder to others; without anything in it, it is removed."""
        if self._holds():
            with suppress(OSError):
                (self.path / LOCK).unlink()
                self.path.rmdir()
        self._let_go()

    def _holds(self) -> bool:
        """Whether the lock that is there now is this run's."""
        with suppress(FileNotFoundError):
            if self._descriptor is not None:
                return os.path.samestat((self.path / LOCK).stat(), os.fstat(self._descriptor))
        return False

    def _let_go(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._descriptor is not None:
            self._descriptor = None
            self._close()

    def _take(self, folder: Path) -> str | None:
        """Lock a folder; who holds it, if somebody does who is alive."""
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / LOCK
        while not self._create(lock):
            try:
                clear_for_file(lock)
                found = os.lstat(lock)
                holder = _read(lock)
                if self._is_alive(lock, holder):
                    return _described(holder)
                doomed = temporary_path(lock)
                lock.rename(doomed)
                if not os.path.samestat(os.lstat(doomed), found):  # somebody else was faster
                    with suppress(OSError):
                        os.link(doomed, lock)
                doomed.unlink()
            except FileNotFoundError:
                continue
        return None

    def _create(self, lock: Path) -> bool:
        """Make the lock file, whole and locked already, unless there is one."""
        temporary = temporary_path(lock)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.write(descriptor, json.dumps(_description(self._uuid)).encode())
            if fcntl is not None:
                with suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                os.link(temporary, lock)
            except FileExistsError:
                os.close(descriptor)
                return False
            except OSError:  # a file system without hard links
                if os.path.lexists(lock):
                    os.close(descriptor)
                    return False
                temporary.rename(lock)
        except BaseException:
            with suppress(OSError):
                os.close(descriptor)
            raise
        finally:
            temporary.unlink(missing_ok=True)
        self._descriptor, self._ended = descriptor, threading.Event()
        self._close = weakref.finalize(self, os.close, descriptor)
        _held[self._uuid] = self
        arguments = weakref.ref(self), self._ended, lock
        self._thread = threading.Thread(target=_beat, args=arguments, name="traj-merge-lock", daemon=True)
        self._thread.start()
        return True

    def _is_alive(self, lock: Path, holder: dict[str, Any]) -> bool:
        """Whether the run that holds a lock is still there."""
        if (other := _held.get(str(holder.get("uuid")))) is not None:
            return other._used > self._began
        if fcntl is not None:
            with lock.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if holder.get("machine") == _machine():
                        return False
                except BlockingIOError:
                    return True
                except OSError as error:  # a file system that cannot tell
                    logger.debug("no flock on %s: %s", lock, error)
        # Times of one file system are compared with each other, not with this machine's clock.
        now = temporary_path(lock)
        now.touch()
        age = now.stat().st_mtime - lock.stat().st_mtime
        now.unlink()
        if age > _PATIENCE_S:
            return False
        logger.info("%s is locked by %s: waiting for a sign of life", lock.parent, _described(holder))
        before, until = lock.stat().st_mtime_ns, time.monotonic() + _PATIENCE_S
        while time.monotonic() < until:
            time.sleep(0.2)
            if lock.stat().st_mtime_ns != before:
                return True
        return False


def _beat(owner: weakref.ref[OutputFolder], ended: threading.Event, lock: Path) -> None:
    while not ended.wait(_BEAT_S):
        folder = owner()
        if folder is None or folder._descriptor is None:
            return
        with suppress(OSError):
            os.utime(folder._descriptor if os.utime in os.supports_fd else lock)
        del folder


def _in_child() -> None:
    """A forked process, such as a loader's worker, must not hold the lock when its parent was killed."""
    for folder in list(_held.values()):
        if folder._descriptor is not None:
            folder._close()
            folder._descriptor = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def _machine() -> str:
    """What containers on one machine have in common."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return socket.gethostname()


def _description(identity: str) -> dict[str, Any]:
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    mine = {"host": socket.gethostname(), "process": os.getpid(), "locked": f"{started} UTC"}
    return {**mine, "machine": _machine(), "uuid": identity}


def _read(lock: Path) -> dict[str, Any]:
    """Who holds a lock; empty if that cannot be told."""
    try:
        found = json.loads(lock.read_bytes()[:4096])
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _described(holder: dict[str, Any]) -> str:
    parts = [f"{name} {holder[name]}" for name in ("host", "process", "locked") if name in holder]
    return ", ".join(parts) or "somebody unknown"
