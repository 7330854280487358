"""What the runs of ``schedules.py`` show: JSON, a table and a plot."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

SCHEDULES = ("constant", "wsd", "cosine")
# The best of a grid, chosen on the numbers reported.
ORACLES = ("best uniform", "best EMA", "best tail-EMA", "best WSM")
OURS = ("default", "5 passes", "groups")
# Where decaying the rate wins less than this, in nats, there is nothing to recover or to forecast.
_DECAY_HELPS = 0.01
LABELS = {
    "default": "this callback, as it comes",
    "5 passes": "this callback, `evaluations=5`",
    "groups": 'this callback, `groups="blocks"`, `evaluations=14`',
    "EMA 5 %": "EMA, half-life 5 % of the run so far (torchtitan)",
    "uniform 500": "uniform mean of the last 500 steps (OLMo-core)",
    "tail-EMA 0.6, 150": "tail-EMA, lambda 0.6, tau 150",
    "LAWA 8 x 50": "LAWA, 8 checkpoints 50 steps apart",
    "pairwise": "pairwise search",
    "best uniform": "best uniform mean of six lengths",
    "best EMA": "best EMA of seven decays",
    "best tail-EMA": "best tail-EMA of 28",
    "best WSM": "best WSM (minus-sqrt) of three windows",
}
SHOWN: dict[str, dict[str, Any]] = {
    "default": {"color": "tab:blue", "linewidth": 2.6},
    "EMA 5 %": {"color": "tab:green", "linewidth": 1.2},
    "EMA 0.99": {"color": "tab:red", "linewidth": 1.2},
    "tail-EMA 0.6, 150": {"color": "tab:purple", "linewidth": 1.2},
    "uniform 500": {"color": "tab:orange", "linewidth": 1.2},
    "best EMA": {"color": "gray", "linewidth": 1.2, "linestyle": "--"},
}


def median(values: list[float]) -> float | None:
    """The median, None of nothing."""
    return statistics.median(values) if values else None


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """How the default compares with every rule, schedule by schedule, and what is forecast of a decay."""
    found: dict[str, Any] = {"schedules": {}}
    for schedule in SCHEDULES:
        points = [p["arms"] for run in runs if run["schedule"] == schedule for p in run["points"]]
        if not points:
            continue
        rows = {}
        for name in dict.fromkeys(name for arms in points for name in arms):
            measured = [arms[name] for arms in points if name in arms]
            behind = [one["behind_default"] for one in measured]
            errors = [one["behind_default_stderr"] for one in measured]
            rows[name] = {
                "points": len(measured),
                "gain": median([one["gain"] for one in measured]),
                "gain_min": min(one["gain"] for one in measured),
                "behind_default": median(behind),
                "behind_default_min": min(behind),
                "clearly_better_than_default": sum(b < -2 * e for b, e in zip(behind, errors, strict=True)),
                "clearly_worse_than_live": sum(one["gain"] < -2 * one["gain_stderr"] for one in measured),
            }
        found["schedules"][schedule] = {"points": len(points), "arms": rows}
    keys = sorted({(*_model(run), run["seed"]) for run in runs})
    decays, unhelpful = [], 0
    for key in keys:
        mine = {run["schedule"]: run for run in runs if (*_model(run), run["seed"]) == key}
        if "constant" not in mine:
            continue
        at = {point["step"]: point["arms"] for point in mine["constant"]["points"]}
        for other in ("twin", "wsd"):
            if other not in mine or mine[other]["points"][-1]["step"] not in at:
                continue
            end = mine[other]["points"][-1]
            decayed, arms = end["arms"]["live"]["loss"], at[end["step"]]
            live = arms["live"]["loss"]
            if live - decayed < _DECAY_HELPS:
                unhelpful += 1
                continue
            decays.append(
                {
                    "trajectory": key[0],
                    "parameters": key[1],
                    "seed": key[2],
                    "step": end["step"],
                    "live": live,
                    "decayed": decayed,
                    "recovery": {name: (live - arms[name]["loss"]) / (live - decayed) for name in arms},
                    "forecast_error": {name: arms[name]["loss"] - decayed for name in (*OURS, "EMA 0.995")},
                }
            )
    if decays:
        recovered: dict[str, list[float]] = {}
        for one in decays:
            for name, value in one["recovery"].items():
                recovered.setdefault(name, []).append(value)
        found["decay_recovery"] = {
            name: {"median": median(values), "min": min(values)} for name, values in recovered.items()
        }
        found["forecast_error"] = {
            name: median([abs(one["forecast_error"][name]) for one in decays]) for name in (*OURS, "EMA 0.995")
        }
    found["decays"], found["decays_that_won_nothing"] = decays, unhelpful
    found["over_seeds"] = {schedule: over_seeds(runs, schedule) for schedule in SCHEDULES}
    ends = [run["points"][-1]["arms"] for run in runs if run["schedule"] == "wsd"]
    gains = [(arms["default"]["gain"], arms["default"]["gain_stderr"]) for arms in ends]
    found["end_of_decay"] = gains and {
        "gain": median([gain for gain, _ in gains]),
        "standard_errors": median([gain / error if error else 0.0 for gain, error in gains]),
    }
    memory = [run["rows_of_memory"] for run in runs if run["rows_of_memory"]]
    found["passes"] = {
        name: {
            "first": median([run["passes"][name][0] for run in runs if run["passes"].get(name)]),
            "later": median([one for run in runs for one in run["passes"].get(name, [])[1:]]),
        }
        for name in memory[0]
    }
    found["rows_of_memory"] = {name: median([one[name] for one in memory]) for name in memory[0]}
    return found


def over_seeds(runs: list[dict[str, Any]], schedule: str) -> dict[str, Any]:
    """How far each arm is behind the default at the end of the runs that differ in the order of the data only."""
    by_model: dict[Any, list[dict[str, Any]]] = {}
    for run in runs:
        if run["schedule"] == schedule:
            by_model.setdefault(_model(run), []).append(run["points"][-1]["arms"])
    ends = max(by_model.values(), key=len, default=[])
    if len(ends) < 2:
        return {}
    found = {}
    for name in ends[0]:
        behind = [arms[name]["behind_default"] for arms in ends if name in arms]
        if len(behind) == len(ends):
            stderr = statistics.stdev(behind) / math.sqrt(len(behind))
            found[name] = {"behind_default": statistics.mean(behind), "stderr": stderr, "seeds": len(behind)}
    return found


def table(found: dict[str, Any]) -> str:
    """The summary for people, as Markdown, best first."""
    schedules = found["schedules"]
    total = sum(one["points"] for one in schedules.values())
    titles = {"constant": "constant rate", "wsd": "WSD", "cosine": "cosine"}
    lines = [
        f"| published instead of live | {' | '.join(titles[name] for name in schedules)} | clearly ahead of ours "
        "| clearly worse than live | decay recovery |",
        f"|---|{'---|' * len(schedules)}---|---|---|",
    ]
    names = list(dict.fromkeys(name for one in schedules.values() for name in one["arms"] if name != "live"))

    def behind(name: str) -> float:
        return statistics.mean(one["arms"][name]["behind_default"] for one in schedules.values() if name in one["arms"])

    for name in sorted(names, key=behind):
        rows = [one["arms"].get(name) for one in schedules.values()]
        label = LABELS.get(name, name)
        label = f"**{label}**" if name in OURS else f"*{label}*" if name in ORACLES else label
        gains = " | ".join("" if row is None else f"{row['gain']:+.4f}" for row in rows)
        there = [row for row in rows if row is not None]
        points = sum(row["points"] for row in there)
        ahead = sum(row["clearly_better_than_default"] for row in there)
        worse = sum(row["clearly_worse_than_live"] for row in there)
        recovered = found.get("decay_recovery", {}).get(name, {}).get("median")
        label += "" if points == total else f" ({points} points)"
        lines.append(
            f"| {label} | {gains} | {ahead} of {points} | {worse} of {points} | "
            f"{'' if recovered is None else f'{recovered:.2f}'} |"
        )
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """What the arms win over live, along the runs: a column a schedule, a row a model with all three schedules."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(map(_model, runs)))
    models = [model for model in models if {run["schedule"] for run in runs if _model(run) == model} >= set(SCHEDULES)]
    figure, grid = plt.subplots(len(models), 3, figsize=(12, 1.0 + 1.9 * len(models)), squeeze=False, sharex="col")
    titles = ("constant rate", "WSD: decays over the last 40 %", "cosine to 10 %")
    for axes, model in zip(grid, models, strict=True):
        highest = 0.0
        for axis, schedule, title in zip(axes, SCHEDULES, titles, strict=True):
            mine = [run for run in runs if run["schedule"] == schedule and _model(run) == model]
            steps = [point["step"] for point in mine[0]["points"]]
            for name, style in SHOWN.items():
                gains = [
                    statistics.mean(run["points"][at]["arms"][name]["gain"] for run in mine) for at in range(len(steps))
                ]
                highest = max(highest, *gains)
                axis.plot(steps, gains, marker="o", markersize=3.5, label=LABELS.get(name, name), **style)
            if schedule == "constant":
                ours = [run for run in runs if _model(run) == model]
                ends = {
                    (run["points"][-1]["step"], run["seed"]): run["points"][-1]["arms"]["live"]["loss"]
                    for run in ours
                    if run["schedule"] in ("twin", "wsd")
                }
                lives = {
                    (point["step"], run["seed"]): point["arms"]["live"]["loss"]
                    for run in mine
                    for point in run["points"]
                }
                for step in sorted({step for step, _ in ends}):
                    both = [key for key in ends if key[0] == step and key in lives]
                    won = statistics.mean(lives[key] - ends[key] for key in both)
                    highest = max(highest, won)
                    label = "live, had its rate decayed until here" if step == steps[-1] else None
                    axis.plot([step], [won], marker="*", markersize=13, color="black", linestyle="", label=label)
            axis.axhline(0.0, color="black", linewidth=0.8)
            axis.grid(alpha=0.3)
            axis.set_title(title if model == models[0] else "", fontsize=10)
            axis.set_xlabel("optimizer step" if model == models[-1] else "")
        for axis in axes:
            axis.set_ylim(-0.5 * highest, 1.1 * highest)
        axes[0].set_ylabel(f"{model[0]}\n{model[1] / 1e6:.1f} M parameters", fontsize=9)
    figure.suptitle("How much lower the held-out loss is than that of the live weights (nats per byte)", fontsize=11)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.2 / len(models), 1, 1))
    figure.savefig(path, dpi=120)


def write(runs: list[dict[str, Any]], output: Path) -> None:
    """What is known so far, as JSON, table and plot."""
    output.mkdir(parents=True, exist_ok=True)
    found = summary(runs)
    path = output / "schedules.json"
    path.with_suffix(".new").write_text(json.dumps(found | {"all_runs": runs}, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".new").replace(path)
    (output / "schedules.md").write_text(table(found) + "\n", encoding="utf-8")
    plot(runs, output / "schedules.png")


def _model(run: dict[str, Any]) -> tuple[str, int]:
    return run["trajectory"], run["parameters"]
