"""Publishing merged snapshots and finding them again.

Layout of an output folder, format version 1::

    step-00000500/          one snapshot; the folder exists whole or not at all
        *.safetensors       weights, in shards with an index file when large
        merge.json          how it was made: steps, weights, losses of both splits, search, versions
        config.json, ...    for a Hugging Face model, so that from_pretrained(folder) works
    best, latest            symbolic links to the snapshot of lowest search loss, and the newest
    index.json              {"version", "best", "latest",
                             "snapshots": [{"name", "step", "search_loss", "merged_loss"}]}
    metrics.jsonl           one line for each merge
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..distributed import Processes
from .atomic import (
    Writer,
    point_link,
    remove_folder,
    remove_leftovers,
    set_aside,
    set_aside_before,
    shared_folder,
    write_whole,
)
from .checksums import with_checksums
from .untrusted import folder_name_of_step, integer, is_folder_of_step, is_step_name, read_json_object, resolved

FORMAT_VERSION = 1
_LINKS = ("best", "latest")
# How often a snapshot that the index names is looked for while a run goes on, and how long in between.
_LOOKS = 5
_BETWEEN_LOOKS_S = 0.02
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SnapshotEntry:
    """A published snapshot.

    Args:
        name: of its folder, inside the output folder.
        step: optimizer step.
        search_loss: its objective on the search split, by which the best snapshot is chosen.
        merged_loss: its loss on the report split, which chooses nothing.
    """

    name: str
    step: int
    search_loss: float
    merged_loss: float


class SnapshotStore:
    """The snapshots of one run in one output folder.

    Args:
        folder: the output folder; created when the first snapshot is published.
        keep_last: how many of the newest snapshots to keep.
        keep_best: whether to keep the one of lowest search loss as well.
        check: raises an OSError if the folder is another run's.
    """

    def __init__(
        self, folder: Path, *, keep_last: int, keep_best: bool, check: Callable[[], None] = lambda: None
    ) -> None:
        self.folder = folder
        self._check = check
        self._keep_last = keep_last
        self._keep_best = keep_best
        self.entries: list[SnapshotEntry] = []
        #: Tells this run's snapshots from those of other runs; a resumed run is the same run.
        self.run = uuid.uuid4().hex
        #: Digest of the held-out data; snapshots measured on other data are neither compared with these nor removed.
        self.heldout = ""
        self.begun = False
        #: Names of snapshots that somebody reads or is going to read, which are not removed meanwhile.
        self.in_use: set[str] = set()

    @property
    def best(self) -> SnapshotEntry | None:
        """The published snapshot of lowest loss on the search split, the newest of equals.

        Were it chosen by the loss that is reported for it, that number would be the lowest of several noisy ones, and
        too low.
        """
        return min(self.entries, key=lambda entry: (entry.search_loss, -entry.step), default=None)

    @property
    def latest(self) -> SnapshotEntry | None:
        """The published snapshot of the highest step."""
        return max(self.entries, key=lambda entry: entry.step, default=None)

    def restore(self, run: str, entries: list[dict[str, Any]], processes: Processes) -> None:
        """Take over the entries of an earlier part of the same run, those whose folders are still there; a collective.

        A snapshot that another run has set aside since gets its name back, and what has it now is set aside.
        """
        self.run = run
        there = processes.from_rank0(lambda: [entry for entry in entries if self._take_back(entry["name"])])
        self.entries = [SnapshotEntry(**entry) for entry in there]

    def _take_back(self, name: str) -> bool:
        """Whether this run's snapshot of a name is there, possibly since now."""
        path = self.folder / name
        if self._is_own(path):
            return True
        if (mine := next(filter(self._is_own, set_aside_before(path)), None)) is None:
            return False
        self._check()
        if os.path.lexists(path):
            logger.warning("%s is of another run than the one that is resumed; it is now %s", path, set_aside(path))
        mine.rename(path)
        return True

    def begin_in(self, writer: Writer, processes: Processes) -> None:
        """Have the writer's thread do :meth:`begin`, on rank 0, if it was not done."""
        if processes.is_rank_zero and not self.begun:
            self.begun = True
            writer.submit_unwatched(self.begin, "clearing the output folder")

    def begin(self) -> None:
        """Remove what killed processes left: half-written files, and this run's snapshots that it does not know.

        A run that is killed has published snapshots after the state from which it goes on. Those of other runs stay.
        """
        self.begun = True
        if not self.folder.is_dir():
            return
        self._check()
        remove_leftovers(self.folder)
        known = {entry.name for entry in self.entries}
        named = [path for path in self.folder.glob("step-*") if path.name not in known and is_step_name(path.name)]
        orphans = [path for path in named if self._is_own(path, self.heldout)]
        if orphans or known:  # the index may be another run's
            self._write_index()
        for path in orphans:
            remove_folder(path)

    def _is_own(self, path: Path, heldout: str | None = None) -> bool:
        """Whether a folder is a snapshot of this run, and measured on these held-out data if they are given."""
        try:
            merge = {} if path.is_symlink() else read_merge(path)
        except (OSError, ValueError):
            return False
        return merge.get("run") == self.run and heldout in (None, merge.get("heldout"))

    def publish(
        self,
        step: int,
        search_loss: float,
        merged_loss: float,
        write: Callable[[Path], None],
        merge: dict[str, Any],
        together: Processes | None = None,
    ) -> Path:
        """Write a snapshot with ``write(folder)`` and merge.json, then update the index and prune.

        Args:
            step: optimizer step.
            search_loss, merged_loss: see :class:`SnapshotEntry`.
            write: writes the weights into a folder.
            merge: content of merge.json.
            together: the ranks, if all of them call this, each to write its part; by default this one writes alone.

        Returns:
            The snapshot's folder.

        Raises:
            OSError: the disk is full or read-only, or ranks do not share the folder; nothing half-written stays behind.
        """
        name = folder_name_of_step(step)
        processes = together or Processes(alone=True)
        processes.from_rank0(self._check)
        if not self.begun and processes.is_rank_zero:
            self.begin()

        def describe(checksums: dict[str, str]) -> None:
            document = {
                "version": FORMAT_VERSION,
                "run": self.run,
                "heldout": self.heldout,
                **merge,
                "packages": package_versions(),
            }
            write_document(temporary, document, checksums)

        with shared_folder(self.folder / name, processes, describe=describe, replaces=self._is_own) as temporary:
            write(temporary)
        kept = [entry for entry in self.entries if entry.name != name]
        self.entries = [*kept, SnapshotEntry(name, step, search_loss, merged_loss)]
        self._prune(writes=processes.is_rank_zero)
        return self.folder / name

    def prune(self) -> None:
        """Remove snapshots that were kept only while they were read."""
        self._check()
        self._prune(writes=True)

    def _prune(self, *, writes: bool) -> None:
        newest = sorted(self.entries, key=lambda entry: entry.step)[max(0, len(self.entries) - self._keep_last) :]
        kept = set(newest if self._keep_last else []) | {one for one in self.entries if one.name in self.in_use}
        if self._keep_best and self.best is not None:
            kept.add(self.best)
        doomed = [entry for entry in self.entries if entry not in kept]
        self.entries = [entry for entry in self.entries if entry in kept]
        # The index stops naming a snapshot before its folder goes, so that a reader never follows it into nothing.
        if writes:
            self._write_index()
        for entry in doomed:
            if writes and self._is_own(self.folder / entry.name):
                remove_folder(self.folder / entry.name)

    def _write_index(self) -> None:
        named = {"best": self.best, "latest": self.latest}
        index = {
            "version": FORMAT_VERSION,
            **{key: entry.name if entry else None for key, entry in named.items()},
            "snapshots": [asdict(entry) for entry in self.entries],
        }
        write_whole(self.folder / "index.json", json.dumps(index, indent=2) + "\n")
        for key, entry in named.items():
            try:
                if entry is not None:
                    point_link(self.folder / key, entry.name)
                elif (self.folder / key).is_symlink():
                    (self.folder / key).unlink()
            except OSError as error:
                # Some file systems have no links; find_snapshot reads the index and needs none.
                logger.debug("no symbolic link %s: %s", self.folder / key, error)


