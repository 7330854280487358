"""What merging gives while a run goes on, under the schedules people run, and what each rival gives on the same run.

Every trajectory is trained under a constant rate, a rate that decays over the last 40 % (WSD) and a cosine, and as a
twin that decays to the middle of the run. All arms see the same weights: running averages after every optimizer step,
each with its real rule or as the best of a grid (an oracle, tuned on the numbers reported), and mergers that go along
with all their defaults but the two intervals. Every arm is measured on held-out sequences that no merger has seen, in
nats per byte, with standard errors of paired differences. The last line is one JSON object.

    python benchmarks/schedules.py --quick                       one tiny trajectory, about a minute
    python benchmarks/schedules.py --output benchmarks/results   three trajectories and three sizes, many hours

With ``--output`` every finished run is kept in ``schedules.json`` at once: interrupted, the same command goes on with
the runs that are missing. The first runs are the small ones.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from schedules_report import SCHEDULES, summary, table, write
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from trajectories import BATCH, WARM_UP, Spec, blocks_of, put

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
from traj_merge_callback import TrajectoryMerger
from traj_merge_callback.search.recipes import half_life_rate, wsm

MERGE_EVERY = 100
DECAY = 0.4
# Half-lives of the EMAs in optimizer steps; by name those with the decays that people set.
HALF_LIVES = (10, 20, 40, 100, 150, 250, 400)
NAMED = {"EMA 0.99": 69.0, "EMA 0.995": 138.3, "EMA 0.999": 692.8}
LENGTHS = (50, 100, 200, 300, 500, 800)
WSM_SPACINGS = (25, 50, 100)
LAMBDAS = (0.2, 0.4, 0.6, 0.8)
MERGERS: dict[str, dict[str, Any]] = {
    "default": {},
    "5 passes": {"evaluations": 5},
    "groups": {"groups": "blocks", "evaluations": 14},
    # Seldom, because its Gaussian process is slow.
    "pairwise": {"search": "pairwise", "evaluations": 12, "merge_every": 4 * MERGE_EVERY},
}


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        spec: the model, the text, the rate and the number of steps.
        schedule: "constant", "wsd", "cosine" or "twin": constant, then decaying to zero by the middle of the run.
        seed: of the data order.
        device: to train on.
        search, report: held-out sequences that mergers choose weights on, and that everything is measured on.
    """

    spec: Spec
    schedule: str
    seed: int
    device: str
    search: int = 160
    report: int = 640

    @property
    def identity(self) -> str:
        """What tells it from all other runs."""
        spec = self.spec
        return f"{spec.name}, {spec.width}x{spec.layers}, {spec.steps} steps, {self.schedule}, seed {self.seed}"

    @property
    def steps(self) -> int:
        """Optimizer steps of this run."""
        return self.spec.steps // 2 if self.schedule == "twin" else self.spec.steps

    @property
    def points(self) -> list[int]:
        """Steps at which everything is measured, multiples of the merge interval."""
        if self.schedule == "twin":
            return [self.steps]
        shares = [0.25, 0.5, 0.75, 1.0]
        if self.schedule == "wsd":
            shares = [0.5, *(1 - DECAY * (1 - done) for done in (0.125, 0.25, 0.5, 0.75, 0.875, 1.0))]
        return [max(1, round(self.steps * share / MERGE_EVERY)) * MERGE_EVERY for share in shares]

    def rate(self, step: int) -> float:
        """The learning rate of a step, the first being 1."""
        share, peak = step / self.steps, self.spec.learning_rate * min(1.0, step / WARM_UP)
        if self.schedule == "cosine":
            return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))
        if self.schedule == "constant":
            return peak
        return peak * min(1.0, (1 - share + 1 / self.steps) / DECAY)


