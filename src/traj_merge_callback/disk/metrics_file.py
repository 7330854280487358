"""metrics.jsonl: one record a line."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from ..metrics import MergeRecord
from .atomic import write_whole

logger = logging.getLogger("traj_merge_callback")


class MetricsFile:
    """metrics.jsonl, continued by a resumed run, never mixed with another run's.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begun = False
        self.resumed = False

    def append(self, record: MergeRecord) -> None:
        """Add a line.

        Raises:
            OSError: the file cannot be written.
        """
        if not self._begun:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                self._drop_lines_from(record.step) if self.resumed else self._set_aside()
            self._begun = True
        with self._path.open("a", encoding="utf-8") as file:
            file.write(record.to_json() + "\n")

    def _drop_lines_from(self, step: int) -> None:
        """Drop the lines of steps that a resumed run makes again, and a last line that was cut off."""
        lines = [line for line in self._path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        write_whole(self._path, "".join(line + "\n" for line in lines if json.loads(line)["step"] < step))

    def _set_aside(self) -> None:
        number = 1
        while (aside := self._path.with_name(f"metrics.{number}.jsonl")).exists():
            number += 1
        self._path.rename(aside)
        logger.info("%s was there from another run; it is now %s", self._path, aside)
