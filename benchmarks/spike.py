"""Loss spikes of real runs: what is published through them, and ways out of them.

A small Llama on Python source. The first part lets several mergers with different searches step in the same loop, on
the same rows. The second part compares runs: training on, ``on_spike="rollback"``, and reloading the last checkpoint.
Every loss is of one report split, the same for all. Prints tables; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from faults.recovery import ARMS, BATCH, BURST_FACTOR, BURST_STEPS, KINDS, MERGE_EVERY, SpikedRun, recover
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader
from trajectories import blocks_of, put
from transformers.utils import logging as transformers_logging

from realtext import Blocks
from traj_merge_callback import TrajectoryMerger

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEARCHES = ("auto", "perplexity", "lawa")
EMA_DECAY = 0.99
# Nats per byte above the last loss before the spike that count as back there.
BACK = 0.01
SEEDS = (0, 1, 2)
# Kinds of spikes through which merges are published that differ; weights that are no numbers have none.
PUBLISHED = ("burst", "poison")
TITLES = {
    "burst": f"learning rate x{BURST_FACTOR:g} for {BURST_STEPS} steps",
    "poison": "one poisoned batch",
    "overflow": "bfloat16 overflow in one step",
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="folder for spike.json and spike.png")
    parser.add_argument("--quick", action="store_true", help="fewer steps and less held-out data")
    parser.add_argument("--seed", type=int, default=0, help="of the model and the order of the data")
    return parser.parse_args()


def train(kind: str, steps: int, spike: int, heldout: Tensor, seed: int) -> dict[str, Any]:
    """One run with a spike after step ``spike``; the losses of live and of every published merge at every merge."""
    run = SpikedRun(kind, steps, spike, seed)
    model, averaged = run.model, run.spec.build()
    average = parameters_to_vector(model.parameters()).detach().clone()
    with tempfile.TemporaryDirectory() as folder:
        mergers = {
            name: TrajectoryMerger(
                DataLoader(Blocks(heldout), BATCH),
                search=name,
                name=name,
                output_dir=f"{folder}/{name}",
                row="multiscale",
                window_size=6,
                capture_every=MERGE_EVERY,
                samples_per_row=5,
                merge_every=MERGE_EVERY,
                heldout_batches=len(heldout) // BATCH,
                schedule="blocking",
                keep_last=0,
                keep_best=False,
                merge_at_end=False,
                progress=False,
            )
            for name in SEARCHES
        }
        report = next(iter(mergers.values())).heldout
        found: dict[str, Any] = {"steps": [], "live": [], "ema": [], **{name: [] for name in SEARCHES}}
        found["passes"] = {name: [] for name in SEARCHES}
        for step, loss in run:
            average.lerp_(parameters_to_vector(model.parameters()).detach(), 1.0 - EMA_DECAY)
            made = {name: merger.step(model, step, loss=loss) for name, merger in mergers.items()}
            records = {name: record for name, record in made.items() if record is not None}
            if len(records) == len(SEARCHES):
                found["steps"].append(step)
                found["live"].append(records["auto"].live_loss)
                for name, record in records.items():
                    found[name].append(record.merged_loss)
                    found["passes"][name].append(record.forward_equivalents)
                put(averaged, average)
                found["ema"].append(report.evaluate(averaged, "report").loss)
        for merger in mergers.values():
            merger.close()
    return found


def summary(found: dict[str, Any], spike: int) -> dict[str, Any]:
    """Per curve: the loss before the spike, the highest since, and the steps until it is back for good.

    The first merge after the spike is 15 steps after it: no curve can be back sooner.
    """
    steps = np.array(found["steps"])
    lives = np.array(found["live"])[steps <= spike][-1]
    rows: dict[str, Any] = {}
    for name in ("live", "ema", *SEARCHES):
        losses = np.array(found[name])
        before, after = losses[steps <= spike][-1], losses[steps > spike]
        rows[name] = {
            "before": round(float(before), 4),
            "highest": round(float(after.max()), 4),
            "at_the_end": round(float(after[-1]), 4),
            "mean_after": round(float(after.mean()), 4),
            "steps_until_back": _until(after, before, steps[steps > spike] - spike),
            "steps_until_where_live_was": _until(after, lives, steps[steps > spike] - spike),
        }
    others = np.min([found[name] for name in ("live", *SEARCHES[1:])], axis=0)
    behind = np.array(found["auto"]) - others
    later = steps > spike
    rows["auto_behind_the_best_of_live_perplexity_lawa"] = {
        "worst": round(float(behind[later].max()), 4),
        "merges_behind_by_more_than_0.002": int((behind[later] > 0.002).sum()),
        "merges": int(later.sum()),
        "most_passes": round(float(max(found["passes"]["auto"])), 2),
    }
    return rows


def _until(losses: np.ndarray, level: float, steps: np.ndarray) -> int | None:
    """The step from which on losses are at a level, give or take ``BACK``, or below; None if they never are."""
    away = np.flatnonzero(losses > level + BACK)
    first = away[-1] + 1 if len(away) else 0
    return int(steps[first]) if first < len(steps) else None


def ways_out(steps: int, spike: int, heldout: Tensor, seeds: Sequence[int]) -> dict[str, dict[str, list[Any]]]:
    """By kind of spike and way out, one run for each seed."""
    tasks = [(kind, arm, seed) for kind in KINDS for arm in ARMS for seed in seeds]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        runs = [pool.submit(recover, kind, arm, steps, spike, heldout, seed) for kind, arm, seed in tasks]
        found: dict[str, dict[str, list[Any]]] = {kind: {arm: [] for arm in ARMS} for kind in KINDS}
        for (kind, arm, _), run in zip(tasks, runs, strict=True):
            found[kind][arm].append(run.result())
    return found


def summary_of_ways_out(runs: dict[str, list[Any]], spike: int) -> dict[str, Any]:
    """Per way out: steps until live is back where it was before the spike, and live at the end, of each seed."""
    rows: dict[str, Any] = {}
    for arm, seeds in runs.items():
        backs, ends = [], []
        for run in seeds:
            steps, live = np.array(run["steps"]), np.nan_to_num(np.array(run["live"]), nan=np.inf)
            backs.append(_until(live[steps > spike], live[steps <= spike][-1], steps[steps > spike] - spike))
            ends.append(round(float(live[-1]), 4) if np.isfinite(live[-1]) else None)
        rows[arm] = {"steps_until_back": backs, "at_the_end": ends, "back_at": [run["back_at"] for run in seeds]}
    return rows


def draw_ways_out(runs: dict[str, dict[str, list[Any]]], spike: int, path: Path) -> None:
    """One panel per spike: live's loss over steps, of the first seed."""
    figure, axes = plt.subplots(1, len(runs), figsize=(14, 4.2), constrained_layout=True)
    styles = dict(zip(ARMS, ("k:", "C0-", "C1-", "C2--"), strict=True))
    for axis, (kind, arms) in zip(axes, runs.items(), strict=True):
        for arm, seeds in arms.items():
            steps, live = np.array(seeds[0]["steps"]), np.array(seeds[0]["live"])
            shown = steps >= spike - 3 * MERGE_EVERY
            axis.plot(steps[shown], live[shown], styles[arm], label=arm, linewidth=2 if arm == "rollback" else 1.3)
        axis.axvline(spike, color="C3", linewidth=0.8)
        axis.set_title(TITLES[kind])
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out loss of live (nats per byte)")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def draw(runs: dict[str, dict[str, Any]], spike: int, path: Path) -> None:
    """One panel per spike: losses over steps, from some merges before it."""
    figure, axes = plt.subplots(1, len(runs), figsize=(11, 4.2), constrained_layout=True)
    for axis, (kind, found) in zip(np.atleast_1d(axes), runs.items(), strict=True):
        shown = np.array(found["steps"]) >= spike - 5 * MERGE_EVERY
        for name, style in (("live", "k:"), ("ema", "C7-"), ("lawa", "C2-"), ("perplexity", "C1-"), ("auto", "C0-")):
            label = f"EMA {EMA_DECAY}, every step" if name == "ema" else name
            values = np.array(found[name])[shown]
            axis.plot(
                np.array(found["steps"])[shown], values, style, label=label, linewidth=2 if name == "auto" else 1.3
            )
        axis.axvline(spike, color="C3", linewidth=0.8)
        axis.set_ylim(top=1.03 * max(np.array(found["live"])[shown]))
        axis.set_title(TITLES[kind])
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3, which="major")
    np.atleast_1d(axes)[0].set_ylabel("held-out loss, report split (nats per byte)")
    np.atleast_1d(axes)[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Both runs."""
    args = arguments()
    transformers_logging.set_verbosity_error()
    logging.getLogger("traj_merge_callback").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    steps, spike = (120, 65) if args.quick else (600, 165)
    heldout = blocks_of("python")[1][: 48 if args.quick else 96]
    began, runs, result = time.perf_counter(), {}, {}
    for kind in PUBLISHED:
        runs[kind] = train(kind, steps, spike, heldout, args.seed)
        result[kind] = summary(runs[kind], spike)
        print(f"\n{kind}: spike after step {spike} of {steps}")
        for name, row in result[kind].items():
            print(f"  {name:12} {row}")
    out = ways_out(120 if args.quick else 400, spike, heldout, SEEDS[:1] if args.quick else SEEDS)
    result["ways_out"] = {kind: summary_of_ways_out(arms, spike) for kind, arms in out.items()}
    for kind, arms in result["ways_out"].items():
        print(f"\n{kind}: ways out of a spike after step {spike}")
        for arm, row in arms.items():
            print(f"  {arm:24} {row}")
    document = {
        "seconds": round(time.perf_counter() - began, 1),
        "seed": args.seed,
        "torch": torch.__version__,
        "steps": steps,
        "spike_after_step": spike,
        "merge_every": MERGE_EVERY,
        "results": result,
    }
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**document, "curves": {**runs, "ways_out": out}}, indent=1)
        (args.output / "spike.json").write_text(text + "\n")
        draw(runs, spike, args.output / "spike.png")
        draw_ways_out(out, spike, args.output / "spike_ways_out.png")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
