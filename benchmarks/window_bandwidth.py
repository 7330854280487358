"""How fast the window's operations read and write memory, next to a plain copy of the same bytes in the same process.

Prints a table and, as its last line, one JSON object: for each dtype of rows, the ratio of the operation's bytes per
second to those of ``copy_`` (reading plus writing), as the median over alternating repetitions.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from traj_merge_callback import CheckpointWindow


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(parameters: int, size: int, dtype: str, repetitions: int) -> dict[str, float]:
    """Ratios of push, combine and project to a copy that moves the same number of bytes."""
    model = nn.Embedding(parameters // 1024, 1024)
    window = CheckpointWindow(model, size, dtype=dtype)
    for step in range(1, size + 1):
        window.push(model, step)
    steps = iter(range(size + 1, 10**6))
    weights = [1.0 / size] * size
    vector = torch.randn(window.layout.numel)
    row = window.layout.numel * (2 if dtype == "bfloat16" else 4)
    floats = window.layout.numel * 4
    work: dict[str, tuple[Callable[[], object], int]] = {
        "push": (lambda: window.push(model, next(steps)), floats + row),
        "combine": (lambda: window.combine(weights), size * row + floats),
        "project": (lambda: window.project(vector), size * row + floats),
    }
    source, target = torch.randn(2, window.layout.numel)
    ratios: dict[str, list[float]] = {name: [] for name in work}
    for repetition in range(repetitions + 1):
        for name, (operation, moved) in work.items():
            copying = seconds(lambda: target.copy_(source))
            ratio = (moved / seconds(operation)) / (2 * floats / copying)
            if repetition:  # the first one warms up
                ratios[name].append(ratio)
    return {name: round(statistics.median(values), 3) for name, values in ratios.items()}


def main() -> None:
    """Measure both dtypes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=50_000_000)
    parser.add_argument("--window-size", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer repetitions")
    args = parser.parse_args()
    if args.quick:
        args.parameters, args.repetitions = 10_000_000, 3
    found = {
        dtype: measure(args.parameters, args.window_size, dtype, args.repetitions) for dtype in ("float32", "bfloat16")
    }
    for dtype, ratios in found.items():
        print(f"{dtype:>9}: " + ", ".join(f"{name} {ratio:.2f} of copy" for name, ratio in ratios.items()))
    machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({"over_copy": found, "parameters": args.parameters, "window_size": args.window_size, **machine}))


if __name__ == "__main__":
    main()
