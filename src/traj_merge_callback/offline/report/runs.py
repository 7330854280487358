"""What a report shows of runs: their merges and snapshots, read from files that somebody else may have written."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...disk.metrics_file import read_lines
from ...disk.output import LOCK
from ...disk.untrusted import integer, is_step_name, mapping, number, numbers, read_json_object, sequence
from ...search.spans import Span

#: Where a folder may have the output folders of runs in it: itself, those of both trainers, and of several versions.
_PLACES = ("merged*", "version_*/merged*", "lightning_logs/version_*/merged*")
# A number this large, of a damaged file, would be all that a figure shows.
_LARGEST = 1e12
_LONGEST_TEXT = 300


class Losses(NamedTuple):
    """Held-out losses on the report split, in nats per token; NaN where they are not known.

    Args:
        live, merged: of the live and of the merged weights.
        gain: ``live - merged``.
        stderr: standard error of the gain.
    """

    live: float
    merged: float
    gain: float
    stderr: float


@dataclass(frozen=True)
class Merge:
    """One merge; see :class:`traj_merge_callback.MergeRecord`. What a record does not have is NaN, or empty.

    Args:
        step, search, source, spike, row_spans, weights, group_weights, snapshot: as there.
        losses: of all domains that are searched on.
        domains: of each named domain.
        rolled_back: whether the run was rolled back since the merge before.
        passes: evaluated, in passes over the search split.
        seconds, longest_pause, overhead, steps_saved: as there.
    """

    step: int
    search: str
    source: str
    spike: bool
    row_spans: list[Span]
    weights: list[float]
    group_weights: dict[str, list[float]]
    snapshot: str
    losses: Losses
    domains: dict[str, Losses]
    rolled_back: bool
    passes: float
    seconds: float
    longest_pause: float
    overhead: float
    steps_saved: float


class Snapshot(NamedTuple):
    """A published snapshot.

    Args:
        step: optimizer step.
        path: of its folder.
        marks: "best", "latest", both or nothing.
        search_loss: the loss by which the best is chosen; NaN if it is not known.
        losses: of its merge.
    """

    step: int
    path: str
    marks: str
    search_loss: float
    losses: Losses


@dataclass(frozen=True)
class Run:
    """A run, as far as its metrics.jsonl goes.

    Args:
        name: tells it from the other runs of the report.
        folder: its output folder.
        merges: in the order of their steps.
        snapshots: in the same order; those of index.json, or else those that the merges name.
        notes: sentences about what could not be read.
    """

    name: str
    folder: Path
    merges: list[Merge]
    snapshots: list[Snapshot]
    notes: list[str]


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """The runs that paths lead to, each once.

    Args:
        paths: each a metrics.jsonl, an output folder, or a folder that has output folders in it: ``merged``,
            ``merged-<name>``, ``lightning_logs/version_<number>/merged``.

    Raises:
        FileNotFoundError: nothing of that is there.
        ValueError: a file has no merge in it, or lies elsewhere.
    """
    files = list(dict.fromkeys(file for path in paths for file in _metrics_files(Path(path))))
    return [_read(file, name) for file, name in zip(files, _names([file.parent for file in files]), strict=True)]


def _metrics_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        raise FileNotFoundError(f"run {str(path)!r}: there is no such file or folder")
    found = [path] if _is_output_folder(path) else []
    found = found or [one for place in _PLACES for one in sorted(path.glob(place), key=_natural)]
    if folders := [one for one in found if _is_output_folder(one)]:
        return [folder / "metrics.jsonl" for folder in folders]
    raise FileNotFoundError(
        f"run {str(path)!r}: there is no metrics.jsonl in it, nor in merged/, merged-<name>/ or "
        "lightning_logs/version_<number>/merged/ below; name the output folder of a run, or the trainer's"
    )


def _is_output_folder(path: Path) -> bool:
    """Whether a run writes, or has written, its snapshots and metrics there."""
    return any((path / name).is_file() for name in ("metrics.jsonl", "index.json", LOCK))


def _natural(path: Path) -> list[tuple[int, str]]:
    """A sorting key by which version_2 comes before version_10."""
    return [(int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", str(path))]


def _names(folders: list[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart; ``merged`` itself says nothing."""
    told = [folder.resolve().parts for folder in folders]
    parts = [one[:-1] if one[-1] == "merged" and one[:-1] not in told else one for one in told]
    lengths = range(1, max(map(len, parts), default=0) + 1)
    long_enough = next((n for n in lengths if len({one[-n:] for one in parts}) == len(parts)), 1)
    return [_text("/".join(one[-long_enough:])) for one in parts]


