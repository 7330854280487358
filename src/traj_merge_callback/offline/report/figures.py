"""The figures of a report. One drawing serves light and dark pages: what is drawn in INK takes the page's colour."""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .heatmap import COLORS, ages, colors_of, draw_weights
from .runs import Losses, Merge, Run

#: A colour that nothing else has; :func:`svg` makes it the colour of the page's text.
INK = "#010203"
_LIVE, _MERGED, _SPIKE = "#8b919b", "#2f74e8", "#e5484d"
_RUNS = ("#2f74e8", "#ef7d1a", "#16a37b", "#a45ee5", "#e05295", "#8f8a1d", "#1a9cc0", "#b0684a", "#7c88a3")
_WIDTH = 9.5
# More are in the tables only.
_MOST_DOMAINS, _MOST_GROUPS, _MOST_MAPS = 24, 60, 12
_STYLE = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"), False),
    "axes.grid": True,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "font.size": 9.5,
    "grid.alpha": 0.14,
    "grid.color": INK,
    "lines.linewidth": 1.6,
    "savefig.dpi": 120,
    "svg.fonttype": "none",
    "svg.hashsalt": "traj-merge",
}


class Drawn(NamedTuple):
    """A figure, or why there is none.

    Args:
        name: of its file.
        title: in a few words.
        caption: what is to be seen; where there is no figure, why.
        figure: None if there is nothing to show.
    """

    name: str
    title: str
    caption: str
    figure: Figure | None


@contextmanager
def styled() -> Iterator[None]:
    """The style of all figures, drawn and rendered within."""
    with matplotlib.style.context(["default", _STYLE]):
        yield


def svg(figure: Figure) -> str:
    """A figure as an SVG element for an HTML page, whose text colour it takes."""
    data = io.StringIO()
    figure.savefig(data, format="svg", metadata={"Date": None, "Creator": None})
    text = data.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    used = set(re.findall(r"#([\w-]+)", text))
    return re.sub(r' id="([\w-]+)"', lambda found: found[0] if found[1] in used else "", text)


def png(figure: Figure) -> bytes:
    """A figure as a PNG file, on white."""
    data = io.BytesIO()
    figure.savefig(data, format="png", facecolor="white", metadata={"Software": None})
    figure.set_layout_engine("none")  # which is what takes long, and is the same in every format
    return data.getvalue()


def draw(runs: list[Run]) -> list[Drawn]:
    """All figures of runs, of which at least one has a merge; call it :func:`styled`."""
    with_merges = [run for run in runs if run.merges]
    loss, gain, weights, domains, cost = (
        figure(with_merges) for figure in (_losses, _gains, _weights, _domains, _costs)
    )
    return [loss, gain, weights, *_groups(with_merges), domains, cost]


def _losses(runs: list[Run]) -> Drawn:
    title = "Held-out loss, live and merged"
    if not _known(runs, lambda merge: merge.losses[:2]):
        return Drawn("loss", title, "The records have no losses.", None)
    figure = Figure(figsize=(_WIDTH, 4.2))
    axis = figure.subplots()
    cut = _plot_losses(axis, runs, lambda merge: merge.losses)
    axis.set(xlabel="optimizer step", ylabel="held-out loss (nats per token)")
    _legend(axis, runs)
    caption = (
        "Loss of the live and of the merged weights on the report split, on which no weights were chosen. The band "
        "around the merged loss is two standard errors of its distance from live; it does not say how exact either "
        "loss is by itself."
    )
    return Drawn("loss", title, caption + cut, figure)


def _gains(runs: list[Run]) -> Drawn:
    title = "Gain and steps saved"
    if not _known(runs, lambda merge: (merge.losses.gain, merge.steps_saved)):
        return Drawn("gain", title, "The records have no gains.", None)
    figure = Figure(figsize=(_WIDTH, 3.4))
    left, right = figure.subplots(1, 2)
    for color, run in _colored(runs, _MERGED):
        steps = [merge.step for merge in run.merges]
        gain, stderr = _columns(run, lambda merge: (merge.losses.gain, merge.losses.stderr))
        left.plot(steps, gain, color=color, label=run.name, **_marks(steps))
        _band(left, steps, gain, stderr, color)
        (saved,) = _columns(run, lambda merge: (merge.steps_saved,))
        right.plot(steps, saved, color=color, label=run.name, **_marks(steps))
    left.axhline(0, color=INK, linewidth=0.8, alpha=0.6)
    left.set(title="gain: live - merged (nats per token)", xlabel="optimizer step")
    right.set(title="steps saved", xlabel="optimizer step")
    right.set_ylim(0, max(1.0, right.get_ylim()[1]))
    if len(runs) > 1:
        _handles(left, [(run.name, {"color": color}) for color, run in _colored(runs, _MERGED)])
    caption = (
        "Left: by how much the merge is better than live, with a band of two standard errors. Right: how many steps "
        "ago a merged snapshot was already as good as live is now."
    )
    return Drawn("gain", title, caption, figure)


