"""A command or a function that published snapshots are given to, each in a process of its own beside training.

What it prints and writes stays in ``<output_dir>/eval/step-<step>``; numbers in its JSON are read back.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .atomic import set_aside
from .snapshots import SnapshotStore

logger = logging.getLogger("traj_merge_callback")
_FOLDER, _OUTPUT = "eval", "output.txt"
# Files that are larger are not read, and of what is printed no more than the end.
_MOST_BYTES = 2**24
# Variables that make a process a rank of the run.
_OF_A_RANK = re.compile(
    r"(LOCAL_|GROUP_|ROLE_|NODE_|CROSS_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|SLURM_(PROCID|LOCALID|NODEID|NTASKS.*)"
    r"|(TORCHELASTIC|ACCELERATE|FSDP|OMPI|PMI|PET)_.*"
)
_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
# Ends with its parent, however that ends, and all that it has started with it.
_GUARD = """
import os, signal, subprocess, sys, time
process = subprocess.Popen(sys.argv[2:])
while process.poll() is None:
    if os.getppid() != int(sys.argv[1]):
        os.killpg(0, signal.SIGKILL)
    time.sleep(0.1)
sys.exit(process.returncode if process.returncode >= 0 else 128 - process.returncode)
"""
_CALL = """
import json, pathlib, pickle, sys
found = pickle.load(sys.stdin.buffer)(pathlib.Path(sys.argv[1]))
if found is not None:
    pathlib.Path(sys.argv[2], "returned.json").write_text(json.dumps(dict(found), default=float))
"""


class Found(NamedTuple):
    """What was found in a snapshot.

    Args:
        step: of the snapshot.
        numbers: by name; nested names are joined by "/".
    """

    step: int
    numbers: dict[str, float]


@dataclass
class _Running:
    """A process that reads a snapshot.

    Args:
        step, snapshot: of the snapshot.
        out: the folder for its output.
        process: leads a session of its own.
        until: when it has to be done, by ``time.monotonic``.
    """

    step: int
    snapshot: Path
    out: Path
    process: subprocess.Popen[bytes]
    until: float

    def kill(self) -> None:
        """End the process and all that it has started."""
        with suppress(OSError):  # nothing is left, or what is left belongs to another user
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        self.process.wait()


class OnPublish:
    """Gives published snapshots to a command or a function, one at a time; of those that wait the newest is next.

    All methods return at once; :meth:`poll` is to be called now and then.

    Args:
        what: the command, with "{snapshot}" and "{out}" in it, or the function.
        limit: seconds that one may take.
        store: of the snapshots, which keeps those that wait or are read.
    """

    def __init__(self, what: str | Callable[..., Any], limit: float, store: SnapshotStore) -> None:
        self._what = what
        self._limit = limit
        self._store = store
        self._running: _Running | None = None
        self._waiting: tuple[int, Path] | None = None
        self._said_skipped = False
        #: Whether a snapshot is not needed any more; whoever has the store pruned sets it back.
        self.freed = False

    def submit(self, step: int, snapshot: Path) -> None:
        """A snapshot was published; what waited before is left out."""
        if self._waiting is not None:
            log = logger.debug if self._said_skipped else logger.warning
            self._said_skipped = True
            log(
                "on_publish: the snapshot of step %d is left out, as a newer one is there and an earlier one is still "
                "being read; so are later ones, unless the command takes less time or merge_every is larger",
                self._waiting[0],
            )
            self._free(self._waiting[1])
        self._store.in_use.add(snapshot.name)
        self._waiting = (step, snapshot)

    @property
    def is_busy(self) -> bool:
        """Whether a snapshot is read, or waits."""
        return self._running is not None or self._waiting is not None

    def poll(self, wait: float = 0.0) -> Found | None:
        """What was found, if a process has ended, and begin with the next snapshot.

        Args:
            wait: seconds to wait for its end.

        Raises:
            RuntimeError: it has failed, or taken too long; what it was, and where its output is.
            OSError: it could not be started.
        """
        running = self._running
        if running is not None:
            with suppress(subprocess.TimeoutExpired):
                running.process.wait(wait)
            works = running.process.poll() is None
            late = works and time.monotonic() > running.until
            if works and not late:
                return None
            running.kill()  # if it has ended, what it has started and left behind
            self._running = None
            self._free(running.snapshot)
        if self._waiting is not None:
            step, snapshot = self._waiting
            self._waiting = None
            try:
                self._running = self._start(step, snapshot)
            except BaseException:
                self._free(snapshot)
                raise
        return None if running is None else self._found(running, late)

    def _free(self, snapshot: Path) -> None:
        self._store.in_use.discard(snapshot.name)
        self.freed = True

    def prune(self) -> None:
        """Remove the snapshots that were kept only to be read."""
        self._store.prune()

    def close(self) -> None:
        """End what runs; nothing is waited for."""
        if self._running is not None:
            self._running.kill()
        self._running = self._waiting = None
        self._store.in_use.clear()

    def _start(self, step: int, snapshot: Path) -> _Running:
        out = self._store.folder / _FOLDER / snapshot.name
        if os.path.lexists(out):  # of an earlier part of this run, or of another
            set_aside(out)
        out.mkdir(parents=True)
        environment = {name: value for name, value in os.environ.items() if not _OF_A_RANK.fullmatch(name)}
        # A command that took the memory of a device from training could end it.
        environment |= dict.fromkeys(_DEVICES, "")
        with ExitStack() as stack:
            given: Any = subprocess.DEVNULL
            if isinstance(self._what, str):
                names = {"snapshot": str(snapshot), "out": str(out)}
                command = [part.format(**names) for part in shlex.split(self._what)]
            else:
                import cloudpickle

                given = stack.enter_context(tempfile.TemporaryFile())
                cloudpickle.dump(self._what, given)
                given.seek(0)
                command = [sys.executable, "-c", _CALL, str(snapshot), str(out)]
                environment["PYTHONPATH"] = os.pathsep.join(path or "." for path in sys.path)
            output = stack.enter_context((out / _OUTPUT).open("wb"))
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _GUARD, str(os.getpid()), *command],
                stdin=given,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        return _Running(step, snapshot, out, process, time.monotonic() + self._limit)

    def _found(self, ended: _Running, late: bool) -> Found:
        printed = _last_lines(ended.out / _OUTPUT)
        if late or ended.process.returncode:
            how = f"took longer than on_publish_timeout={self._limit:g} s and was ended"
            if not late:
                how = f"ended with exit status {ended.process.returncode}"
            last = f"; its last line: {printed[-1]:.300}" if printed else ""
            what = self._what if isinstance(self._what, str) else getattr(self._what, "__qualname__", self._what)
            raise RuntimeError(
                f"on_publish={what!s:.200} {how} for {ended.snapshot.name}, see {ended.out / _OUTPUT}{last}"
            )
        return Found(ended.step, numbers_of(ended.out, printed))


def _last_lines(path: Path) -> list[str]:
    """The last lines of a file, however long it is."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _MOST_BYTES))
        return file.read().decode("utf-8", errors="replace").strip().splitlines()


