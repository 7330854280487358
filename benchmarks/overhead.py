"""What the callback costs a training run: step time, pauses and memory, beside a run without it and beside others.

Arms train the same model on the same batches in one process, in turns of a few steps, in an order that rotates; a
turn's time is divided by that of the arm without anything in the same round. A step has several micro-batches. The
arms:

- default: ``TrajectoryMerger`` with its defaults, and merges more often than anyone needs, so that there are some; what
  they cost at ``merge_every=500`` is computed from what training waited for each;
- capture_only: the same with merges switched off; capture_last: of single checkpoints;
- lightning_ema: Lightning's ``EMAWeightAveraging``, every step, on the training device (and on the CPU, if that is
  another place);
- trl_bema: TRL's ``BEMACallback``, every 400 steps, on the CPU.

Ratios are medians over rounds, with a standard error. Memory is the peak of a process of its own (files mapped into
memory not counted), beyond that of a run without anything. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import trl
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from realtext import VOCABULARY, Blocks, python_source, split_blocks
from traj_merge_callback import CheckpointWindow, TrajectoryMerger
from traj_merge_callback.window.storage import DTYPES

TURN = 10
MICRO_BATCHES = 4
MEMORY_WIDTH = 768
LENGTH = 128


def build(width: int, device: torch.device) -> nn.Module:
    """The model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).to(device)


@dataclass
class Arm:
    """One training run, and what is done after each of its steps."""

    name: str
    model: nn.Module
    after: Callable[[int], object]
    merger: TrajectoryMerger | None = None
    turns: list[float] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    step: int = 0
    away_since: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.batches = torch.Generator().manual_seed(0)

    def turn(self, data: Tensor, steps: int, sequences: int, device: torch.device) -> None:
        """Train for some steps, each of several micro-batches of so many sequences, and note how long it took."""
        started = time.perf_counter()
        if self.merger is not None:
            # Other arms' time is none of this run's.
            self.merger._overhead._began += started - self.away_since
            self.merger._overhead._left += started - self.away_since
        for _ in range(steps):
            self.step += 1
            for _ in range(MICRO_BATCHES):
                batch = data[torch.randint(len(data), (sequences,), generator=self.batches)].to(device)
                (self.model(input_ids=batch, labels=batch).loss / MICRO_BATCHES).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            before = time.perf_counter()
            self.after(self.step)
            self.pauses.append(time.perf_counter() - before)
        if self.merger is not None and self.merger.window is not None:
            self.merger.window.settle()  # what is still being copied belongs to this arm
        if device.type == "cuda":
            torch.cuda.synchronize()
        self.away_since = time.perf_counter()
        self.turns.append(self.away_since - started)


def arms(names: list[str], width: int, heldout: Tensor, device: torch.device, options: dict[str, Any]) -> list[Arm]:
    """The runs to compare; the first one does nothing but train."""
    found = [Arm("none", build(width, device), nothing)]
    for name in names:
        model = build(width, device)
        if name in ("default", "capture_only", "capture_last"):
            extra: dict[str, Any] = {}
            if name != "default":
                extra = {"merge_every": 10**6 * options["capture_every"], "schedule": "blocking"}
            if name == "capture_last":
                extra["row"] = "last"
            extra = {**options, "merge_at_end": False, "output_dir": tempfile.mkdtemp(), **extra}
            merger = TrajectoryMerger(DataLoader(Blocks(heldout), batch_size=16), **extra)
            found.append(Arm(name, model, functools.partial(merger.step, model), merger))
        elif name.startswith("lightning_ema"):
            callback = EMAWeightAveraging(device="cpu" if name.endswith("cpu") else None)
            module = pl.LightningModule()
            module.model = model
            module.to(device)
            callback.setup(None, module, "fit")

            def average(step: int, callback: Any = callback, module: Any = module) -> None:
                callback.on_train_batch_end(types.SimpleNamespace(global_step=step), module, None, None, 0)

            found.append(Arm(name, model, average))
        else:
            bema = trl.BEMACallback(update_freq=400, device="cpu")
            bema.on_train_begin(None, None, None, model=model)

            def biased(step: int, bema: Any = bema, model: Any = model) -> None:
                bema.on_step_end(None, types.SimpleNamespace(global_step=step), None, model=model)

            found.append(Arm(name, model, biased))
    return found


def nothing(step: int) -> None:
    """Only train."""