def _read(file: Path, name: str) -> Run:
    folder, notes = file.parent, []
    records, damaged = read_lines(file)
    if damaged and not records:
        raise ValueError(f"{file} has no merge in it: none of its {damaged} lines is a record of one")
    if damaged:
        notes.append(f"{damaged} lines of {file} are no records of merges; they are left out.")
    counts = [0.0, *(_number(record.get("rollbacks", 0)) for record in records)]
    merges = [_merge(record, now > before) for record, before, now in zip(records, counts, counts[1:], strict=False)]
    if not merges:
        notes.append(f"There is no merge in {file} yet.")
    try:
        snapshots = _indexed(folder, merges)
    except FileNotFoundError:
        snapshots = [
            Snapshot(merge.step, merge.snapshot, "", math.nan, merge.losses) for merge in merges if merge.snapshot
        ]
        if snapshots:
            notes.append(f"There is no index.json in {folder}: the snapshots shown may be gone.")
    except (KeyError, TypeError, ValueError) as error:
        snapshots = []
        notes.append(f"The snapshots are not known: {type(error).__name__}: {error}.")
    return Run(name, folder, merges, snapshots, [_text(note) for note in notes])


def _indexed(folder: Path, merges: list[Merge]) -> list[Snapshot]:
    """The snapshots that an output folder's index.json names.

    Raises:
        FileNotFoundError: there is none.
        KeyError, TypeError, ValueError: it is damaged.
    """
    index, losses = read_json_object(folder / "index.json"), {merge.step: merge.losses for merge in merges}
    found = []
    for entry in map(mapping, sequence(index["snapshots"])):
        name, step = entry["name"], integer(entry["step"])
        if not is_step_name(name):
            raise ValueError(f"index.json names the snapshot {name!r}")
        marks = [mark for mark in ("best", "latest") if index.get(mark) == name]
        merged = _number(entry.get("merged_loss"))
        known = losses.get(step, Losses(math.nan, merged, math.nan, math.nan))
        found.append(
            Snapshot(step, _text(str(folder / name)), ", ".join(marks), _number(entry.get("search_loss")), known)
        )
    return sorted(found)


def _merge(record: dict[str, Any], rolled_back: bool) -> Merge:
    step = record["step"]
    spans = [span for given in _list(record.get("row_spans")) if (span := _span(given)) is not None]
    if not spans:  # of versions whose rows were all single checkpoints
        spans = [Span(one, one, 1) for one in _list(record.get("checkpoint_steps")) if type(one) is int]
    groups, domains = (_mapping(record.get(name)) for name in ("group_weights", "domains"))
    return Merge(
        step=step,
        search=_text(record.get("search", "")),
        source="live" if record.get("source") == "live" else "merge",
        spike=record.get("spike") is True,
        row_spans=spans,
        weights=_weights(record.get("weights")),
        group_weights={_text(name): _weights(weights) for name, weights in groups.items()},
        snapshot=_text(record.get("snapshot") or ""),
        losses=_losses(record),
        domains={_text(name): _losses(_mapping(losses)) for name, losses in domains.items()},
        rolled_back=rolled_back,
        passes=_number(record.get("forward_equivalents")),
        **{name: _number(record.get(name)) for name in ("seconds", "longest_pause", "overhead", "steps_saved")},
    )


def _losses(values: dict[str, Any]) -> Losses:
    live, merged = _number(values.get("live_loss")), _number(values.get("merged_loss"))
    gain = _number(values.get("gain"))
    return Losses(live, merged, live - merged if math.isnan(gain) else gain, _number(values.get("gain_stderr")))


# Values of a record; what is not as it should be is not known


def _number(value: Any) -> float:
    try:
        found = float(number(value))
    except (TypeError, ValueError):
        return math.nan
    return found if abs(found) <= _LARGEST else math.nan


def _weights(values: Any) -> list[float]:
    try:
        return [float(value) for value in numbers(values)]
    except (TypeError, ValueError):
        return []


def _span(values: Any) -> Span | None:
    try:
        first, last, samples = (integer(value) for value in sequence(values))
    except (TypeError, ValueError):
        return None
    return Span(first, last, samples)


def _list(values: Any) -> list[Any]:
    return values if isinstance(values, list) else []


def _mapping(values: Any) -> dict[str, Any]:
    return values if isinstance(values, dict) else {}


def _text(value: Any) -> str:
    """A text in characters that can be shown, of bounded length."""
    shown = "".join(
        one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in str(value)[: _LONGEST_TEXT + 1]
    )
    return shown if len(shown) <= _LONGEST_TEXT else f"{shown[:_LONGEST_TEXT]}..."
