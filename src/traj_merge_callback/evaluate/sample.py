"""Which held-out sequences are read, and which split each is for.

Sequences next to each other often come from one document, and a merge that was chosen on one does better on the other
than on new text. So the order of the data is cut into a few contiguous runs, which are dealt to the two splits, and the
sequences where two runs of different splits meet are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from torch.utils.data import Subset

Split = Literal["search", "report"]

# The order is cut into pairs of runs, at most this many, each of at least this many of the sequences wanted. The second
# of two pairs is mirrored, so that runs of one split meet there, and every pair has one border.
_PAIRS = 4
_PAIR_SEQUENCES = 16
# Left out is this share of the order.
_GAP = 1 / 16


def choose(total: int, wanted: int, search_fraction: float, seed: int) -> dict[Split, np.ndarray]:
    """An even sample of ``total`` sequences in order, for each split.

    Args:
        total: how many sequences there are.
        wanted: how many are wanted; fewer come back only where gaps leave fewer.
        search_fraction: share of them for the search split; 0 gives all to the report split.
        seed: for where the sample begins.

    Returns:
        Positions below ``total``, ascending, each at most once.
    """
    wanted = min(wanted, total)
    runs = _runs(total, wanted, search_fraction)
    to_search = round(wanted * search_fraction)
    if runs["search"]:
        to_search = min(max(to_search, 1), wanted - 1)
    counts: dict[Split, int] = {"search": to_search, "report": wanted - to_search}
    return {split: _even(runs[split], count, seed) for split, count in counts.items()}


def evenly(total: int, wanted: int, seed: int) -> np.ndarray:
    """At most ``wanted`` of ``total`` positions, evenly spread, ascending."""
    return _even([(0, total)], wanted, seed)


def _runs(total: int, wanted: int, search_fraction: float) -> dict[Split, list[tuple[int, int]]]:
    """The runs of each split, as ranges of positions."""
    runs: dict[Split, list[tuple[int, int]]] = {"search": [], "report": []}
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
