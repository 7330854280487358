"""Pretraining on a GPU with the callback on: overhead, pauses, overlap, bandwidth, memory, and what merging gains.

A GPT-2 of 85 M parameters learns source code byte by byte in bfloat16 (autocast), for a few minutes on one GPU, without
a network. ``--pack FILE`` writes the text on a machine that has it; ``--text FILE`` reads it; without either it is
taken from the machine (Python's standard library and torch's headers). Without a CUDA device it says so and ends well;
``--rehearse`` then runs everything but what needs one, at a tiny size. A part that fails is recorded as such, the
others go on, and the exit status is 1. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import os
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Without it cuBLAS is not deterministic; it is read when cuBLAS begins.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
from training import Bench, packed, text_of_this_machine, unpacked

from traj_merge_callback import CheckpointWindow, HeldOutLoss
from traj_merge_callback.engine.budget import Stopwatch
from traj_merge_callback.window.devices import side_stream
from traj_merge_callback.window.storage import in_memory

TURN = 10


def rhythm(steps: int) -> dict[str, int]:
    """Rows and merges of a run of so many steps: four merges, each of at least five rows."""
    capture_every = max(1, steps // 20)
    return {"capture_every": capture_every, "merge_every": 5 * capture_every}


def overhead(bench: Bench, rounds: int) -> dict[str, Any]:
    """Step time with and without the callback, in turns in this process."""
    often = rhythm((rounds + 1) * TURN)
    never = {"merge_every": 10**6 * often["capture_every"], "schedule": "blocking"}
    mergers = {"default": bench.merger(**often), "capture_only": bench.merger(**{**often, **never})}
    names = ["none", *mergers, "lightning_ema"]
    models = {name: bench.build() for name in names}
    optimizers = {name: bench.optimizer(model) for name, model in models.items()}
    average = AveragedModel(models["lightning_ema"], avg_fn=get_ema_avg_fn(0.999), use_buffers=True)
    turns: dict[str, list[float]] = {name: [] for name in names}
    pauses: dict[str, list[float]] = {name: [] for name in names}
    steps, away = dict.fromkeys(names, 0), dict.fromkeys(names, time.perf_counter())
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            bench.synchronize()
            began = time.perf_counter()
            if name in mergers:  # other arms' time is none of this run's
                mergers[name]._overhead._began += began - away[name]
                mergers[name]._overhead._left += began - away[name]
            for _ in range(TURN):
                steps[name] += 1
                bench.backward(models[name], steps[name])
                optimizers[name].step()
                optimizers[name].zero_grad()
                before = time.perf_counter()
                if name in mergers:
                    mergers[name].step(models[name], steps[name])
                elif name == "lightning_ema":
                    average.update_parameters(models[name])
                pauses[name].append(time.perf_counter() - before)
            bench.synchronize()
            away[name] = time.perf_counter()
            if number:  # the first round warms up
                turns[name].append(away[name] - began)
    base = turns["none"]
    found: dict[str, Any] = {"step_s": statistics.median(base) / TURN, "steps": steps["none"], **often}
    for name in names[1:]:
        found[f"ratio_{name}_median"] = statistics.median(a / b for a, b in zip(turns[name], base, strict=True))
        found[f"ratio_{name}"] = sum(turns[name]) / sum(base)
    found["longest_pause_s"], found["max_pause_s"] = max(pauses["default"]), mergers["default"]._overhead.max_pause
    names = ["step", "finished_step", "seconds", "longest_pause"]
    found["merges"] = [{name: getattr(record, name) for name in names} for record in mergers["default"].records]
    for merger in mergers.values():
        merger.close()
    return found


def overlap(bench: Bench) -> dict[str, float]:
    """When a capture's copy ends, and when the forward and backward pass beside it do, by CUDA events."""
    model = bench.build()
    optimizer = bench.optimizer(model)
    window = CheckpointWindow(model, 2, asynchronous=True)
    copies, passes, waits = [], [], []
    for step in range(1, 13):
        bench.synchronize()
        start = torch.cuda.Event(enable_timing=True)
        start.record()
        window.push(model, step)
        stream = side_stream(bench.device, "capture")
        copied, backward, stepped = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        copied.record(stream)
        bench.backward(model, step)
        backward.record()
        optimizer.step()
        optimizer.zero_grad()
        stepped.record()
        bench.synchronize()
        if step > 2:
            copies.append(start.elapsed_time(copied))
            passes.append(start.elapsed_time(backward))
            waits.append(max(0.0, start.elapsed_time(copied) - start.elapsed_time(backward)))
    window.close()
    return {
        "copy_ends_after_ms": statistics.median(copies),
        "backward_ends_after_ms": statistics.median(passes),
        "optimizer_waits_ms": statistics.median(waits),
        "overlapped_share_of_copy": statistics.median(1 - w / c for w, c in zip(waits, copies, strict=True)),
    }