def _weights(runs: list[Run]) -> Drawn:
    title = "Merge weights by age of rows"
    drawable = [run for run in runs if any(map(ages, run.merges))]
    if not drawable:
        return Drawn("weights", title, "The records say nothing of merge weights.", None)
    shown = drawable[:_MOST_MAPS]
    figure = Figure(figsize=(_WIDTH, 0.5 + 2.7 * len(shown)))
    axes = list(figure.subplots(len(shown), squeeze=False)[:, 0])
    colors = colors_of(merge for run in shown for merge in run.merges)
    for axis, run in zip(axes, shown, strict=True):
        draw_weights(axis, run.merges, colors)
        _mark_events(axis, run, lambda merge: 0.0)
        if len(runs) > 1:
            axis.set_title(run.name)
    bar = ScalarMappable(colors, COLORS)
    figure.colorbar(bar, ax=axes, pad=0.015, aspect=20 * len(shown), extend="both", label="merge weight")
    caption = (
        "A column is a merge, a box one of its rows: the checkpoint, or the mean of checkpoints, of that age. The "
        "deeper the blue, the larger the weight; orange is negative. The strip at the bottom is live itself, the line "
        "above is where rows end."
    )
    if any(merge.group_weights for run in shown for merge in run.merges):
        caption += " Of merges with weights by parameter group those of the whole model are shown."
    if len(drawable) > len(shown):
        caption += f" The first {len(shown)} of {len(drawable)} runs are shown."
    return Drawn("weights", title, caption, figure)


def _groups(runs: list[Run]) -> Iterator[Drawn]:
    """The weights of parameter groups at the last merge of each run that has such."""
    for number, run in enumerate(runs, start=1):
        merge = next((merge for merge in reversed(run.merges) if merge.group_weights), None)
        if merge is None or not (cells := ages(merge)):
            continue
        groups = [(name, weights) for name, weights in merge.group_weights.items() if len(weights) == len(cells)]
        if not (shown := groups[:_MOST_GROUPS]):
            continue
        table = np.array([list(reversed(weights)) for _, weights in shown])
        figure = Figure(figsize=(_WIDTH, 1.4 + 0.24 * len(shown)))
        axis = figure.subplots()
        largest = float(np.abs(table).max()) or 1.0
        picture = axis.imshow(table, cmap=COLORS, vmin=-largest, vmax=largest, aspect="auto", interpolation="none")
        axis.set_yticks(range(len(shown)), [name[:40] for name, _ in shown])
        rows = [f"{young:,.0f}-{old:,.0f}" if old else "live" for young, old, _ in cells]
        axis.set_xticks(range(len(cells)), rows)
        axis.set(xlabel="age of the row in steps")
        axis.grid(False)
        figure.colorbar(picture, ax=axis, pad=0.015, label="merge weight")
        of = f" of {run.name}" if len(runs) > 1 else ""
        caption = f"The weights that each parameter group was merged with at step {merge.step:,}{of}."
        if len(groups) > len(shown):
            caption += f" The first {len(shown)} of {len(groups)} groups are shown."
        yield Drawn(f"groups-{number}", f"Merge weights of parameter groups{of}", caption, figure)


def _domains(runs: list[Run]) -> Drawn:
    title = "Loss by held-out domain"
    names = list(dict.fromkeys(name for run in runs for merge in run.merges for name in merge.domains))
    if not names:
        return Drawn("domains", title, "There is one held-out domain.", None)
    shown = names[:_MOST_DOMAINS]
    columns = min(len(shown), 3)
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(_WIDTH, 0.4 + 2.7 * rows))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    cut = ""
    for axis, name in zip(axes, shown, strict=False):
        cut = _plot_losses(axis, runs, functools.partial(_losses_of, name)) or cut
        axis.set(title=name[:40], xlabel="optimizer step")
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    for axis in axes[::columns]:
        axis.set_ylabel("nats per token")
    caption = "As the first figure, of each named domain, those that are only reported included."
    if len(names) > len(shown):
        caption += f" The first {len(shown)} of {len(names)} domains are shown."
    return Drawn("domains", title, caption + cut, figure)


def _costs(runs: list[Run]) -> Drawn:
    title = "What merges cost"
    if not _known(runs, lambda merge: (merge.seconds, merge.longest_pause, merge.overhead, merge.passes)):
        return Drawn("cost", title, "The records say nothing of what merges cost.", None)
    figure = Figure(figsize=(_WIDTH, 4.8))
    panels: dict[str, Callable[[Merge], float]] = {
        "seconds a merge took from training": lambda merge: merge.seconds,
        "longest pause between two steps (s)": lambda merge: merge.longest_pause,
        "share of wall time so far (%)": lambda merge: 100 * merge.overhead,
        "passes over the search split": lambda merge: merge.passes,
    }
    axes = list(figure.subplots(2, 2, sharex=True).flat)
    for axis, (name, value) in zip(axes, panels.items(), strict=True):
        for color, run in _colored(runs, _MERGED):
            steps = [merge.step for merge in run.merges]
            axis.plot(steps, [value(merge) for merge in run.merges], color=color, **_marks(steps))
        axis.set_title(name)
        axis.set_ylim(bottom=0)
    for axis in axes[2:]:
        axis.set_xlabel("optimizer step")
    if len(runs) > 1:
        _handles(axes[0], [(run.name, {"color": color}) for color, run in _colored(runs, _MERGED)])
    caption = "What each merge took; a candidate is one pass over the search split, with its gradient three."
    return Drawn("cost", title, caption, figure)


