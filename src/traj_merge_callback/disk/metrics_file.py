"""metrics.jsonl: one record a line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..metrics import MergeRecord
from .atomic import clear_for_file, set_aside, set_aside_before, write_whole
from .untrusted import integer, mapping, own_file, parse_json

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
        self._resumed: str | None = None

    def resume(self, run: str) -> None:
        """Note that this run goes on from an earlier step: its lines from the next record's step on are dropped."""
        self._begun, self._resumed = False, run

    def append(self, record: MergeRecord) -> None:
        """Add a line, whole or not at all; one that cannot be written now is written with the next one.

        Raises:
            OSError: the file cannot be written.
        """
        self._unwritten.append(record)
        self._check()
        clear_for_file(self.path)
        if not self._begun:
            self._begin(self._unwritten[0].step)
        self._write(b"".join(one.to_json().encode() + b"\n" for one in self._unwritten))
        self._unwritten.clear()

    def amend(self, record: MergeRecord) -> None:
        """Write the line of a record anew, with what became known later; the file is replaced in one step.

        Raises:
            OSError: the file cannot be written.
        """
        self._check()
        if any(one.step == record.step for one in self._unwritten):
            self._unwritten = [record if one.step == record.step else one for one in self._unwritten]
            return
        lines = self.path.read_bytes().split(b"\n")
        known = [number for number, line in enumerate(lines) if _parsed(line) == (record.step, record.run)]
        if known:
            lines[known[-1]] = record.to_json().encode()
            write_whole(self.path, b"\n".join(lines))

    def _begin(self, step: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not (self._resumed and self._continues(self.path)):
            logger.info("%s was there from another run; it is now %s", self.path, set_aside(self.path))
        if self._resumed and not self.path.exists():
            self._take_back()
        if self.path.exists():
            self._repair(step)
        self._begun = True

    def _continues(self, path: Path) -> bool:
        """Whether a file has records of the run that is resumed, or of no run that is known."""
        runs = _runs_in(path)
        return self._resumed in runs or runs <= {None}

    def _take_back(self) -> None:
        """Give the file that another run has set aside its name again."""
        for aside in set_aside_before(self.path):
            if aside.is_file() and not aside.is_symlink() and self._resumed in _runs_in(aside):
                aside.rename(self.path)
                logger.info("%s is of the run that is resumed; it is %s again", aside, self.path)
                return

    def _repair(self, step: int) -> None:
        """Keep the records before ``step``, from which on a resumed run makes them again; set aside what is not its."""
        found = self.path.read_bytes()
        *lines, cut_off = found.split(b"\n")
        records = {line: _parsed(line) for line in {*lines, cut_off}}
        if damaged := [line for line in lines if records[line] is None and line.strip()]:
            aside = self.path.with_name(f"{self.path.stem}.damaged.txt")
            clear_for_file(aside)
            with aside.open("ab") as file:
                file.write(b"".join(line + b"\n" for line in damaged))
            logger.warning("%d lines of %s are no records; they are now in %s", len(damaged), self.path, aside)
        if cut_off and records[cut_off] is None:
            logger.info("the last line of %s was cut off and is dropped: %.60r", self.path, cut_off)
        known = [(line, record) for line in [*lines, cut_off] if (record := records[line]) is not None]
        kept = [line for line, record in known if record.run in (None, self._resumed) and record.step < step]
        if others := [line for line, record in known if record.run not in (None, self._resumed)]:
            aside = set_aside(self.path)
            write_whole(aside, b"".join(line + b"\n" for line in others))
            logger.warning("%d lines of %s are of other runs; they are now in %s", len(others), self.path, aside)
        if others or b"".join(line + b"\n" for line in kept) != found:
            write_whole(self.path, b"".join(line + b"\n" for line in kept))

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


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file by step, without lines that are none; see :func:`read_lines`."""
    return read_lines(path)[0]


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """What is in a file that a run may still be writing, by any version of the library; no file has nothing.

    Returns:
        The records in the order of their steps, the last one of each step; of their values only ``step`` is checked.
        And how many lines are no records, not counting a last line that is not whole yet.

    Raises:
        ValueError: see :func:`own_file`.
    """
    if not path.is_file():
        return [], 0
    *lines, unfinished = own_file(path).read_bytes().split(b"\n")
    found = [_record_in(line) for line in lines if line.strip(b"\0 \r")]
    records = {record["step"]: record for record in [*found, _record_in(unfinished)] if record is not None}
    return [records[step] for step in sorted(records)], found.count(None)


class _Line(NamedTuple):
    """What is known of a record: its step, and its run, None if it was written by an earlier version."""

    step: int
    run: str | None


def _runs_in(path: Path) -> set[str | None]:
    """The runs that a file has records of."""
    return {line.run for line in map(_parsed, path.read_bytes().split(b"\n")) if line is not None}


def _parsed(line: bytes) -> _Line | None:
    """A line of the file; None if it is no record."""
    if (record := _record_in(line)) is None:
        return None
    run = record.get("run")
    return _Line(record["step"], run if isinstance(run, str) and run else None)


def _record_in(line: bytes) -> dict[str, Any] | None:
    """The record in a line, of which only the step is sure to be there; None if the line holds none."""
    try:
        record = mapping(parse_json(line))
        integer(record["step"])
    except (KeyError, TypeError, ValueError):
        return None
    return record