def bandwidth(bench: Bench) -> dict[str, float]:
    """GB/s of combine and project on the GPU, and of plain copies of the same bytes."""
    model = bench.build()
    found: dict[str, float] = {}
    for place in ("pinned", "device"):
        for dtype in ("float32", "bfloat16", "int8"):
            allocate = in_memory(device=bench.device) if place == "device" else None
            window = CheckpointWindow(model, 8, dtype=dtype, allocate=allocate)
            for step in range(1, 9):
                window.push(model, step)
            numel = window.layout.numel
            row, vector = torch.empty(numel, device=bench.device), torch.randn(numel, device=bench.device)
            source = torch.empty(8 * window.row_nbytes, dtype=torch.uint8, device=None if place == "pinned" else "cuda")
            source = source.pin_memory() if place == "pinned" else source
            target = torch.empty_like(source, device=bench.device)
            times: dict[str, list[float]] = {"copy": [], "combine": [], "project": []}
            for _ in range(6):
                watch = Stopwatch(bench.device)
                target.copy_(source, non_blocking=True)
                times["copy"].append(watch.lap())
                window.combine([0.125] * 8, row)
                times["combine"].append(watch.lap())
                window.project(vector)
                times["project"].append(watch.lap())
            copy = statistics.median(times["copy"][1:])
            found[f"{place}, {dtype}, copy GB/s"] = source.numel() / copy / 1e9
            for name in ("combine", "project"):
                found[f"{place}, {dtype}, {name}_over_copy"] = copy / statistics.median(times[name][1:])
    return found


def resident() -> int:
    """Bytes of this process in CPU memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def memory(bench: Bench) -> dict[str, float]:
    """Page-locked bytes as counted and as taken; device memory of products; a capture with many buffers."""
    model = bench.build()
    before, window = resident(), CheckpointWindow(model, 8, dtype="bfloat16")
    for step in range(1, 9):
        window.push(model, step)
    found = {"host_bytes_taken_over_counted": (resident() - before) / window.nbytes}
    row = torch.empty(window.layout.numel, device=bench.device)
    window.combine([0.125] * 8, row)
    reserved = torch.cuda.memory_reserved()
    for _ in range(40):
        window.combine([0.125] * 8, row)
    found["reserved_by_40_combines_over_row"] = (torch.cuda.memory_reserved() - reserved) / row.nbytes
    for count in (0, 500):
        for index in range(count):
            model.register_buffer(f"running_{index}", torch.zeros(64, device=bench.device))
        window = CheckpointWindow(model, 2, asynchronous=True)
        times = []
        for step in range(1, 9):
            bench.synchronize()
            began = time.perf_counter()
            window.push(model, step)
            times.append(time.perf_counter() - began)
            window.settle()
        found[f"capture_call_ms_with_{count}_buffers"] = 1000 * statistics.median(times)
        window.close()
    return found


@contextmanager
def deterministic() -> Iterator[None]:
    """Training repeats itself bit by bit, which the backward pass of attention does not by default."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def trained(
    bench: Bench, steps: int, *, with_callback: bool, left: int | None = None
) -> tuple[list[Tensor], dict[str, Any]]:
    """Train, with a merge every 20 steps or without the callback.

    Args:
        bench: what is trained.
        steps: how many.
        with_callback: whether there is one.
        left: bytes of the device that are free from step 4 on, beyond what training has needed until then.

    Returns:
        The parameters, in CPU memory, and what was measured.
    """
    model = bench.build()
    optimizer = bench.optimizer(model)
    options = {"capture_every": 5, "merge_every": 20, "heldout_batches": 4}
    merger = bench.merger(**options) if with_callback else None
    filler, pauses = None, [0.0]
    try:
        for step in range(1, steps + 1):
            bench.backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
            bench.synchronize()
            if step == 4 and left is not None:
                free, _ = torch.cuda.mem_get_info()
                filler = torch.empty(max(0, free - left), dtype=torch.uint8, device=bench.device)
            if merger is not None:
                began = time.perf_counter()
                merger.step(model, step)
                bench.synchronize()
                pauses.append(time.perf_counter() - began)
        merges = [] if merger is None else [record.step for record in merger.records]
        measured = {"steps": steps, "merges": merges, "longest_pause_s": max(pauses)}
        return [parameter.detach().cpu() for parameter in model.parameters()], measured
    finally:
        if merger is not None:
            merger.close()
        del filler


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether parameters are bit-identical."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def identical(bench: Bench) -> dict[str, Any]:
    """Whether training is bit-identical with and without the callback, where two runs without it are."""
    with deterministic():
        plain, _ = trained(bench, 60, with_callback=False)
        again, _ = trained(bench, 60, with_callback=False)
        merged, measured = trained(bench, 60, with_callback=True)
    return {"two_plain_runs": same(plain, again), "with_callback": same(plain, merged), **measured}