def find_snapshot(output_dir: str | Path, which: str = "best") -> Path:
    """The folder of the "best" or "latest" snapshot of a run, without reading the snapshots.

    Returns:
        The snapshot's own folder, not a link to it: whoever reads all files from there reads one snapshot, whatever a
        run that goes on publishes meanwhile. It may be pruned in that time; then files are missing.

    Raises:
        ValueError: ``which`` is neither, or the index is damaged or leads elsewhere.
        FileNotFoundError: nothing has been published in ``output_dir``.
    """
    if which not in _LINKS:
        raise ValueError(f"which={which!r} is not one of {list(_LINKS)}")
    folder = Path(output_dir)
    index = folder / "index.json"
    if not os.path.lexists(index):
        raise FileNotFoundError(f"no merged snapshot has been published in {output_dir} (no index.json)")
    for _ in range(_LOOKS):
        name = read_json_object(index).get(which)
        if name is None:
            raise FileNotFoundError(f"{index} names no {which} snapshot")
        if not is_step_name(name):
            raise ValueError(f"{index} is damaged: {which}={name!r} is not the name of a snapshot")
        if is_folder_of_step(folder / name, "merge.json"):
            return (folder / name).resolve()
        time.sleep(_BETWEEN_LOOKS_S)  # it was pruned, or is being replaced, since the index was read
    raise FileNotFoundError(f"{index} names {name}, but there is no such snapshot")


def snapshot_folder(folder: str | Path) -> Path:
    """A snapshot's own folder, once and for all: what ``best`` or ``latest`` points to may change at any time.

    Raises:
        ValueError: such a link leads out of the output folder.
    """
    folder = Path(folder)
    found = resolved(folder)
    inside = found.parent == resolved(folder.parent) and is_step_name(found.name)
    if folder.name in _LINKS and folder.is_symlink() and not inside:
        raise ValueError(f"{folder} leads to {found}, which is no snapshot of the same output folder")
    return found


def write_document(folder: Path, merge: dict[str, Any], checksums: dict[str, str]) -> None:
    """Write the merge.json of a folder whose other files have these checksums."""
    text = json.dumps(with_checksums(merge, checksums), indent=2)
    (folder / "merge.json").write_text(text + "\n", encoding="utf-8")


def read_merge(folder: str | Path) -> dict[str, Any]:
    """The content of a snapshot's merge.json: how its weights were made.

    Args:
        folder: a snapshot's folder, or the ``best`` or ``latest`` link beside it.

    Raises:
        FileNotFoundError: ``folder`` is no snapshot.
        ValueError: it is damaged, was written by a newer version of this library, or is a link that leads elsewhere.
    """
    path = snapshot_folder(folder) / "merge.json"
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{folder} is not a merged snapshot (no merge.json)")
    merge = read_json_object(path)
    try:
        version = integer(merge["version"], least=1)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    if version > FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}; this library reads up to {FORMAT_VERSION}")
    return merge


def package_versions() -> dict[str, str]:
    """Versions of what a snapshot is made with."""
    names = ["traj-merge-callback", "torch", "numpy", "safetensors", "scikit-optimize", "transformers", "lightning"]
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