class Averages:
    """The rivals' running averages, kept after every step as they say."""

    def __init__(self, start: Tensor, points: list[int]) -> None:
        self.half_lives = [*map(float, HALF_LIVES), 104.0, *NAMED.values()]
        self.emas = start.repeat(len(self.half_lives), 1)
        self.rates = 1 - 0.5 ** (1 / torch.tensor(self.half_lives, device=start.device))[:, None]
        self.anytime = start.clone()
        self.total = torch.zeros_like(start, dtype=torch.float64)
        self.points = points
        self.totals: dict[int, Tensor] = {}
        self.checkpoints: dict[int, Tensor] = {}

    def update(self, row: Tensor, step: int) -> None:
        """One more optimizer step was taken."""
        self.emas.lerp_(row.expand_as(self.emas), self.rates)
        self.anytime.lerp_(row, half_life_rate(step))
        self.total.add_(row)
        if any(step in (point, *(point - length for length in LENGTHS)) for point in self.points):
            self.totals[step] = self.total.clone()
        if step % min(WSM_SPACINGS) == 0:
            self.checkpoints[step] = row.clone()
            self.checkpoints = {s: kept for s, kept in self.checkpoints.items() if s > step - 8 * max(WSM_SPACINGS)}

    def arms(self, row: Tensor, step: int) -> dict[str, list[Tensor]]:
        """By name the averages of a rule; of an oracle all that it chooses from."""
        uniform = {
            length: ((self.total - self.totals[step - length]) / length).float()
            for length in LENGTHS
            if step - length in self.totals
        }
        longest = uniform[max(length for length in uniform if length <= 500)]
        half_lives = dict(zip(self.half_lives, self.emas, strict=True))
        plain = [half_lives[float(half_life)] for half_life in HALF_LIVES]
        tails = [torch.lerp(row, ema, weight) for ema in plain for weight in LAMBDAS]

        def spaced(spacing: int) -> list[Tensor]:
            return [self.checkpoints[s] for s in range(step - 7 * spacing, step + 1, spacing) if s in self.checkpoints]

        def decayed(rows: list[Tensor]) -> Tensor:
            return torch.stack([float(w) * one for w, one in zip(wsm(len(rows)), rows, strict=True)]).sum(dim=0)

        return {
            "live": [row],
            "uniform 500": [longest],
            "EMA 5 %": [self.anytime],
            **{name: [half_lives[half_life]] for name, half_life in NAMED.items()},
            "tail-EMA 0.6, 150": [torch.lerp(row, half_lives[104.0], 0.6)],  # tau 150
            "LAWA 8 x 50": [torch.stack(spaced(50)).mean(dim=0)],
            "best uniform": list(uniform.values()),
            "best EMA": plain,
            "best tail-EMA": tails,
            "best WSM": [decayed(spaced(spacing)) for spacing in WSM_SPACINGS],
        }


class Report:
    """Losses on held-out sequences, one number for each."""

    def __init__(self, model: nn.Module, sequences: Tensor, device: torch.device) -> None:
        self.model = model
        self.batches = sequences.to(device).split(80)

    def best(self, rows: list[Tensor]) -> np.ndarray:
        """The losses of the best of some rows; of many only the three that are best on a quarter of the sequences."""
        if len(rows) > 3:
            quarter = max(1, len(self.batches) // 4)
            rows = sorted(rows, key=lambda row: float(self.losses(row, quarter).mean()))[:3]
        return min((self.losses(row) for row in rows), key=np.mean)

    @torch.no_grad()
    def losses(self, row: Tensor, batches: int | None = None) -> np.ndarray:
        """Nats per byte of each sequence, or of those of the first batches, shape ``(sequences,)``."""
        put(self.model, row)
        found = []
        for batch in self.batches[:batches]:
            logits = self.model(input_ids=batch).logits[:, :-1].float()
            nll = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            found.append(nll.view(len(batch), -1).mean(dim=1))
        return torch.cat(found).double().cpu().numpy()


def paired(better: np.ndarray, worse: np.ndarray) -> tuple[float, float]:
    """How much lower the mean loss is, and the standard error of the paired difference."""
    difference = worse - better
    return float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(len(difference)))