# Parts of figures


def _colored(runs: list[Run], alone: str) -> Iterator[tuple[str, Run]]:
    """Each run with its colour."""
    for index, run in enumerate(runs):
        yield alone if len(runs) == 1 else _RUNS[index % len(_RUNS)], run


def _known(runs: list[Run], of: Callable[[Merge], Iterable[float]]) -> bool:
    """Whether any of these values of any merge is known."""
    return any(math.isfinite(value) for run in runs for merge in run.merges for value in of(merge))


def _losses_of(domain: str, merge: Merge) -> Losses:
    return merge.domains.get(domain, Losses(*[math.nan] * 4))


def _columns(run: Run, of: Callable[[Merge], tuple[float, ...]]) -> np.ndarray:
    """Values of all merges, shape ``(number of values, merges)``."""
    return np.array([of(merge) for merge in run.merges], dtype=np.float64).T


def _marks(steps: list[int]) -> dict[str, Any]:
    """A few merges are points too; of many, lines are clearer."""
    return {"marker": "o", "markersize": 3.2} if len(steps) <= 60 else {}


def _plot_losses(axis: Axes, runs: list[Run], losses: Callable[[Merge], Losses]) -> str:
    """Live and merged loss of runs, their spikes and rollbacks.

    Returns:
        A sentence if early losses are not in the picture.
    """
    for color, run in _colored(runs, _MERGED):
        steps = [merge.step for merge in run.merges]
        live, merged, _, stderr = _columns(run, losses)
        own = {"color": _LIVE} if len(runs) == 1 else {"color": color, "linestyle": (0, (4, 2)), "alpha": 0.75}
        axis.plot(steps, live, **own, **_marks(steps))
        axis.plot(steps, merged, color=color, **_marks(steps))
        _band(axis, steps, merged, stderr, color)
        _mark_events(axis, run, lambda merge: losses(merge).live)
    return _cut_early_losses(axis, runs, losses)


def _band(axis: Axes, steps: list[int], values: np.ndarray, stderr: np.ndarray, color: str) -> None:
    """A band of two standard errors; a bar where a value has no neighbours."""
    low, high = values - 2 * stderr, values + 2 * stderr
    axis.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
    known = np.pad(np.isfinite(low), 1)
    alone = known[1:-1] & ~known[:-2] & ~known[2:]
    axis.vlines(np.array(steps)[alone], low[alone], high[alone], color=color, alpha=0.5, linewidth=2)


def _mark_events(axis: Axes, run: Run, height: Callable[[Merge], float]) -> None:
    """A cross at each merge with a spike, a triangle at each since which the run was rolled back."""
    for merges, marker in (
        ([merge for merge in run.merges if merge.spike], "x"),
        ([merge for merge in run.merges if merge.rolled_back], "<"),
    ):
        steps, heights = [merge.step for merge in merges], [height(merge) for merge in merges]
        axis.plot(steps, heights, marker, color=_SPIKE, markersize=6, zorder=4)


def _cut_early_losses(axis: Axes, runs: list[Run], losses: Callable[[Merge], Losses]) -> str:
    """Leave out the steep beginning, where that would press everything later into a line."""
    merges = [merge for run in runs for merge in run.merges]
    found = [(merge.step, loss) for merge in merges for loss in losses(merge)[:2] if math.isfinite(loss)]
    last = max((step for step, _ in found), default=0)
    late = [loss for step, loss in found if step >= last / 4]
    if not late or max(loss for _, loss in found) - min(late) <= 2.5 * (max(late) - min(late)):
        return ""
    room = 0.06 * (max(late) - min(late)) or 0.01
    axis.set_ylim(min(late) - room, max(late) + room)
    return " Losses of the first quarter that are higher are not in the picture."


def _legend(axis: Axes, runs: list[Run]) -> None:
    if len(runs) == 1:
        lines: list[tuple[str, dict[str, Any]]] = [("live", {"color": _LIVE}), ("merged", {"color": _MERGED})]
    else:
        lines = [(run.name, {"color": color}) for color, run in _colored(runs, _MERGED)]
        lines += [("live", {"color": INK, "linestyle": (0, (4, 2))}), ("merged", {"color": INK})]
    events = {"color": _SPIKE, "linestyle": ""}
    if any(merge.spike for run in runs for merge in run.merges):
        lines.append(("spike", {**events, "marker": "x"}))
    if any(merge.rolled_back for run in runs for merge in run.merges):
        lines.append(("rolled back before", {**events, "marker": "<"}))
    _handles(axis, lines)


def _handles(axis: Axes, lines: list[tuple[str, dict[str, Any]]]) -> None:
    # A label that begins with an underscore is left out of legends.
    labels = [f" {label[:40]}" if label.startswith("_") else label[:40] for label, _ in lines]
    axis.legend([Line2D([], [], **look) for _, look in lines], labels, fontsize=8.5, handlelength=2.2)
