"""How good merge weights are, by every recipe and search, on real trajectories; what the decayed twin reaches.

A case is one point of one trajectory and one window. Every method chooses weights on the same search split, from no
memory, and everything printed is measured on the same report split. Gains are relative to the best affine merge of the
same window, found to convergence on the search split (``BFGS`` from the best point known, until a Newton step is worth
less than a few 1e-6 nats). Prints a table and, as its last line, one JSON object; ``--output`` also draws the plot.

    python benchmarks/search_quality.py --quick                       one small trajectory, under a minute
    python benchmarks/search_quality.py --output benchmarks/results   18 cases, about 70 minutes on 2 cores
    python benchmarks/search_quality.py --only fisher regmean --output benchmarks/results

The last runs these methods alone, and puts them into the results of an earlier run.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import nn
from trajectories import BATCH, Spec, Trajectory, blocks_of, load, prose_blocks, put

from traj_merge_callback import CheckpointWindow, Evaluation, HeldOutLoss, Problem
from traj_merge_callback.distributed import Processes
from traj_merge_callback.engine.choose import Selection, select
from traj_merge_callback.evaluate.by_parameter.fisher import FisherInformation
from traj_merge_callback.evaluate.by_parameter.regmean import RegressionMean
from traj_merge_callback.evaluate.candidate import ByParameter, Candidates, weights_in
from traj_merge_callback.evaluate.heldout import Split, device_of
from traj_merge_callback.evaluate.parking import Parking
from traj_merge_callback.evaluate.weights import installed
from traj_merge_callback.search import Observed, Search, resolve_search
from traj_merge_callback.search.evaluation import Gradient
from traj_merge_callback.search.grouped import GroupedSearch
from traj_merge_callback.search.objective import Objective
from traj_merge_callback.search.space import PrincipalAxes
from traj_merge_callback.search.surrogate import SurrogateSearch
from traj_merge_callback.window.pieces import finish

SPECS = (Spec("llama", "python", 3e-3), Spec("gpt2", "cpp", 1.5e-3), Spec("llama", "cpp", 1e-3))
# Steps of the trajectories that are looked at.
POINTS = (1000, 2000)
QUICK = Spec("llama", "python", 1e-2, steps=240, points=(240,), sample_every=5, width=32, layers=1)
ALONE = Processes(alone=True)
ROWS = 8
DEFAULT = "auto"
# What may be spent by methods without an entry here: what a merge of the library may spend by default.
EVALUATIONS = 9
BUDGETS = {"df-merge": 50, "gp": 50, "greedy": 16, "pairwise": 12, "reach": 12, "sparse": 20, "trajectory": 36}
RECIPES = ("lawa", "ema", "wma", "wsm", "mwa-loss", "mwa-step", "perplexity")
AVERAGES = ("tail-ema", "half-life", "mean-of-steps", "posthoc-ema")
BY_PARAMETER = ("fisher", "regmean", "df-merge")
SEARCHES = ("auto", "trajectory", "reach", "gp", "pairwise", "sparse", "greedy")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, {}) for name in (*SEARCHES, *RECIPES, *AVERAGES, *BY_PARAMETER)
}
LABELS = {
    "auto": "**`auto`**",
    "auto, groups": "`auto` with `groups`",
    "auto, simplex": "`auto` on the simplex",
    "surrogate alone": "its surrogate alone, not evaluated",
    "affine optimum": "the best affine merge, to convergence",
    "per-step ema 0.9": "per-step EMA, decay 0.9",
    "per-step ema 0.99": "per-step EMA, decay 0.99",
    "per-step ema 0.999": "per-step EMA, decay 0.999",
    "bema": "BEMA as in TRL",
}
METHODS["auto, simplex"] = ("auto", {"space": "simplex"})


@dataclass(frozen=True)
class Window:
    """Which rows: ``ROWS`` of them, ``spacing`` steps apart; each a checkpoint or the mean of ``samples``."""

    name: str
    spacing: int
    samples: int = 1


def windows(spec: Spec, point: int) -> list[Window]:
    """The windows studied at a point: near rows, and far or mean rows over half of the steps there have been."""
    far = point // (2 * ROWS) // spec.sample_every * spec.sample_every
    return [
        Window("near", 2 * spec.sample_every),
        Window("far", far),
        Window("mean", far, far // spec.sample_every),
    ]


@cache
def heldout(text: str, quick: bool) -> HeldOutLoss:
    """160 sequences of the run's own text to search on, 320 to report on, and prose that it never sees."""
    search, report, prose = (48, 96, 16) if quick else (160, 320, 96)
    batches = blocks_of(text)[1][: search + report].split(3 * BATCH)
    domains = {"text": batches, "prose": prose_blocks()[:prose].split(2 * BATCH)}
    loaders = {name: [{"input_ids": b, "labels": b} for b in parts] for name, parts in domains.items()}
    fraction = search / (search + report)
    return HeldOutLoss(loaders, batches=10**6, search_fraction=fraction, report_only=["prose"])


