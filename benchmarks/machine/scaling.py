"""A cost model of merging at scale: bytes, seconds and overhead by model size and number of GPUs.

Nothing is measured here. Shares of bandwidth that the products reach are those that ``bandwidth.py`` measured (on the
CPU); everything about the machine is from datasheets or a plain assumption, and an option. Prints a table in Markdown,
and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

MODELS = {"1 B": (1e9, 1e6), "8 B": (8e9, 4e6), "70 B": (70e9, 8e6), "400 B": (400e9, 16e6)}
GPUS = (8, 64, 512, 4096)
ROW_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0625}
# What training keeps on the GPUs per parameter: weights, gradients and Adam's two moments in float32, bfloat16 copies.
TRAINING_BYTES = 18.0
PIECE = 1 << 23
PARTS = 4


@dataclass(frozen=True)
class Machine:
    """One GPU's share of a node; bytes, bytes per second, operations per second, seconds."""

    memory: float
    host: float
    pcie: float
    nvlink: float
    network: float
    peak: float
    utilization: float
    hop: float
    per_node: int


@dataclass(frozen=True)
class Merge:
    """What a merge does: rows, passes over the search split, products, and held-out text."""

    rows: int
    dtype: str
    passes: float
    combines: int
    projects: int
    batches: int
    batch_tokens: int
    merge_every: int


@dataclass(frozen=True)
class Cost:
    """What it costs, of one process unless a name says otherwise."""

    fits: bool
    strategy: str
    host_gb_per_node: float
    capture_s: float
    products_s: float
    forward_s: float
    gathers_s: float
    exchanges_s: float
    merge_s: float
    step_s: float
    overhead: float
    merge_every_at_2_percent: int


def cost(
    parameters: float, tokens: float, gpus: int, machine: Machine, merge: Merge, bandwidth: dict[str, float]
) -> Cost:
    """Costs of a run that trains on ``tokens`` a step."""
    shared = parameters * TRAINING_BYTES < 0.7 * machine.memory
    fits = shared or parameters * TRAINING_BYTES / gpus < 0.7 * machine.memory
    columns = parameters / (machine.per_node if shared else gpus)
    row = columns * ROW_BYTES[merge.dtype]
    # The rows, the anchor of int8 rows, where live weights arrive if they are not copied exactly, the staging row.
    others = {"float32": 4.0, "bfloat16": 8.0, "int8": 12.0}[merge.dtype]
    host = (merge.rows * ROW_BYTES[merge.dtype] + others) * columns * machine.per_node
    read = merge.rows * row / machine.pcie
    products = merge.combines * read / bandwidth["combine"] + merge.projects * read / bandwidth["project"]
    # Every process takes a batch at a time, and a part of the search split has few.
    turns = merge.passes * PARTS * math.ceil(merge.batches / PARTS / gpus) + 2 * math.ceil(merge.batches / gpus)
    operations = 2 * parameters * merge.batch_tokens / (machine.peak * machine.utilization)
    across = machine.nvlink if gpus <= machine.per_node else machine.network
    if shared:
        gathers = (merge.combines + merge.projects) * 4 * parameters / machine.nvlink
    else:
        gathers = turns * 2 * parameters / across
    pieces = turns + (merge.combines + merge.projects) * math.ceil(columns / PIECE) + 30
    exchanges = pieces * 2 * (gpus - 1) * machine.hop
    step = 6 * parameters * tokens / (gpus * machine.peak * machine.utilization)
    total = products + turns * operations + gathers + exchanges
    return Cost(
        fits=fits,
        strategy="DDP" if shared else "FSDP",
        host_gb_per_node=host / 1e9,
        capture_s=columns * 4 / machine.pcie,
        products_s=products,
        forward_s=turns * operations,
        gathers_s=gathers,
        exchanges_s=exchanges,
        merge_s=total,
        step_s=step,
        overhead=total / (merge.merge_every * step),
        merge_every_at_2_percent=math.ceil(total / (0.02 * step)),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--memory", type=float, default=80e9, help="of a GPU")
    parser.add_argument("--host", type=float, default=2e12, help="memory of a node")
    parser.add_argument("--pcie", type=float, default=55e9, help="host to GPU, each GPU")
    parser.add_argument("--nvlink", type=float, default=360e9, help="between the GPUs of a node, each GPU")
    parser.add_argument("--network", type=float, default=40e9, help="between nodes, each GPU")
    parser.add_argument("--peak", type=float, default=989e12, help="operations of a GPU per second")
    parser.add_argument("--utilization", type=float, default=0.4, help="share of the peak that training reaches")
    parser.add_argument("--hop", type=float, default=25e-6, help="seconds from process to process in an agreement")
    parser.add_argument("--per-node", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--dtype", choices=list(ROW_BYTES), default="float32")
    parser.add_argument("--passes", type=float, default=5.9, help="over the search split; auto's median")
    parser.add_argument("--combines", type=int, default=5)
    parser.add_argument("--projects", type=int, default=6)
    parser.add_argument("--batches", type=int, default=16, help="of each split")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--merge-every", type=int, default=500)
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results")
    args = parser.parse_args()
    machine = Machine(**{name: getattr(args, name) for name in Machine.__dataclass_fields__})
    merge = Merge(**{name: getattr(args, name) for name in Merge.__dataclass_fields__})
    measured = json.loads((args.results / "bandwidth.json").read_text())["cases"]
    bandwidth = measured[f"cpu, rows in memory, 1e+09 bytes, {args.dtype}"]
    print(
        "| parameters | GPUs | | host GB/node | capture s | products s | forward s | gathers s | agreements s | "
        f"**merge s** | step s | overhead, a merge every {args.merge_every} | merge every, at 2 % |"
    )
    print("|---" * 13 + "|")
    found = {}
    for name, (parameters, tokens) in MODELS.items():
        for gpus in GPUS:
            result = cost(parameters, tokens, gpus, machine, merge, bandwidth)
            found[f"{name}, {gpus}"] = asdict(result)
            if not result.fits:
                print(f"| {name} | {gpus} | training itself does not fit " + "|" * 11)
                continue
            too_much = " (!)" if result.host_gb_per_node * 1e9 > machine.host else ""
            seconds = [result.capture_s, result.products_s, result.forward_s, result.gathers_s, result.exchanges_s]
            print(
                f"| {name} | {gpus} | {result.strategy} | {result.host_gb_per_node:.3g}{too_much} | "
                + " | ".join(f"{value:.2g}" for value in seconds)
                + f" | **{result.merge_s:.3g}** | {result.step_s:.2g} | {result.overhead:.2%} | "
                f"{result.merge_every_at_2_percent} |"
            )
    print(json.dumps({"machine": asdict(machine), "merge": asdict(merge), "costs": found}))


if __name__ == "__main__":
    main()