def median_and_error(ratios: list[float]) -> tuple[float, float]:
    """A median, and its standard error by the bootstrap."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, size=(500, len(ratios))), axis=1)
    return float(np.median(ratios)), float(medians.std())


def peak_memory(case: str, width: int) -> int:
    """Peak bytes of a process that trains a few steps."""
    command = [sys.executable, __file__, "--memory-of", case, "--width", str(width)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def train_for_memory(case: str, width: int) -> None:
    """Train a few steps with a full window and several merges, and print the peak bytes."""
    train, heldout = split_blocks(python_source()[:300], LENGTH)
    model = build(width, torch.device("cpu"))
    options: dict[str, Any] = {"int8": {"dtype": "int8"}, "disk": {"window_storage": "disk"}}.get(case, {})
    merger = None
    if case != "none":
        merger = TrajectoryMerger(
            DataLoader(Blocks(heldout), batch_size=4),
            output_dir=tempfile.mkdtemp(),
            capture_every=1,
            merge_every=8,
            heldout_batches=2,
            keep_last=0,
            keep_best=False,
            progress=False,
            **options,
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen: list[int] = []
    threading.Thread(target=watch_memory, args=(seen,), daemon=True).start()
    for step in range(1, 25):
        batch = train[4 * step : 4 * step + 4]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if merger is not None:
            merger.step(model, step)
    if merger is not None:
        assert merger.finish(model) is not None
    print(max(seen))


def watch_memory(seen: list[int]) -> None:
    """Note the process's own memory (mapped files, which the system may drop, are not) every few milliseconds."""
    while True:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        seen.append(int(status["RssAnon"].split()[0]) * 1024)
        time.sleep(0.003)


def main() -> None:
    """Train all arms in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=40, help=f"turns of {TURN} steps for each arm")
    parser.add_argument("--quick", action="store_true", help="small, few rounds, no memory; within 50 seconds")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="also write the JSON object to overhead.json in this folder")
    args = parser.parse_args()
    if args.memory_of:
        train_for_memory(args.memory_of, args.width)
        return
    options: dict[str, Any] = {"capture_every": 10, "merge_every": 100}
    sequences = 16
    if args.quick:
        args.width, args.rounds, sequences = 32, 10, 2
        options = {"capture_every": 8, "merge_every": 32, "heldout_batches": 2}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, heldout = split_blocks(python_source(), LENGTH)
    names = ["default", "capture_only", "capture_last", "lightning_ema", "trl_bema"]
    if device.type == "cuda":
        names.append("lightning_ema_cpu")
    runs = arms(names, args.width, heldout, device, options)
    for run in runs:
        run.turn(train, TURN, sequences, device)  # warms up
        run.turns.clear()
    for number in range(args.rounds):
        for run in runs[number % len(runs) :] + runs[: number % len(runs)]:
            run.turn(train, TURN, sequences, device)
    base, default = runs[0], runs[1]
    assert default.merger is not None
    pairs = zip(base.model.parameters(), default.model.parameters(), strict=True)
    same = all(torch.equal(one, other) for one, other in pairs)
    numel = sum(parameter.numel() for parameter in base.model.parameters())
    step_s = statistics.median(base.turns) / TURN
    waited = {record.step: round(record.seconds, 4) for record in default.merger.records}
    result: dict[str, Any] = {
        "ratio_default": round(sum(default.turns) / sum(base.turns), 4),
        "merge_every": options["merge_every"],
        "share_at_merge_every_500": round(statistics.median(waited.values()) / (500 * step_s), 4),
    }
    for run in runs[1:]:
        ratio, error = median_and_error([a / b for a, b in zip(run.turns, base.turns, strict=True)])
        key = "ratio_default_median" if run is default else f"ratio_{run.name}"
        result |= {key: round(ratio, 4), f"{key}_stderr": round(error, 4)}
    overhead = default.merger._overhead
    window = default.merger.window
    assert window is not None
    result |= {
        "overhead_measured_by_the_callback": round(overhead.share, 4),
        "waited_for_each_merge_s": waited,
        "passes_of_each_merge": {record.step: record.forward_equivalents for record in default.merger.records},
        "longest_pause_s": round(max(default.pauses), 4),
        "max_pause_s": round(overhead.max_pause, 4),
        "step_s": round(step_s, 4),
        "micro_batches": MICRO_BATCHES,
        "optimizer_waited_s": round(window.waited_s, 4),
        "bit_identical": same,
        "bytes_per_param_per_row": {
            dtype: round(CheckpointWindow(base.model, 2, dtype=dtype).row_nbytes / numel, 4) for dtype in DTYPES
        },
        "parameters": numel,
        "steps": base.step,
    }
    for run in runs:
        if run.merger is not None:
            run.merger.close()
    if device.type == "cpu" and not args.quick:
        cases = {case: peak_memory(case, MEMORY_WIDTH) for case in ("none", "float32", "int8", "disk")}
        size = sum(parameter.numel() for parameter in build(MEMORY_WIDTH, device).parameters())
        beyond = {case: round((peak - cases["none"]) / size, 2) for case, peak in cases.items() if case != "none"}
        result |= {"peak_bytes_per_param_beyond_training": beyond, "memory_measured_at_parameters": size}
    result |= {
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    for key, value in result.items():
        print(f"{key:>40}: {value}")
    if args.output:
        (args.output / "overhead.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