def study(run: Run) -> dict[str, Any]:
    """Train one run, and measure all arms at its points."""
    torch.set_num_threads(1)
    logging.getLogger("traj_merge_callback").setLevel(logging.ERROR)
    began, device, spec = time.perf_counter(), torch.device(run.device), run.spec
    train, heldout = blocks_of(spec.text)
    search, rest = heldout[: run.search], heldout[run.search :][: run.report]  # in a shuffled order
    train = train.to(device)
    model: nn.Module = spec.build().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1, foreach=True)
    report = Report(spec.build().to(device).eval(), rest, device)
    merged: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def extra() -> Any:  # called while the model holds the merge
            merged[name] = parameters_to_vector(model.parameters()).detach().clone()
            return lambda folder: None

        return extra

    folder = tempfile.mkdtemp()
    chosen_on = [{"input_ids": batch, "labels": batch} for batch in search.split(20)]
    mergers = {
        name: TrajectoryMerger(
            chosen_on,
            extra=keep(name),
            name=name.replace(" ", "-"),
            output_dir=f"{folder}/{name.replace(' ', '-')}",
            search_fraction=0.875,
            schedule="blocking",
            keep_best=False,
            keep_last=1,
            progress=False,
            on_error="raise",
            **{"merge_every": MERGE_EVERY, **options},
        )
        for name, options in (MERGERS.items() if run.schedule != "twin" else ())
    }
    averages = Averages(parameters_to_vector(model.parameters()).detach().clone(), run.points)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(run.seed))
    points: list[dict[str, Any]] = []
    passes: dict[str, list[float]] = {name: [] for name in mergers}
    for step in range(1, run.steps + 1):
        batch = train[order[torch.arange((step - 1) * BATCH, step * BATCH) % len(train)].to(device)]
        for group in optimizer.param_groups:
            group["lr"] = run.rate(step)
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        row = parameters_to_vector(model.parameters()).detach()
        if run.schedule != "twin":
            averages.update(row, step)
        for name, merger in mergers.items():
            if record := merger.step(model, step):
                passes[name].append(record.forward_equivalents)
        if step in run.points:
            arms = {"live": [row]} if run.schedule == "twin" else averages.arms(row, step)
            fresh = {name for name, merger in mergers.items() if merger.records and merger.records[-1].step == step}
            arms |= {name: [merged[name]] for name in mergers if name in fresh}
            losses = {name: report.best(rows) for name, rows in arms.items()}
            found = {}
            for name, values in losses.items():
                gain, stderr = paired(values, losses["live"])
                ahead, ahead_stderr = paired(losses.get("default", values), values)
                found[name] = {
                    "loss": float(values.mean()),
                    "gain": gain,
                    "gain_stderr": stderr,
                    "behind_default": ahead,
                    "behind_default_stderr": ahead_stderr,
                }
            points.append({"step": step, "rate": run.rate(step) / spec.learning_rate, "arms": found})
    bytes_held = {name: merger.window.nbytes for name, merger in mergers.items() if merger.window is not None}
    for merger in mergers.values():
        merger.close()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    seconds = time.perf_counter() - began
    print(f"{run.identity}: {seconds:.0f} s", flush=True)
    return {
        "run": run.identity,
        "trajectory": spec.name,
        "parameters": parameters,
        "schedule": run.schedule,
        "seed": run.seed,
        "points": points,
        "passes": passes,
        "rows_of_memory": {name: size / 4 / parameters for name, size in bytes_held.items()},
        "seconds": seconds,
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else f"a core of {os.cpu_count()}",
        "torch": torch.__version__,
    }


def plan(size: str, device: str) -> list[Run]:
    """All runs: "quick" or "whole"."""
    schedules = (*SCHEDULES, "twin")
    if size == "quick":
        spec = Spec("llama", "python", 1e-2, steps=400, width=32, layers=1)
        return [Run(spec, schedule, 0, device, 32, 64) for schedule in schedules]
    small = [
        Spec(family, text, rate, steps=1600, width=64, layers=3)
        for family, text, rate in (("llama", "python", 3e-3), ("gpt2", "cpp", 1.5e-3), ("llama", "cpp", 1e-3))
    ]
    seeds = [(small[0], 0), (small[1], 0), (small[2], 0), (small[0], 1), (small[0], 2)]
    seeds.append((replace(small[0], width=128, layers=4), 0))
    runs = [Run(spec, schedule, seed, device) for spec, seed in seeds for schedule in schedules]
    # Half the steps and half the report sequences: an hour of a core for each run, and not three.
    largest = replace(small[0], width=256, layers=5, steps=800)
    return runs + [Run(largest, schedule, 0, device, report=320) for schedule in schedules]


def main() -> None:
    """Train, measure, say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one tiny trajectory")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--output", type=Path, help="folder for schedules.json, .md and .png")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs: list[dict[str, Any]] = []
    if arguments.output and (document := arguments.output / "schedules.json").exists():
        runs = json.loads(document.read_text(encoding="utf-8"))["all_runs"]
    whole = plan("quick" if arguments.quick else "whole", device)
    order, done = [run.identity for run in whole], [run["run"] for run in runs]
    planned = [run for run in whole if run.identity not in done]
    os.environ["OMP_NUM_THREADS"] = "1"  # of each process: there are as many as cores
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        for one in as_completed([pool.submit(study, run) for run in planned]):
            runs.append(one.result())
            runs.sort(key=lambda run: order.index(run["run"]))
            if arguments.output:
                write(runs, arguments.output)
    found = summary(runs)
    print("\n" + table(found) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
