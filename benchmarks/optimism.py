"""How much of a claimed gain is optimism: the gain on the report split against the gain of the same merge far away.

Small Llamas are trained on Python source, each with another part of the held-out files as its held-out set. Far text is
all other held-out files. At every merge three searches look at the same window. They differ in what they hold out:

- ``sample``: what the library does with a dataset: an even sample of it, dealt to the splits in runs.
- ``runs``: the first sequences of it, dealt in runs: what the library does with an iterable.
- ``alternate``: the same first sequences, dealt alternately: every report sequence has search sequences as neighbours.

Optimism is the claimed gain minus the gain far away, in nats per token. Its mean over the windows is printed with its
standard error over the runs, whose held-out sets share nothing. The last line is one JSON object; ``--output`` also
writes it to ``optimism.json``. Takes some minutes on 2 cores; ``--quick`` takes one.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from traj_merge_callback import Evaluation, HeldOutLoss, TrajectoryMerger, load_merged
from traj_merge_callback.evaluate.sample import choose

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from realtext import VOCABULARY, Blocks, python_source

LENGTH, BATCH, HELDOUT = 128, 8, 16
ARMS = ("sample", "runs", "alternate")
OPTIONS: dict[str, Any] = {"window_size": 8, "capture_every": 5, "schedule": "blocking", "max_overhead": None}
OPTIONS |= {"heldout_batches": HELDOUT, "merge_at_end": False, "progress": False, "on_error": "raise"}


def blocks(files: list[bytes]) -> Tensor:
    """Files in order, cut into sequences, shape ``(sequences, LENGTH)``."""
    data = torch.frombuffer(bytearray(b"\n".join(files)), dtype=torch.uint8).long()
    return data[: len(data) // LENGTH * LENGTH].view(-1, LENGTH)


def build(seed: int) -> LlamaForCausalLM:
    """A small model."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **sizes))


def loaders(sequences: Tensor) -> dict[str, Any]:
    """What each arm holds out of a run's held-out set."""
    first = sequences[: HELDOUT * BATCH]
    places = choose(len(first), len(first), 0.5, 0)
    alternate = first.clone()
    for parity, chosen in enumerate(places.values()):
        alternate[chosen] = first[parity::2][: len(chosen)]
    lists = {"runs": first, "alternate": alternate}
    return {"sample": DataLoader(Blocks(sequences), batch_size=BATCH)} | {
        arm: [{"input_ids": batch, "labels": batch} for batch in chosen.split(BATCH)] for arm, chosen in lists.items()
    }


def run(seed: int, train: Tensor, heldout: Tensor, far: Tensor, steps: int, every: int) -> list[dict[str, Any]]:
    """One training run: for each merge and arm the claimed gain and the one far away."""
    model, other = build(seed), build(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    away = HeldOutLoss(
        {"": [{"input_ids": b, "labels": b} for b in far.split(32)]}, batches=10**6, search_fraction=0.01
    )
    found = []
    with tempfile.TemporaryDirectory() as folder:
        mergers = {
            arm: TrajectoryMerger(loader, output_dir=f"{folder}/{arm}", merge_every=every, **OPTIONS)
            for arm, loader in loaders(heldout).items()
        }
        for step in range(1, steps + 1):
            batch = train[order[torch.arange((step - 1) * 16, step * 16) % len(order)]]
            model(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            live: Evaluation | None = None
            for arm, merger in mergers.items():
                # The first merge is of a model that has hardly learned anything.
                if (record := merger.step(model, step)) and step > every and record.snapshot:
                    live = live or away.evaluate(model, "report")
                    load_merged(record.snapshot, other)
                    gain, stderr = live.gain_of(away.evaluate(other, "report"))
                    found.append({"run": seed, "step": step, "arm": arm, "claimed": record.gain, "far": gain})
                    found[-1] |= {"claimed_stderr": record.gain_stderr, "far_stderr": stderr}
                    print({key: round(v, 4) if isinstance(v, float) else v for key, v in found[-1].items()}, flush=True)
        for merger in mergers.values():
            merger.close()
    return found


def summary(windows: list[dict[str, Any]], arm: str) -> dict[str, float]:
    """The mean optimism of an arm, its standard error over runs, and the mean gain it belongs to."""
    mine = [window for window in windows if window["arm"] == arm]
    runs = sorted({window["run"] for window in mine})
    each = [np.mean([w["claimed"] - w["far"] for w in mine if w["run"] == run]) for run in runs]
    return {
        "windows": len(mine),
        "claimed_gain": float(np.mean([window["claimed"] for window in mine])),
        "far_gain": float(np.mean([window["far"] for window in mine])),
        "optimism": float(np.mean(each)),
        "optimism_stderr": float(np.std(each, ddof=1) / np.sqrt(len(each))),
        "claimed_more": sum(window["claimed"] > window["far"] for window in mine),
    }


def main() -> None:
    """Train, merge, compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="2 short runs")
    parser.add_argument("--output", type=Path, help="folder for optimism.json")
    arguments = parser.parse_args()
    runs, steps, every = (2, 90, 30) if arguments.quick else (6, 210, 70)
    started, files = time.perf_counter(), python_source()
    train, held = (blocks([f for i, f in enumerate(files) if (i % 10 == 0) is out]) for out in (False, True))
    parts = held.tensor_split(runs)
    windows: list[dict[str, Any]] = []
    for seed, part in enumerate(parts):
        others = torch.cat([other for other in parts if other is not part])
        far = others[:: max(1, len(others) // (200 if arguments.quick else 400))]
        windows += run(seed, train, part, far, steps, every)
    result: dict[str, Any] = {
        "benchmark": "optimism",
        "sequences": {"held_out": [len(part) for part in parts], "read": HELDOUT * BATCH, "length": LENGTH},
        "arms": {arm: summary(windows, arm) for arm in ARMS},
        "windows": windows,
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "machine": {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()},
    }
    for arm, values in result["arms"].items():
        print(f"{arm:10}", {name: round(value, 4) for name, value in values.items()})
    if arguments.output is not None:
        (arguments.output / "optimism.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
