"""The page of a report: one HTML file that needs nothing else."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .runs import Run

# Of a longer run the table holds the last ones.
_MOST_ROWS = 500


class Section(NamedTuple):
    """A figure on the page.

    Args:
        name, title, caption: of the figure, in plain text.
        svg: the figure itself, which is not escaped; None if there is none, and the caption says why.
    """

    name: str
    title: str
    caption: str
    svg: str | None


def page(runs: list[Run], sections: list[Section]) -> str:
    """The whole page: tables of runs, and figures between them."""
    loader = PackageLoader(__package__, "")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"loss": _loss, "short": _short, "gain": _gain}
    figures = [(one, Markup(one.svg or "")) for one in sections]
    return environment.get_template("page.html").render(
        runs=runs,
        figures=figures,
        most_rows=_MOST_ROWS,
        clearly=_clearly_better,
        written=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        version=importlib.metadata.version("traj-merge-callback"),
    )


def _clearly_better(run: Run) -> int:
    """How many merges are better than live by more than two standard errors."""
    return sum(merge.losses.gain > 2 * merge.losses.stderr for merge in run.merges)


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "\N{EN DASH}"


def _short(value: float) -> str:
    """A number in few digits; an en dash where it is not known."""
    if not math.isfinite(value):
        return "\N{EN DASH}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _gain(gain: float, stderr: float) -> str:
    known = f" ± {stderr:.4f}" if math.isfinite(stderr) else ""
    return _loss(gain) + known
