"""metrics.jsonl: one record a line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from ..metrics import MergeRecord
from .atomic import set_aside, write_whole
from .untrusted import integer, mapping, parse_json

logger = logging.getLogger("traj_merge_callback")


class MetricsFile:
    """metrics.jsonl, continued by a resumed run, never mixed with another run's.

    Args:
        path: the file.
        check: raises an OSError if the folder is another run's.
    """

    def __init__(self, path: Path, check: Callable[[], None] = lambda: None) -> None:
        self.path = path
        self._check = check
        self._begun = False
        # Records that could not be written when it was their turn, and the one at hand.
        self._unwritten: list[MergeRecord] = []
        self._resumed = False

    def resume(self) -> None:
        """Note that the run goes on from an earlier step: the lines from the next record's step on are dropped."""
        self._begun, self._resumed = False, True

    def append(self, record: MergeRecord) -> None:
        """Add a line, whole or not at all; one that cannot be written now is written with the next one.

        Raises:
            OSError: the file cannot be written.
        """
        self._unwritten.append(record)
        self._check()
        if not self._begun:
            self._begin(self._unwritten[0].step)
        self._write(b"".join(one.to_json().encode() + b"\n" for one in self._unwritten))
        self._unwritten.clear()

    def _begin(self, step: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_symlink() or (self.path.exists() and not (self._resumed and self.path.is_file())):
            aside = set_aside(self.path)
            logger.info("%s was there from another run; it is now %s", self.path, aside)
        elif self.path.exists():
            self._repair(step)
        self._begun = True

    def _repair(self, step: int) -> None:
        """Keep the records before ``step``, from which on a resumed run makes them again; set aside what is none."""
        found = self.path.read_bytes()
        *lines, cut_off = found.split(b"\n")
        records = {line: _step_of(line) for line in {*lines, cut_off}}
        damaged = [line for line in lines if records[line] is None and line.strip()]
        if damaged:
            aside = self.path.with_name(f"{self.path.stem}.damaged.txt")
            if aside.is_symlink() or (aside.exists() and not aside.is_file()):
                set_aside(aside)
            with aside.open("ab") as file:
                file.write(b"".join(line + b"\n" for line in damaged))
            logger.warning("%d lines of %s are no records; they are now in %s", len(damaged), self.path, aside)
        if cut_off and records[cut_off] is None:
            logger.info("the last line of %s was cut off and is dropped: %.60r", self.path, cut_off)
        kept = [line for line in [*lines, cut_off] if (at := records[line]) is not None and at < step]
        if (repaired := b"".join(line + b"\n" for line in kept)) != found:
            write_whole(self.path, repaired)

    def _write(self, data: bytes) -> None:
        with self.path.open("a+b", buffering=0) as file:
            size = file.seek(0, 2)
            if size:
                file.seek(size - 1)
                data = data if file.read(1) == b"\n" else b"\n" + data
            try:
                left = memoryview(data)
                while left:
                    left = left[file.write(left) :]
            except BaseException:
                file.truncate(size)
                raise


def _step_of(line: bytes) -> int | None:
    """The step of a record; None if a line is none."""
    try:
        return integer(mapping(parse_json(line))["step"])
    except (KeyError, TypeError, ValueError):
        return None
