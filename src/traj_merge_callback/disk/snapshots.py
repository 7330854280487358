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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..distributed import Processes
from .atomic import point_link, remove_folder, remove_leftovers, shared_folder, write_whole

FORMAT_VERSION = 1
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
    """

    def __init__(self, folder: Path, *, keep_last: int, keep_best: bool) -> None:
        self.folder = folder
        self._keep_last = keep_last
        self._keep_best = keep_best
        self.entries: list[SnapshotEntry] = []
        self._begun = False

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

    def restore(self, entries: list[dict[str, Any]]) -> None:
        """Take over the entries of an earlier part of the same run, those whose folders are still there."""
        self.entries = [SnapshotEntry(**entry) for entry in entries if (self.folder / entry["name"]).is_dir()]

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
        name = f"step-{step:08d}"
        processes = together or Processes(alone=True)
        if not self._begun and processes.is_rank_zero:
            remove_leftovers(self.folder)
        self._begun = True
        with shared_folder(self.folder / name, processes) as temporary:
            write(temporary)
            if processes.is_rank_zero:
                text = json.dumps({"version": FORMAT_VERSION, **merge, "packages": _versions()}, indent=2)
                (temporary / "merge.json").write_text(text + "\n", encoding="utf-8")
        kept = [entry for entry in self.entries if entry.name != name]
        self.entries = [*kept, SnapshotEntry(name, step, search_loss, merged_loss)]
        self._prune(writes=processes.is_rank_zero)
        return self.folder / name

    def _prune(self, *, writes: bool) -> None:
        newest = sorted(self.entries, key=lambda entry: entry.step)[len(self.entries) - self._keep_last :]
        kept = set(newest if self._keep_last else [])
        if self._keep_best and self.best is not None:
            kept.add(self.best)
        doomed = [entry for entry in self.entries if entry not in kept]
        self.entries = [entry for entry in self.entries if entry in kept]
        # The index stops naming a snapshot before its folder goes, so that a reader never follows it into nothing.
        if writes:
            self._write_index()
        for entry in doomed:
            if writes and (self.folder / entry.name).is_dir():
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
            if entry is None:
                continue
            try:
                point_link(self.folder / key, entry.name)
            except OSError as error:
                # Some file systems have no links; find_snapshot reads the index and needs none.
                logger.debug("no symbolic link %s: %s", self.folder / key, error)


def find_snapshot(output_dir: str | Path, which: str = "best") -> Path:
    """The folder of the "best" or "latest" snapshot of a run, without reading the snapshots.

    Raises:
        ValueError: ``which`` is neither.
        FileNotFoundError: nothing has been published in ``output_dir``.
    """
    if which not in ("best", "latest"):
        raise ValueError(f"which={which!r} is not one of ['best', 'latest']")
    index = Path(output_dir) / "index.json"
    if not index.is_file():
        raise FileNotFoundError(f"no merged snapshot has been published in {output_dir} (no index.json)")
    name = json.loads(index.read_text(encoding="utf-8"))[which]
    if name is None:
        raise FileNotFoundError(f"{index} names no {which} snapshot")
    return Path(output_dir) / name


def read_merge(folder: str | Path) -> dict[str, Any]:
    """The content of a snapshot's merge.json: how its weights were made.

    Raises:
        FileNotFoundError: ``folder`` is no snapshot.
        ValueError: it was written by a newer version of this library.
    """
    path = Path(folder) / "merge.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a merged snapshot (no merge.json)")
    merge = json.loads(path.read_text(encoding="utf-8"))
    if merge["version"] > FORMAT_VERSION:
        raise ValueError(f"{path} has format version {merge['version']}; this library reads up to {FORMAT_VERSION}")
    return merge


def _versions() -> dict[str, str]:
    names = ["traj-merge-callback", "torch", "numpy", "safetensors", "scikit-optimize", "transformers", "lightning"]
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