class Case:
    """One window at one point of a trajectory."""

    def __init__(self, trajectory: Trajectory, point: int, window: Window, quick: bool) -> None:
        spec = trajectory.spec
        self.model: nn.Module = spec.build()
        self.heldout = heldout(spec.text, quick)
        self.window = CheckpointWindow(self.model, ROWS, mean_rows=window.samples > 1, groups="blocks")
        for age in range(ROWS - 1, -1, -1):
            end = point - age * window.spacing
            for sample in range(window.samples - 1, 0, -1):
                put(self.model, trajectory.at(end - sample * (window.spacing // window.samples)))
                self.window.sample(self.model, end - sample * (window.spacing // window.samples))
            put(self.model, trajectory.at(end))
            self.window.push(self.model, end)
        self.parking = Parking(device_of(self.model), self.window.processes)
        self.weights = weights_in(self.model, self.window, self.heldout.seed, self.parking)
        self.candidates = Candidates(self.weights, self.window, self.heldout)
        self.live_search = self.heldout.evaluate(self.model, "search")
        self.live = self.heldout.evaluate(self.model, "report")
        self.problem = Problem(
            self.window.steps,
            EVALUATIONS - 1,
            Objective.of(self.live_search, ["text"]),
            gram=self.window.gram(),
            batches=self.heldout.num_batches("search"),
            parts=self.heldout.parts,
            spans=self.window.spans if window.samples > 1 else (),
        )

    def choose(self, name: str, options: dict[str, Any], evaluations: int) -> tuple[Evaluation, Selection]:
        """Run a search by name; also what it chose, on the report split."""
        kind = resolve_search(name, options)
        by_parameter: ByParameter | None = None
        if kind.weighing != "rows":
            by_parameter = (
                FisherInformation(self.window, ROWS, self.parking)
                if kind.weighing == "fisher"
                else RegressionMean(self.window, self.model, self.parking)
            )
        candidates = Candidates(self.weights, self.window, self.heldout, by_parameter)
        learnt = finish(candidates.learn())
        problem = replace(self.problem, evaluations=evaluations - 1 - math.ceil(learnt), memory={})
        build: Callable[..., Search] = kind
        search = build(problem, **options)
        chosen = finish(select(lambda: search, problem, candidates.measure, self.start(), {}, ALONE))
        chosen = replace(chosen, forward_equivalents=chosen.forward_equivalents + learnt)
        if chosen.weights is None:
            return self.live, chosen
        finish(candidates.load(chosen.weights))
        return finish(candidates.evaluate("report")), chosen

    def choose_grouped(self, chosen: Selection) -> Selection:
        """Go on to weights for each parameter group, three steps at most."""
        assert chosen.weights is not None
        problem = replace(self.problem, evaluations=3 * GroupedSearch.cost, gram=self.window.gram(grouped=True))
        search = GroupedSearch(problem, chosen.weights)
        return finish(select(lambda: search, problem, self.candidates.measure, chosen, {}, ALONE))

    def measure(
        self, weights: np.ndarray, parts: Sequence[int], *, gradient: bool = True
    ) -> tuple[Evaluation, Gradient | None]:
        """Evaluate a merge on parts of the search split."""
        return finish(self.candidates.measure(weights, gradient, parts, lambda _: False))

    def evaluate(self, weights: np.ndarray, split: Split) -> Evaluation:
        """Evaluate a merge on a split."""
        finish(self.candidates.load(weights))
        return finish(self.candidates.evaluate(split))

    def surrogate_alone(self) -> Selection:
        """What the surrogate proposes after gradients on two of the split's four parts, taken at its word."""
        objective = self.problem.objective
        search = SurrogateSearch(self.problem)
        chosen = None
        for part in range(2):
            weights = search.ask()
            assert weights is not None
            evaluation, gradient = self.measure(weights, [part])
            assert gradient is not None
            losses = objective.losses(evaluation) + objective.live
            losses -= objective.losses(self.live_search.on(evaluation.indices))
            search.tell(weights, float(losses[0]), Observed(losses, objective.gradients(gradient), gradient))
            chosen = search.ask()
        assert chosen is not None
        loss = self.evaluate(chosen, "search").loss
        return Selection(chosen, loss, None, forward_equivalents=1.0 + 2 * 3.0 / self.heldout.parts)

    def optimum(self, start: np.ndarray) -> Selection:
        """The best affine merge on the search split, to convergence."""
        axes = PrincipalAxes(self.window.gram())
        # Scaled so that the inverse Hessian which BFGS begins with is nearly right.
        shape = axes.curvatures(0.6)
        scale = 1.0 / np.sqrt(0.14 * shape / float(shape @ np.square(axes.to_point(self.problem.row(0)))))
        origin = axes.to_point(start)

        def loss(u: np.ndarray) -> tuple[float, np.ndarray]:
            weights = axes.to_weights(origin + scale * u)
            evaluation, gradient = self.measure(weights, range(self.heldout.parts))
            assert gradient is not None
            return evaluation.loss, scale * (axes.axes.T @ gradient.of(frozenset(["text"])))

        found = minimize(loss, np.zeros(len(origin)), jac=True, method="BFGS", options={"gtol": 1e-3, "maxiter": 30})
        weights = axes.to_weights(origin + scale * found.x)
        return Selection(weights, float(found.fun), None, forward_equivalents=3.0 * found.nfev)

    def heldout_part(self, weights: np.ndarray) -> float:
        """The loss on one part of the search split."""
        return self.measure(weights, [0], gradient=False)[0].loss

    def report(self, weights: np.ndarray | None) -> Evaluation:
        """A merge on the report split."""
        return self.live if weights is None else self.evaluate(weights, "report")

    def report_row(self, row: np.ndarray) -> Evaluation:
        """Other weights on the report split."""
        with installed(self.window.layout, self.model, torch.from_numpy(row)):
            return self.heldout.evaluate(self.model, "report")

    def start(self) -> Selection:
        """Where a search starts: live."""
        return Selection(None, self.live_search.loss, self.live_search)


def study(trajectory: Trajectory, point: int, window: Window, quick: bool, only: Sequence[str]) -> dict[str, Any]:
    """All methods on one case; with ``only`` these, the default and the optimum."""
    started = time.perf_counter()
    case = Case(trajectory, point, window, quick)
    finals = trajectory.finals[point]
    decayed = case.report_row(finals["decayed"])
    found: dict[str, tuple[Evaluation, Selection | None]] = {}
    for name, (search, options) in METHODS.items():
        # Methods that weigh each parameter merge single checkpoints.
        possible = window.samples == 1 or name not in BY_PARAMETER
        if possible and (not only or name in (DEFAULT, *only)):
            budget = EVALUATIONS if quick else BUDGETS.get(name, EVALUATIONS)
            found[name] = case.choose(search, options, budget)
    default = found[DEFAULT][1]
    assert default is not None
    optimum = case.optimum(np.full(ROWS, 1 / ROWS) if default.weights is None else default.weights)
    found["affine optimum"] = case.report(optimum.weights), optimum
    if not only:
        surrogate = case.surrogate_alone()
        found["surrogate alone"] = case.report(surrogate.weights), surrogate
        if default.weights is not None:
            grouped = case.choose_grouped(default)
            found["auto, groups"] = case.report(grouped.weights), grouped
        for name, row in finals.items():
            if name != "decayed":
                found[f"per-step {name}" if name.startswith("ema") else name] = case.report_row(row), None

    def losses(evaluation: Evaluation) -> dict[str, float]:
        return {name: evaluation.only({name}).loss for name in ("text", "prose")}

    text = {"text"}
    live, best, twin = losses(case.live), losses(found["affine optimum"][0]), losses(decayed)
    methods = {}
    for name, (evaluation, selection) in found.items():
        loss = losses(evaluation)
        gained = live["text"] - loss["text"]
        behind, stderr = evaluation.only(text).gain_of(found["affine optimum"][0].only(text))
        methods[name] = {
            "loss": loss["text"],
            "prose": loss["prose"],
            "gain_recovered": gained / (live["text"] - best["text"]),
            "behind_optimum": behind,
            "behind_optimum_stderr": stderr,
            "decay_recovery": gained / (live["text"] - twin["text"]),
            "behind_default_stderr": evaluation.only(text).gain_of(found[DEFAULT][0].only(text))[1],
        }
        if selection is not None:
            gain = case.live_search.loss - selection.loss
            methods[name] |= {
                "search_gain_recovered": gain / (case.live_search.loss - optimum.loss),
                "forward_equivalents": selection.forward_equivalents,
            }
    return {
        "trajectory": trajectory.spec.name,
        "point": point,
        "window": window.name,
        "spacing": window.spacing,
        "samples": window.samples,
        "live": live,
        "decayed": twin,
        "methods": methods,
        "seconds": time.perf_counter() - started,
    }


def _study(arguments: tuple[Spec, int, Window, bool, Sequence[str]]) -> dict[str, Any]:
    spec, point, window, quick, only = arguments
    case = study(load([spec])[0], point, window, quick, only)
    print(
        f"{case['trajectory']:<20} {point:>5} {window.name:<5} live {case['live']['text']:.4f} decayed "
        f"{case['decayed']['text']:.4f} default {case['methods'][DEFAULT]['loss']:.4f} recovered "
        f"{case['methods'][DEFAULT]['gain_recovered']:.3f} at {case['methods'][DEFAULT]['forward_equivalents']:.2f}, "
        f"{case['seconds']:.0f} s",
        flush=True,
    )
    return case


def with_earlier(cases: list[dict[str, Any]], path: Path, only: Sequence[str]) -> list[dict[str, Any]]:
    """The cases of an earlier run, with some methods of this one.

    Raises:
        ValueError: the cases are not the same.
    """
    earlier: list[dict[str, Any]] = json.loads(path.read_text())["all_cases"]
    for old, new in zip(earlier, cases, strict=True):
        same = all(old[key] == new[key] for key in ("trajectory", "point", "window", "spacing", "samples"))
        if not same or not math.isclose(old["live"]["text"], new["live"]["text"], abs_tol=1e-6):
            raise ValueError(f"{path} is of other cases: make all of it anew, without --only")
        old["methods"] |= {name: new["methods"][name] for name in only if name in new["methods"]}
    return earlier


def summary(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and worst cases over all cases."""

    def over(name: str, key: str, chosen: Callable[[dict[str, Any]], bool] = lambda _: True) -> list[float]:
        return [case["methods"][name][key] for case in cases if name in case["methods"] and chosen(case)]

    methods: dict[str, Any] = {}
    for name in cases[0]["methods"]:
        recovered = over(name, "gain_recovered")
        methods[name] = {
            "gain_recovered": statistics.median(recovered),
            "gain_recovered_min": min(recovered),
            "forward_equivalents": None,
            "decay_recovery": statistics.median(over(name, "decay_recovery")),
            "decay_recovery_mean_rows": None,
            "prose_worse_than_live": sum(
                case["methods"][name]["prose"] > case["live"]["prose"] for case in cases if name in case["methods"]
            ),
        }
        if mean_rows := over(name, "decay_recovery", lambda case: case["window"] == "mean"):
            methods[name]["decay_recovery_mean_rows"] = statistics.median(mean_rows)
        if "forward_equivalents" in cases[0]["methods"][name]:
            on_search, cost = over(name, "search_gain_recovered"), over(name, "forward_equivalents")
            methods[name] |= {
                "forward_equivalents": statistics.median(cost),
                "forward_equivalents_max": max(cost),
                "search_gain_recovered": statistics.median(on_search),
                "search_gain_recovered_min": min(on_search),
            }
        if name != DEFAULT:
            # A method beats the default in a case if it is better there by more than two standard errors.
            ahead = [
                case["methods"][DEFAULT]["loss"] - case["methods"][name]["loss"]
                > 2 * case["methods"][name]["behind_default_stderr"]
                for case in cases
                if name in case["methods"]
            ]
            methods[name]["cases_better_than_default"] = sum(ahead)
    return {
        "methods": methods,
        "default": DEFAULT,
        "cases": len(cases),
        "trajectories": sorted({case["trajectory"] for case in cases}),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread a case, torch {torch.__version__}",
    }


def table(found: dict[str, Any]) -> str:
    """The summary for people, best first, as the Markdown that stands in docs/search.md."""
    lines = [
        "| how weights are chosen | gain recovered, median | worst | passes | decay recovery | with mean rows |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in sorted(found["methods"].items(), key=lambda item: -item[1]["gain_recovered"]):
        cost = "" if row["forward_equivalents"] is None else f"{row['forward_equivalents']:.2f}"
        mean_rows = "" if row["decay_recovery_mean_rows"] is None else f"{row['decay_recovery_mean_rows']:.3f}"
        label = LABELS.get(name, f"`{name}`")
        lines.append(
            f"| {label} | {row['gain_recovered']:.3f} | {row['gain_recovered_min']:.3f} | {cost} | "
            f"{row['decay_recovery']:.3f} | {mean_rows} |"
        )
    return "\n".join(lines)


def plot(cases: list[dict[str, Any]], path: Path) -> None:
    """Gain recovered over cost, every case and every median."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4))
    names = ["auto", "surrogate alone", "trajectory", "reach", "gp", "pairwise", "greedy", "lawa", "ema", "wsm"]
    for index, name in enumerate(names):
        color = plt.get_cmap("tab10")(index)
        cost = [case["methods"][name]["forward_equivalents"] for case in cases]
        recovered = [max(case["methods"][name]["gain_recovered"], -0.1) for case in cases]
        left.scatter(cost, recovered, s=10, color=color, alpha=0.35, linewidths=0)
        median = statistics.median(cost), statistics.median(recovered)
        left.scatter(*median, s=90, color=color, edgecolors="black", label=name, zorder=3)
    left.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    left.set(xscale="log", xlabel="cost of a merge, passes over the search split", ylabel="gain recovered")
    left.set_xticks([2, 3, 6, 12, 20, 50], ["2", "3", "6", "12", "20", "50"])
    left.minorticks_off()
    left.set_title("share of the best affine merge's gain, on the report split")
    left.legend(fontsize=8, loc="lower right")
    means = [case for case in cases if case["window"] == "mean"]
    labels = [f"{case['trajectory']}\nstep {case['point']}" for case in means]
    shown = ["lawa", "per-step ema 0.99", "gp", "auto", "auto, groups"]
    for offset, name in enumerate(shown):
        heights = [max(case["methods"].get(name, case["methods"]["auto"])["decay_recovery"], -0.1) for case in means]
        places = np.arange(len(means)) + (offset - 2) * 0.16
        right.bar(places, heights, width=0.15, label=name)
    right.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    right.set_xticks(range(len(means)), labels, fontsize=6.5, rotation=35, ha="right")
    right.set(ylabel="decay recovery")
    right.set_title("eight mean rows; 1: as good as decaying the rate")
    right.legend(fontsize=8, loc="upper right")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train or load the trajectories, study every case, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small trajectory, near and mean rows")
    parser.add_argument("--output", type=Path, help="folder for search_quality.json, .md and .png")
    parser.add_argument("--only", nargs="+", choices=sorted(METHODS), default=[], help="methods; needs --output")
    arguments = parser.parse_args()
    if arguments.only and not arguments.output:
        parser.error("--only needs --output, the folder with the results of an earlier run")
    specs = [QUICK] if arguments.quick else list(SPECS)
    load(specs)
    work = [
        (spec, point, window, arguments.quick, arguments.only)
        for spec in specs
        for point in (spec.points if arguments.quick else POINTS)
        for window in windows(spec, point)[:: 2 if arguments.quick else 1]
    ]
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        cases = list(pool.map(_study, work))
    if arguments.only:
        cases = with_earlier(cases, arguments.output / "search_quality.json", arguments.only)
    found = summary(cases)
    print("\n" + table(found) + "\n")
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        document = json.dumps(found | {"all_cases": cases}, indent=1)
        (arguments.output / "search_quality.json").write_text(document + "\n")
        (arguments.output / "search_quality.md").write_text(table(found) + "\n")
        plot(cases, arguments.output / "search_quality.png")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
