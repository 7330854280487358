"""Which held-out sequences are read, and which split each is for.

Sequences next to each other often come from one document, and a merge that was chosen on one does better on the other
than on new text. So the order of the data is cut into a few contiguous runs, which are dealt to the two splits, and the
sequences where two runs of different splits meet are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from torch.utils.data import ConcatDataset, Subset

Split = Literal["search", "report"]
# For each split ranges of positions.
Runs: TypeAlias = dict[Split, list[tuple[int, int]]]

# The order is cut into pairs of runs, at most this many, each of at least this many of the sequences wanted. The second
# of two pairs is mirrored, so that runs of one split meet there, and every pair has one border.
_PAIRS = 4
_PAIR_SEQUENCES = 16
# Left out is this share of the order.
_GAP = 1 / 16


def choose(
    total: int, wanted: int, search_fraction: float, seed: int, runs: Runs | None = None
) -> dict[Split, np.ndarray]:
    """An even sample of ``total`` sequences in order, for each split.

    Args:
        total: how many sequences there are.
        wanted: how many are wanted; fewer come back only where gaps leave fewer.
        search_fraction: share of them for the search split; 0 gives all to the report split.
        seed: for where the sample begins.
        runs: which positions may be taken for each split; by default a few runs with gaps between them.

    Returns:
        Positions below ``total``, ascending, each at most once.
    """
    wanted = min(wanted, total)
    runs = _runs(total, wanted, search_fraction) if runs is None else runs
    to_search = round(wanted * search_fraction)
    if runs["search"]:
        to_search = min(max(to_search, 1), wanted - 1)
    counts: dict[Split, int] = {"search": to_search, "report": wanted - to_search}
    return {split: _even(runs[split], count, seed) for split, count in counts.items()}


def evenly(total: int, wanted: int, seed: int) -> np.ndarray:
    """At most ``wanted`` of ``total`` positions, evenly spread, ascending."""
    return _even([(0, total)], wanted, seed)


def _runs(total: int, wanted: int, search_fraction: float) -> Runs:
    """The runs of each split, as ranges of positions."""
    runs: Runs = {"search": [], "report": []}
    if total < 2 or search_fraction <= 0:
        return {**runs, "report": [(0, total)]}
    pairs = max(1, min(_PAIRS, wanted // _PAIR_SEQUENCES))
    for pair in range(pairs):
        first, end = total * pair // pairs, total * (pair + 1) // pairs
        gap = int(_GAP * (end - first))
        names: tuple[Split, Split] = ("report", "search") if pair % 2 else ("search", "report")
        share = search_fraction if names[0] == "search" else 1 - search_fraction
        border = first + round(share * (end - first - gap))
        border = min(max(border, first + 1), end - gap - 1)
        runs[names[0]].append((first, border))
        runs[names[1]].append((border + gap, end))
    return runs


def _even(runs: list[tuple[int, int]], wanted: int, seed: int) -> np.ndarray:
    """At most ``wanted`` positions of some ranges, evenly spread over them."""
    starts, lengths = np.array(runs, dtype=np.int64).reshape(-1, 2).T.copy()
    lengths -= starts
    total = int(lengths.sum())
    wanted = min(wanted, total)
    if wanted == 0:
        return np.zeros(0, dtype=np.int64)
    offset = int(np.random.default_rng(seed).integers(total))
    picked = np.array([(index * total + offset) // wanted for index in range(wanted)], dtype=np.int64)
    before = np.cumsum(lengths) - lengths
    run = np.searchsorted(before, picked, side="right") - 1
    return starts[run] + picked - before[run]


def in_order(dataset: Any, indices: Sequence[int] | np.ndarray) -> Sequence[int] | np.ndarray:
    """Indices of a dataset, sorted by where their sequences stood before subsets of it were taken or it was shuffled.

    Looked through are ``torch.utils.data.Subset`` (what ``random_split`` gives) and the index mapping of Hugging Face
    datasets (``shuffle``, ``select``, ``train_test_split``).
    """
    positions = indices
    while True:
        if isinstance(dataset, Subset):
            dataset, mapping = dataset.dataset, np.asarray(dataset.indices)
        elif getattr(dataset, "_indices", None) is not None and hasattr(dataset._indices, "column"):
            dataset, mapping = None, np.asarray(dataset._indices.column(0))
        else:
            break
        positions = mapping[np.asarray(positions)]
    if positions is indices:
        return indices if isinstance(indices, range) else np.sort(np.asarray(indices))
    return np.asarray(indices)[np.argsort(positions, kind="stable")]


# Domains of one dataset

# Of a domain's sequences each split has at least this part of its share where runs of other domains are followed.
_MOST_UNEVEN = 0.5
# Datasets that are too large to list are not compared with others.
_MOST_LISTED = 10**7
_SPLITS: tuple[Split, ...] = ("search", "report")
_NEITHER, _FREE = -1, -2


@dataclass(frozen=True)
class Asked:
    """What is wanted of one domain.

    Args:
        dataset: of which sequences are drawn.
        drawn: their indices.
        wanted: how many.
        search_fraction: see :func:`choose`.
    """

    dataset: Any
    drawn: Sequence[int] | np.ndarray
    wanted: int
    search_fraction: float


@dataclass(frozen=True)
class Laid:
    """How the sequences of one domain are dealt.

    Args:
        order: their indices, in order.
        runs: of each split, as ranges of positions in ``order``.
    """

    order: np.ndarray
    runs: Runs


def lay_together(domains: Mapping[str, Asked]) -> dict[str, Laid]:
    """The runs of domains that are parts of one dataset, so that neighbours in any two of them are in one split.

    Looked through are ``Subset``, ``ConcatDataset``, and selections, slices and concatenations of Hugging Face
    datasets. What is never searched on is laid first, then domains of small extent, whose runs larger ones follow. A
    domain that would get too little of a split by following is dealt for itself, as are those that share no dataset:
    they are left out of what is returned.
    """
    compared = {name: one for name, one in domains.items() if len(one.dataset) <= _MOST_LISTED}
    if len(compared) < 2:
        return {}
    places = {name: _sources(one.dataset, np.arange(len(one.dataset))) for name, one in compared.items()}
    holders: dict[Any, list[str]] = {}
    for name, parts in places.items():
        for key in {key for key, _, _ in parts}:
            holders.setdefault(key, []).append(name)
    # One line for all datasets, each far from the next.
    starts = {key: number * 4 * _MOST_LISTED for number, key in enumerate(holders)}
    shared = {name for names in holders.values() if len(names) > 1 for name in names}
    ordered: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name in sorted(shared):
        place = np.empty(len(domains[name].dataset), dtype=np.int64)
        for key, where, positions in places[name]:
            place[where] = starts[key] + positions
        drawn = np.asarray(domains[name].drawn)
        order = drawn[np.argsort(place[drawn], kind="stable")]
        ordered[name] = order, place[order]

    def turn(name: str) -> tuple[bool, int, int]:
        order, place = ordered[name]
        return domains[name].search_fraction > 0, int(place[-1] - place[0]), len(order)

    laid: dict[str, Laid] = {}
    line = _Line()
    for name in sorted(ordered, key=turn):
        order, place = ordered[name]
        runs = line.lay(place, min(domains[name].wanted, len(order)), domains[name].search_fraction)
        if runs is not None:
            laid[name] = Laid(order, runs)
    return laid


def _sources(dataset: Any, positions: np.ndarray) -> list[tuple[Any, np.ndarray, np.ndarray]]:
    """Where sequences of a dataset come from: a key of each source, which of ``positions``, and their places in it."""
    everything = np.arange(len(positions))
    if isinstance(dataset, Subset):
        return _sources(dataset.dataset, np.asarray(dataset.indices)[positions])
    if isinstance(dataset, ConcatDataset):
        ends = np.array(dataset.cumulative_sizes)
        numbers = np.searchsorted(ends, positions, side="right")
        found = []
        for number, (part, end) in enumerate(zip(dataset.datasets, ends, strict=True)):
            mine = np.flatnonzero(numbers == number)
            first = end - len(part)  # type: ignore[arg-type]
            found += [(key, mine[where], place) for key, where, place in _sources(part, positions[mine] - first)]
        return found
    table = getattr(getattr(dataset, "_data", None), "table", None)
    if table is None or not table.num_columns:
        return [(id(dataset), everything, positions)]
    if getattr(dataset, "_indices", None) is not None:
        positions = np.asarray(dataset._indices.column(0))[positions]
    # Slices of a table share the memory of its chunks.
    column = table.column("input_ids" if "input_ids" in table.column_names else 0)
    found, first = [], 0
    for chunk in column.chunks:
        mine = np.flatnonzero((positions >= first) & (positions < first + len(chunk)))
        memory = next((buffer.address for buffer in chunk.buffers() if buffer is not None), id(dataset))
        if len(mine):
            found.append((("memory", memory), mine, positions[mine] - first + chunk.offset))
        first += len(chunk)
    return found


class _Line:
    """Places on a line, and which split has which of its stretches."""

    def __init__(self) -> None:
        # Of each domain, oldest first: first and last places of its stretches, in order, and their splits.
        self._layers: list[tuple[np.ndarray, np.ndarray, np.ndarray, bool]] = []

    def lay(self, places: np.ndarray, wanted: int, search_fraction: float) -> Runs | None:
        """Deal places, ascending, to the splits; None if what is dealt already leaves too little of one."""
        if search_fraction <= 0:
            self._add(places, np.ones(len(places), dtype=np.int64), whole=False)
            return {"search": [], "report": [(0, len(places))]}
        given = self._given(places)
        free = np.flatnonzero(given == _FREE)
        owners = given.copy()
        owners[free] = _NEITHER
        for number, split in enumerate(_SPLITS):
            for first, end in _runs(len(free), wanted, search_fraction)[split]:
                owners[free[first:end]] = number
        pairs = max(1, min(_PAIRS, wanted // _PAIR_SEQUENCES))
        for margin in (max(1, int(_GAP * len(places) / pairs)), 1):
            kept = owners.copy()
            kept[free[self._near_another(places[free], owners[free], margin)]] = _NEITHER
            share = [np.count_nonzero(kept == number) / max(1, len(places)) for number in range(2)]
            fractions = search_fraction, 1 - search_fraction
            if all(one >= _MOST_UNEVEN * fraction for one, fraction in zip(share, fractions, strict=True)):
                self._add(places, kept, whole=True)
                return {split: _ranges(kept == number) for number, split in enumerate(_SPLITS)}
        return None

    def _add(self, places: np.ndarray, owners: np.ndarray, *, whole: bool) -> None:
        """Add a domain's stretches; ``whole``: between two of them nobody is owner."""
        ends = np.flatnonzero(np.diff(owners) != 0) + 1
        if not whole:
            ends = np.union1d(ends, np.flatnonzero(np.diff(places) > 1) + 1)
        first = np.concatenate([[0], ends]).astype(int)
        last = np.concatenate([ends, [len(places)]]).astype(int) - 1
        self._layers.append((places[first], places[last], owners[first], whole))

    def _given(self, places: np.ndarray) -> np.ndarray:
        """The split of each place by what was dealt before."""
        found = np.full(len(places), _FREE, dtype=np.int64)
        for first, last, owners, whole in self._layers:
            at = np.searchsorted(first, places, side="right") - 1
            inside = (at >= 0) & (places <= last[at])
            new = found == _FREE
            found[new & inside] = owners[at[new & inside]]
            if whole:
                found[new & ~inside & (at >= 0) & (places <= last[-1])] = _NEITHER
        return found

    def _near_another(self, places: np.ndarray, owners: np.ndarray, margin: int) -> np.ndarray:
        """Which places have a stretch of another split within a margin."""
        near = np.zeros(len(places), dtype=bool)
        for first, last, of, _ in self._layers:
            below = np.searchsorted(last, places, side="left") - 1
            above = np.searchsorted(first, places, side="right")
            near |= (below >= 0) & (places - last[below] <= margin) & (of[below] == 1 - owners)
            above_one = np.minimum(above, len(first) - 1)
            near |= (above < len(first)) & (first[above_one] - places <= margin) & (of[above_one] == 1 - owners)
        return near & (owners >= 0)


def _ranges(chosen: np.ndarray) -> list[tuple[int, int]]:
    """The stretches of True, as ranges of positions."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]])))
    return [(int(first), int(end)) for first, end in edges.reshape(-1, 2)]
