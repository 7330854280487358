"""A long run of many merges: are memory, file handles, threads, disk and step time flat, and does a slow disk wait?

A tiny Llama under ``transformers.Trainer`` with everything in between that a long run has: a row every second step, a
merge every 20, the trainer's evaluation, checkpoints with their windows, rotated. Then a plain loop on disks whose
every flush takes longer. The last line is one JSON object.

    python benchmarks/soak.py --quick                       about a minute
    python benchmarks/soak.py --output benchmarks/results   20 minutes
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import stat
import statistics
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faults.runs import HELDOUT, TRAIN, heldout_loader, llama, realtext
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from traj_merge_callback import TrajectoryMerger
from traj_merge_callback.transformers import TrajMergeCallback

OPTIONS: dict[str, Any] = {"capture_every": 2, "heldout_batches": 6, "progress": False, "on_error": "raise"}
# Seconds between two looks.
LOOK_EVERY = 1.0
MAX_PAUSE = 0.05


def process_now(folder: Path) -> dict[str, float]:
    """What this process holds now, and what is in its folder."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    files: dict[int, int] = {}  # files that states share are counted once
    count = 0
    for parent, _, names in os.walk(folder):  # which passes over folders that were removed meanwhile
        for name in names:
            with suppress(FileNotFoundError):
                found = os.lstat(os.path.join(parent, name))  # noqa: PTH118
                if stat.S_ISREG(found.st_mode):
                    files[found.st_ino], count = found.st_size, count + 1
    return {
        "memory_mb": int(status["VmRSS"].split()[0]) / 1024,
        "file_handles": len(list(Path("/proc/self/fd").iterdir())),
        "threads": threading.active_count(),
        "disk_mb": sum(files.values()) / 1e6,  # metrics.jsonl grows by a line a merge
        "files": count,
    }


class Watch(TrainerCallback):
    """Looks at the process every second, keeps the times of steps, and ends training when the time is over."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.end = folder, time.monotonic() + seconds
        self.looks: list[dict[str, float]] = []
        self.step_seconds: list[float] = []
        self._began, self._looked = 0.0, time.monotonic()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time of the step without what callbacks do; look now and then."""
        self.step_seconds.append(time.perf_counter() - self._began)
        if time.monotonic() - self._looked > LOOK_EVERY:
            gc.collect()
            self.looks.append({"step": state.global_step, **process_now(self.folder)})
            self._looked = time.monotonic()
        control.should_training_stop |= time.monotonic() > self.end


def soak(seconds: float) -> dict[str, Any]:
    """Train for so many seconds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        watch = Watch(folder, seconds)
        arguments = TrainingArguments(
            name,
            max_steps=10**6,
            per_device_train_batch_size=8,
            use_cpu=True,
            report_to="none",
            eval_strategy="steps",
            eval_steps=150,
            save_steps=50,
            save_total_limit=2,
            logging_steps=10**6,
            disable_tqdm=True,
        )
        train = realtext.Blocks(TRAIN)
        trainer = Trainer(llama(), arguments, train_dataset=train, eval_dataset=HELDOUT, callbacks=[watch])
        merging = TrajMergeCallback(merge_every=20, **OPTIONS).attach(trainer)
        trainer.train()
        steps = trainer.state.global_step
        merger = merging.merger
        assert merger is not None
        found = watch.looks[len(watch.looks) // 4 :]  # caches are filled by then
        quarter = len(watch.step_seconds) // 4
        times = [watch.step_seconds[i * quarter : (i + 1) * quarter] for i in (1, 3)]
        result: dict[str, Any] = {
            "seconds": seconds,
            "steps": steps,
            "captures": steps // OPTIONS["capture_every"],
            "merges": len(merger.records),
            "states": steps // 50,
            "evaluations": steps // 150,
            "step_time_ratio": statistics.median(times[1]) / statistics.median(times[0]),
        }
        at = [look["step"] for look in found]
        for what in ("memory_mb", "file_handles", "threads", "disk_mb", "files"):
            values = [look[what] for look in found]
            slope = float(np.polyfit(at, values, 1)[0]) if len(found) > 2 else 0.0
            result[what] = {"first": values[0], "last": values[-1], "most": max(values), "per_1000_steps": 1000 * slope}
        return result


def slow_disk(delay: float, steps: int) -> dict[str, float]:
    """The longest time that a step of a plain loop spends here where each flush of a file takes ``delay`` longer."""
    flush = os.fsync
    os.fsync = lambda descriptor: (time.sleep(delay), flush(descriptor))[1]  # type: ignore[assignment, func-returns-value]
    try:
        with tempfile.TemporaryDirectory() as name:
            model = llama()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            options = {**OPTIONS, "merge_every": 40, "max_pause": MAX_PAUSE, "output_dir": f"{name}/merged"}
            merger, spent, saving = TrajectoryMerger(heldout_loader(), **options), [], []
            for step in range(1, steps + 1):
                batch = TRAIN[torch.randint(len(TRAIN), (8,))]
                model(input_ids=batch, labels=batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                began = time.perf_counter()
                merger.step(model, step)
                spent.append(time.perf_counter() - began)
                if step % 10 == 0:
                    began = time.perf_counter()
                    merger.save_state(Path(name) / f"checkpoint-{step}" / "merging")
                    saving.append(time.perf_counter() - began)
            merges = len(merger.records)
            merger.close()
    finally:
        os.fsync = flush
    # The first step allocates the window and tries a batch.
    return {"longest_step_s": max(spent[1:]), "longest_save_state_s": max(saving), "merges": merges}


def main() -> None:
    """Run both, say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="30 seconds, and shorter loops")
    parser.add_argument("--seconds", type=float, help="of the long run; 1100, or 30 with --quick")
    parser.add_argument("--output", type=Path, help="folder for soak.json")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    result = soak(arguments.seconds or (30 if arguments.quick else 1100))
    steps = 120 if arguments.quick else 600
    result["max_pause_s"] = MAX_PAUSE
    result["slow_disk"] = {f"{delay} s a flush": slow_disk(delay, steps) for delay in (0.0, 0.2, 1.0)}
    result["torch"] = torch.__version__
    result["hardware"] = f"a core of {os.cpu_count()}"
    if arguments.output:
        (arguments.output / "soak.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