def tight(bench: Bench) -> dict[str, Any]:
    """Training on a device that it fills but for what a merge holds, without the callback and with it."""
    found: dict[str, Any] = {}
    runs: dict[str, list[Tensor]] = {}

    def run(name: str) -> dict[str, Any]:
        left = 8 * sum(parameter.numel() for parameter in bench.build().parameters())
        free_device()
        runs[name], measured = trained(bench, 60, with_callback=name == "with_callback", left=left)
        return measured

    with deterministic():
        for name in ("without_callback", "with_callback"):
            found[name] = attempted(functools.partial(run, name))
    if len(runs) == 2:
        found["bit_identical"] = same(*runs.values())
    return found


def attempted(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a part found, or how it failed."""
    try:
        return part()
    except Exception as error:
        traceback.print_exc()
        return {"failed": repr(error)}


def free_device() -> None:
    """Let go of what earlier parts have left on the device."""
    gc.collect()
    torch.cuda.empty_cache()


class Flex(nn.Module):
    """Attention by ``flex_attention``, to be compiled."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inside = nn.Linear(64 * heads, 64 * heads)

    def forward(self, x: Tensor) -> Tensor:
        """Causal attention of ``x``, shape ``(sequences, length, 64 * heads)``, to itself."""
        query = self.inside(x).unflatten(2, (self.heads, 64)).transpose(1, 2)
        return flex_attention(query, query, query, score_mod=causal)


def causal(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A score modification of ``flex_attention``: no position sees a later one."""
    return torch.where(query >= key, score, -float("inf"))


def flex(bench: Bench, heads: int = 8, length: int = 8192) -> dict[str, float]:
    """Peak device memory of a held-out evaluation with ``flex_attention``, over that of its scores."""
    model: Any = torch.compile(Flex(heads).to(bench.device))
    data = [torch.randn(1, length, 64 * heads) for _ in range(2)]
    loss = HeldOutLoss(data, nll=lambda model, x: (model(x).square().sum(), 1))
    began = time.perf_counter()
    loss.evaluate(model, "report")
    found = {"first_evaluation_s": time.perf_counter() - began}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss.evaluate(model, "report")
    scores = 4 * heads * length * length
    return {**found, "peak_over_scores": (torch.cuda.max_memory_allocated() - before) / scores}


def curves(bench: Bench, steps: int) -> dict[str, Any]:
    """Live and merged loss over a run at a constant rate, and of twins whose rate decays over their last 40 %."""
    report = HeldOutLoss(bench.batches(16), precision=bench.precision)
    points = [steps // 2, steps]
    model = bench.build()
    optimizer = bench.optimizer(model)
    merger = bench.merger(**rhythm(steps), row="multiscale", evaluations=12)
    forks: dict[int, tuple[Any, Any]] = {}
    for step in range(1, steps + 1):
        bench.backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        merger.step(model, step)
        for point in points:
            if step == int(0.6 * point):
                state = {name: value.clone() for name, value in model.state_dict().items()}
                forks[point] = state, copied_state(optimizer.state_dict())
    merger.finish(model)
    decayed: dict[int, float] = {}
    for point, (weights, state) in forks.items():
        twin = bench.build()
        twin.load_state_dict(weights)
        optimizer = bench.optimizer(twin)
        optimizer.load_state_dict(state)
        first = int(0.6 * point)
        for step in range(first + 1, point + 1):
            for group in optimizer.param_groups:
                group["lr"] = 6e-4 * (point - step + 1) / (point - first)
            bench.backward(twin, step)
            optimizer.step()
            optimizer.zero_grad()
        decayed[point] = report.evaluate(twin, "report").loss
    names = ("step", "live_loss", "merged_loss", "gain_stderr", "longest_pause")
    merges = [{name: getattr(record, name) for name in names} for record in merger.records]
    assert all(math.isfinite(merge["merged_loss"]) for merge in merges)
    return {"merges": merges, "decayed": decayed}


def copied_state(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of an optimizer's state that training does not change."""
    states = {
        key: {name: value.clone() if isinstance(value, Tensor) else value for name, value in one.items()}
        for key, one in state["state"].items()
    }
    return {"state": states, "param_groups": [dict(group) for group in state["param_groups"]]}


def seconds_per_step(bench: Bench) -> float:
    """Seconds of a training step without anything."""
    model = bench.build()
    optimizer = bench.optimizer(model)
    watch = Stopwatch(bench.device)
    for step in range(1, 21):
        if step == 11:
            watch.lap()
        bench.backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return watch.lap() / 10


def main() -> None:
    """Measure everything, or the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, help="write this machine's text to a file, and end")
    parser.add_argument("--text", type=Path, help="a file that --pack wrote")
    parser.add_argument("--minutes", type=float, default=8.0, help="how long overhead and curves train, without merges")
    parser.add_argument("--rehearse", action="store_true", help="a tiny size, on the CPU")
    parser.add_argument("--parts", help="only these, separated by commas")
    parser.add_argument("--output", type=Path, help="also write the JSON object to gpu_pretrain.json in this folder")
    args = parser.parse_args()
    if args.pack:
        train, heldout = text_of_this_machine()
        args.pack.write_bytes(packed(train, heldout))
        print(f"{(len(train) + len(heldout)) / 1e6:.1f} MB of text in {args.pack}")
        return
    if not torch.cuda.is_available() and not args.rehearse:
        print("no CUDA device here: skipped")
        print(json.dumps({"skipped": "no CUDA device"}))
        return
    device = torch.device("cpu" if args.rehearse else "cuda")
    train, heldout = unpacked(args.text.read_bytes()) if args.text else text_of_this_machine()
    bench = Bench(device, train, heldout, args.rehearse)
    hardware = "CPU rehearsal" if args.rehearse else torch.cuda.get_device_name()
    result: dict[str, Any] = {"hardware": hardware, "torch": torch.__version__}
    result["parameters"] = sum(parameter.numel() for parameter in bench.build().parameters())
    step_s = result["step_s"] = seconds_per_step(bench)
    # Four arms for half of the time, and a run with two twins of 0.4 and 0.2 of its length for the other half.
    rounds = 3 if args.rehearse else max(5, int(args.minutes * 30 / step_s / 4 / TURN))
    steps = 40 if args.rehearse else max(100, int(args.minutes * 30 / step_s / 1.6) // 20 * 20)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "identical": lambda: identical(bench),
        "overhead": lambda: overhead(bench, rounds),
        "curves": lambda: curves(bench, steps),
    }
    if device.type == "cuda":
        on_cuda = {"overlap": overlap, "memory": memory, "tight": tight, "flex_attention": flex, "bandwidth": bandwidth}
        parts = {name: functools.partial(part, bench) for name, part in on_cuda.items()} | parts
    chosen = args.parts.split(",") if args.parts else list(parts)
    if unknown := set(chosen) - set(parts):
        parser.error(f"no parts {sorted(unknown)} here: there are {list(parts)}")
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        free_device()
        result[name] = attempted(parts[name])
        print(name, json.dumps(result[name], indent=2), flush=True)
        if args.output:
            (args.output / "gpu_pretrain.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    sys.exit('"failed"' in json.dumps(result))


if __name__ == "__main__":
    main()