def numbers_of(out: Path, printed: list[str]) -> dict[str, float]:
    """Numbers in the JSON files of a folder, else in the last line printed that is a JSON object."""
    files = sorted(filter(Path.is_file, out.rglob("*.json")), key=lambda path: path.stat().st_mtime_ns)
    documents = [document for path in files if (document := _object(path)) is not None]
    if not documents:
        lines = (line for line in reversed(printed) if line.lstrip().startswith("{"))
        documents = [next(filter(None, map(_object, lines)), {})]
    found: dict[str, float] = {}
    for document in documents:
        results = document.get("results")
        found |= dict(_flat(results if isinstance(results, Mapping) and results else document))
    return found


def _object(source: Path | str) -> dict[str, Any] | None:
    """The JSON object in a file or a line, if there is one; numbers may be of any length there."""
    try:
        if isinstance(source, Path):
            if source.stat().st_size > _MOST_BYTES:
                logger.info("on_publish: %s is not read, as it is larger than %d bytes", source, _MOST_BYTES)
                return None
            source = source.read_text(encoding="utf-8-sig")
        found = json.loads(source, parse_int=float)
    except (OSError, ValueError, RecursionError) as error:
        logger.debug("on_publish: no JSON (%s)", error)
        return None
    return found if isinstance(found, dict) else None


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Finite numbers in nested mappings; lm-evaluation-harness writes "acc,none" for a metric without a filter."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            part = str(key).removesuffix(",none").replace(",", "/")
            yield from _flat(item, f"{name}/{part}" if name else part)
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        yield name, float(value)
