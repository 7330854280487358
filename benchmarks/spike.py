"""Live and published losses through two spikes of one real run: a burst of the learning rate, and a poisoned batch.

A small Llama on Python source. Several mergers with different searches step in the same loop, on the same rows. Every
loss is of one report split, the same for all. Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader
from trajectories import VOCABULARY, Spec, blocks_of, put
from transformers.utils import logging as transformers_logging

from traj_merge_callback import TrajectoryMerger

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from realtext import Blocks

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEARCHES = ("auto", "perplexity", "lawa")
KINDS = ("burst", "poison")
EMA_DECAY = 0.99
BATCH = 8
LEARNING_RATE = 1e-3
BURST_FACTOR, BURST_STEPS = 30.0, 10
# The poisoned batch: random bytes, its gradient this much larger and not clipped.
POISON_WEIGHT = 1000.0
MERGE_EVERY = 20
# Nats per byte above the last loss before the spike that count as back there.
BACK = 0.01


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="folder for spike.json and spike.png")
    parser.add_argument("--quick", action="store_true", help="fewer steps and less held-out data")
    parser.add_argument("--seed", type=int, default=0, help="of the model and the order of the data")
    return parser.parse_args()


def train(kind: str, steps: int, spike: int, heldout: Tensor, seed: int) -> dict[str, Any]:
    """One run with a spike after step ``spike``; the losses of live and of every published merge at every merge."""
    spec = Spec("llama", "python", LEARNING_RATE, steps, width=64, layers=2)
    model, averaged = spec.build(), spec.build()
    torch.manual_seed(seed)
    if seed:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
    blocks = blocks_of(spec.text)[0]
    average = parameters_to_vector(model.parameters()).detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
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
        for step in range(1, steps + 1):
            model.train()
            batch = blocks[torch.randint(len(blocks), (BATCH,))]
            poisoned = kind == "poison" and step == spike + 1
            if poisoned:
                batch = torch.randint(VOCABULARY, batch.shape)
            burst = kind == "burst" and spike < step <= spike + BURST_STEPS
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, step / 50) * (BURST_FACTOR if burst else 1.0)
            loss = model(input_ids=batch, labels=batch).loss
            (POISON_WEIGHT * loss if poisoned else loss).backward()
            if not poisoned:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.lerp_(parameters_to_vector(model.parameters()).detach(), 1.0 - EMA_DECAY)
            made = {name: merger.step(model, step) for name, merger in mergers.items()}
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


def draw(runs: dict[str, dict[str, Any]], spike: int, path: Path) -> None:
    """One panel per spike: losses over steps, from some merges before it."""
    figure, axes = plt.subplots(1, len(runs), figsize=(11, 4.2), constrained_layout=True)
    titles = {
        "burst": f"learning rate x{BURST_FACTOR:g} for {BURST_STEPS} steps",
        "poison": "one poisoned batch",
    }
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
        axis.set_title(titles[kind])
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
    for kind in KINDS:
        runs[kind] = train(kind, steps, spike, heldout, args.seed)
        result[kind] = summary(runs[kind], spike)
        print(f"\n{kind}: spike after step {spike} of {steps}")
        for name, row in result[kind].items():
            print(f"  {name:12} {row}")
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
        text = json.dumps({**document, "curves": runs}, indent=1)
        (args.output / "spike.json").write_text(text + "\n")
        draw(runs, spike, args.output / "spike.png")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
