"""Merge weights over the age of rows and the step of merges, as a heat map."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize

from ...search.spans import Span

_NEGATIVE, _POSITIVE = (0.88, 0.36, 0.05), (0.13, 0.42, 0.93)
#: From weights of -1 over none, which shows the background, to 1, in units of the largest weight.
COLORS = LinearSegmentedColormap.from_list(
    "merge weights", [(0, (*_NEGATIVE, 1)), (0.5, (*_NEGATIVE, 0)), (0.5, (*_POSITIVE, 0)), (1, (*_POSITIVE, 1))]
)
# Of a longer run an even selection of merges is drawn: no screen shows more.
_MOST_MERGES = 200
# Share of the weights that are within the range of colours.
_WITHIN = 0.98
# Height of live's strip, as a share of the height for ages.
_STRIP = 0.09


class Weighted(Protocol):
    """A merge's step, and its weights of rows: a :class:`MergeRecord` is one."""

    @property
    def step(self) -> int:
        """Optimizer step."""

    @property
    def row_spans(self) -> Sequence[Span]:
        """Spans of the rows, oldest first."""

    @property
    def weights(self) -> Sequence[float]:
        """Their merge weights."""

    @property
    def source(self) -> str:
        """ "live" where live itself was published."""


def ages(merge: Weighted) -> list[tuple[float, float, float]]:
    """The rows of a merge as ``(youngest age, oldest age, weight)`` in steps, newest first; of live both ages are 0.

    A row reaches from where the next newer one ends to its own oldest checkpoint, so that rows leave no gaps.
    """
    found, above = [], 0.0
    if merge.source == "live" and not any(merge.weights):  # live, being no row
        return [(0.0, 0.0, 1.0)]
    if len(merge.weights) != len(merge.row_spans):
        return []
    for span, weight in zip(reversed(merge.row_spans), reversed(merge.weights), strict=True):
        age = max(0.0, float(merge.step - span.first))
        found.append((min(above, age), age, weight))
        above = max(above, age)
    return found


def colors_of(merges: Iterable[Weighted]) -> Normalize:
    """Colours for the weights of merges: all but a few outliers, which would leave the others pale, differ in them."""
    sizes = [abs(weight) for merge in merges for weight in merge.weights]
    largest = float(np.quantile(sizes, _WITHIN)) if any(sizes) else 1.0
    return Normalize(-(largest or 1.0), largest or 1.0)


def draw_weights(axis: Axes, merges: Sequence[Weighted], colors: Normalize) -> None:
    """Draw the weights of merges into an axis: a column for each merge, ages upwards, live in a strip at the bottom.

    Heights go with the square root of the age: spans of rows grow with age, and each is to be seen.

    Args:
        axis: empty.
        merges: of one run, in the order of their steps.
        colors: see :func:`colors_of`.
    """
    chosen = np.unique(np.linspace(0, len(merges) - 1, _MOST_MERGES).round().astype(int)) if merges else []
    shown = [(merges[index].step, cells) for index in chosen if (cells := ages(merges[index]))]
    if not shown:
        return
    edges = _edges([step for step, _ in shown])
    top = max((math.sqrt(old) for _, cells in shown for _, old, _ in cells), default=0.0) or 1.0
    corners, weights = [], []
    for left, right, (_, cells) in zip(edges, edges[1:], shown, strict=False):
        for young, old, weight in cells:
            low, high = (math.sqrt(young), math.sqrt(old)) if old > 0 else (-_STRIP * top, -0.02 * top)
            corners.append([(left, low), (right, low), (right, high), (left, high)])
            weights.append(weight)
    drawn = PolyCollection(
        corners, array=np.array(weights), cmap=COLORS, norm=colors, linewidths=0, antialiaseds=False, rasterized=True
    )
    axis.add_collection(drawn)
    # How far back rows reach, where the oldest have next to no weight.
    ends = [math.sqrt(max(old for _, old, _ in cells)) for _, cells in shown]
    axis.stairs(ends, edges, color=matplotlib.rcParams["axes.edgecolor"], alpha=0.4, linewidth=0.8)
    axis.set(xlim=(edges[0], edges[-1]), ylim=(-_STRIP * top, top))
    oldest = top**2
    axis.set_yticks(
        [-0.5 * (_STRIP + 0.02) * top, *(math.sqrt(age) for age in _ticks(oldest))],
        ["live", *(f"{age:,g}" for age in _ticks(oldest))],
    )
    axis.set(xlabel="optimizer step", ylabel="age in steps")
    axis.grid(False)


def _edges(steps: list[int]) -> list[float]:
    """Where the columns of merges begin and end: halfway to their neighbours."""
    middles = [(one + other) / 2 for one, other in itertools.pairwise(steps)]
    first = middles[0] - steps[0] if middles else max(steps[0], 1) / 2
    last = steps[-1] - middles[-1] if middles else first
    return [steps[0] - first, *middles, steps[-1] + last]


def _ticks(oldest: float) -> list[float]:
    """Round ages that are far enough apart on an axis of square roots up to ``oldest``, largest first."""
    found: list[float] = []
    for exponent in range(math.ceil(math.log10(max(oldest, 1.0))), -1, -1):
        for digit in (5, 2, 1):
            age = float(digit * 10**exponent)
            share = math.sqrt(age / oldest)
            if share <= 1.0 and all(math.sqrt(other / oldest) - share > 0.13 for other in found) and share > 0.1:
                found.append(age)
    return found
