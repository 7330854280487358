"""A picture of one merge: the held-out loss in the plane through live, the average and the best merge of a window.

Needs the trajectories of ``search_quality.py`` (trained first if they are not there). Writes a PNG; its last line is a
JSON object with the losses of the points drawn.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from search_quality import SPECS, Case, windows
from trajectories import load

from traj_merge_callback import Problem
from traj_merge_callback.distributed import Processes
from traj_merge_callback.engine.choose import select
from traj_merge_callback.search import Observed
from traj_merge_callback.search.space import PrincipalAxes
from traj_merge_callback.search.surrogate import SurrogateSearch
from traj_merge_callback.window.pieces import finish

mpl.use("Agg")
import matplotlib.pyplot as plt


class Recorded(SurrogateSearch):
    """A surrogate search whose candidates are written down."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.candidates: list[tuple[np.ndarray, str]] = []

    def tell(self, weights: np.ndarray, loss: float, observed: Observed) -> None:
        """Write down what was evaluated."""
        kind = "loss" if observed.gradients is None else "loss and gradient"
        self.candidates.append((weights, kind + ("" if self.wants_parts != 1 else " on a quarter of the data")))
        super().tell(weights, loss, observed)


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/search.png"))
    parser.add_argument("--grid", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    spec = SPECS[0]
    (trajectory,) = load([spec])
    point = spec.points[0]
    window = next(window for window in windows(spec, point) if window.name == "far")
    case = Case(trajectory, point, window, quick=False)
    search = Recorded(case.problem)
    chosen = finish(
        select(lambda: search, case.problem, case.candidates.measure, case.start(), {}, Processes(alone=True))
    )
    best = case.optimum(chosen.weights if chosen.weights is not None else search.candidates[-1][0]).weights
    assert best is not None

    axes = PrincipalAxes(case.window.gram())
    live, average, optimum = (axes.to_point(w) for w in (case.problem.row(0), axes.middle, best))
    # Orthonormal directions of the plane; distances are those between the models' parameters.
    first = (average - live) / np.linalg.norm(average - live)
    second = optimum - live - first * (first @ (optimum - live))
    second /= np.linalg.norm(second)

    def flat(point: np.ndarray) -> tuple[float, float]:
        return float(first @ (point - live)), float(second @ (point - live))

    shown = [axes.to_point(weights) for weights, _ in search.candidates]
    places = np.array([flat(p) for p in (live, average, optimum, *shown)])
    low, high = places.min(axis=0), places.max(axis=0)
    margin = 0.35 * (high - low).max()
    xs = np.linspace(low[0] - margin, high[0] + margin, arguments.grid)
    ys = np.linspace(low[1] - margin, high[1] + margin, arguments.grid)
    losses = np.array([[case.heldout_part(axes.to_weights(live + x * first + y * second)) for x in xs] for y in ys])

    figure, axis = plt.subplots(figsize=(8, 5.2))
    levels = losses.min() + (losses.max() - losses.min()) * np.linspace(0, 1, 22) ** 2
    filled = axis.contourf(xs, ys, losses, levels=levels, cmap="viridis_r")
    axis.contour(xs, ys, losses, levels=levels, colors="white", linewidths=0.4, alpha=0.6)
    figure.colorbar(filled, label="held-out loss, nats per byte", format="%.2f")
    marks = (
        ("live", live, "o", "right"),
        ("uniform average", average, "s", "right"),
        ("best merge", optimum, "*", "left"),
    )
    for name, at, marker, side in marks:
        axis.plot(*flat(at), marker, color="white", markeredgecolor="black", markersize=16 if marker == "*" else 10)
        offset = (9, 7) if side == "left" else (-9, 7)
        axis.annotate(name, flat(at), xytext=offset, textcoords="offset points", fontweight="bold", ha=side)
    path = np.array([flat(p) for p in shown])
    axis.plot(path[:, 0], path[:, 1], "-", color="tab:red", linewidth=1.5)
    for number, (at, (_, kind)) in enumerate(zip(path, search.candidates, strict=True), start=1):
        axis.plot(*at, "o", color="tab:red", markeredgecolor="black", markersize=8, label=f"{number}: {kind}")
        axis.annotate(str(number), at, xytext=(-4, -16), textcoords="offset points", color="tab:red", fontweight="bold")
    axis.legend(loc="lower left", fontsize=9, title="what the search evaluates")
    axis.set(xlabel="distance between parameters", ylabel="distance between parameters", aspect="equal")
    axis.set_title(f"{spec.name}, step {point}: 8 checkpoints, {window.spacing} steps apart", fontsize=10)
    figure.tight_layout()
    figure.savefig(arguments.output, dpi=120)
    named = {"live": live, "average": average, "best": optimum} | {f"candidate {i}": p for i, p in enumerate(shown, 1)}
    print(json.dumps({name: case.heldout_part(axes.to_weights(at)) for name, at in named.items()}))


if __name__ == "__main__":
    main()
