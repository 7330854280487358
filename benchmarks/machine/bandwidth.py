"""How fast the window's operations move memory, beside a plain copy in the same process.

For each size of the window and each format of rows: the bytes that an operation reads and writes per second (rows as
they are stored, and float32 results), over those of ``copy_`` on float32 of the size of a row. Operations alternate
with copies; ratios are medians. With a CUDA device also rows in pinned memory, beside a pinned copy to the device, and
rows on the device, beside a copy there. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from traj_merge_callback import CheckpointWindow
from traj_merge_callback.engine.budget import Stopwatch
from traj_merge_callback.window.storage import DTYPES, in_memory

SIZE = 8


def measure(numel: int, dtype: str, repetitions: int, device: torch.device, place: str) -> dict[str, Any]:
    """Ratios for rows of ``numel`` numbers in "memory" or on the "device"."""
    model = nn.Embedding(numel // 1024, 1024, device=device)
    numel = model.weight.numel()
    on_device = in_memory(device=device) if place == "device" else None
    window = CheckpointWindow(model, SIZE, dtype=dtype, allocate=on_device)
    with torch.no_grad():
        for step in range(1, SIZE + 1):
            model.weight.add_(1e-3)
            window.push(model, step)
    steps = iter(range(SIZE + 1, 10**6))
    weights = [1.0 / SIZE] * SIZE
    vector = torch.randn(numel, device=device)
    merged = torch.empty(numel, device=device)
    rows = SIZE * window.row_nbytes + (4 * numel if dtype == "int8" else 0)
    work: dict[str, tuple[Callable[[], object], float]] = {
        "push": (lambda: window.push(model, next(steps)), 4 * numel + window.row_nbytes),
        "combine": (lambda: window.combine(weights, merged), rows + 4 * numel),
        "project": (lambda: window.project(vector), rows + 4 * numel),
    }
    if dtype != "int8" and device.type == "cuda" and place == "memory":
        # What crosses the bus is what a copy is measured by.
        work = {name: (operation, SIZE * window.row_nbytes) for name, (operation, _) in work.items()}
        work["push"] = (work["push"][0], window.row_nbytes)
    copied, moved = copies(numel, device, place)
    ratios: dict[str, list[float]] = {name: [] for name in work}
    speeds: list[float] = []
    for repetition in range(repetitions + 1):
        for name, (operation, amount) in work.items():
            speed = moved / seconds(copied, device)
            ratio = (amount / seconds(operation, device)) / speed
            if repetition:  # the first one warms up
                ratios[name].append(ratio)
                speeds.append(speed)
    found = {name: round(statistics.median(values), 3) for name, values in ratios.items()}
    return {**found, "copy_GB_per_s": round(statistics.median(speeds) / 1e9, 1)}


def copies(numel: int, device: torch.device, place: str) -> tuple[Callable[[], object], int]:
    """The copy to compare with, and the bytes that it moves (over the bus, where there is one)."""
    if device.type == "cuda" and place == "memory":
        source, target = torch.randn(numel).pin_memory(), torch.empty(numel, device=device)
        return lambda: target.copy_(source, non_blocking=True), 4 * numel
    one, other = torch.randn(2, numel, device=device)
    return lambda: other.copy_(one), 2 * 4 * numel


def seconds(work: Callable[[], Tensor | object], device: torch.device) -> float:
    """Time of one call, on the device."""
    watch = Stopwatch(device)
    work()
    return watch.lap()


def main() -> None:
    """Measure every size and dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, nargs="+", default=[10**7, 10**8, 10**9], help="of a window's float32 row")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small rows and few repetitions, within 50 seconds")
    parser.add_argument("--output", type=Path, help="also write the JSON object to bandwidth.json in this folder")
    args = parser.parse_args()
    if args.quick:
        args.bytes, args.repetitions = [10**7, 10**8], 3
    devices = [(torch.device("cpu"), "memory")]
    if torch.cuda.is_available():
        devices += [(torch.device("cuda"), "memory"), (torch.device("cuda"), "device")]
    found: dict[str, Any] = {}
    for device, place in devices:
        for size in args.bytes:
            for dtype in DTYPES:
                key = f"{device.type}, rows in {place}, {size:.0e} bytes, {dtype}"
                found[key] = measure(size // 4, dtype, args.repetitions, device, place)
                print(f"{key}: {found[key]}", flush=True)
    largest = [value for key, value in found.items() if f"{max(args.bytes):.0e} bytes, float32" in key]
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    document = {
        "combine_over_copy": largest[0]["combine"],
        "project_over_copy": largest[0]["project"],
        "cases": found,
        "window_size": SIZE,
        "hardware": hardware,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if args.output:
        (args.output / "bandwidth.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
