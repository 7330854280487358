"""What the small exchanges between processes cost, without which no piece of a merge is done.

Prints one JSON object: median seconds of an agreement (two numbers, over gloo on this machine) by number of processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from traj_merge_callback.distributed import Processes


def measure(rank: int, size: int, folder: str, rounds: int) -> None:
    """Let one of several processes agree again and again, and write how long it took."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{size}", rank=rank, world_size=size)
    processes = Processes()
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        processes.all_reduce_error(None, 1.0)
        seconds.append(time.perf_counter() - began)
    if processes.is_rank_zero:
        (Path(folder) / f"{size}.json").write_text(json.dumps(statistics.median(seconds[rounds // 10 :])))
    processes.close()
    dist.destroy_process_group()


def main() -> None:
    """Measure with ever more processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            multiprocessing.spawn(measure, (size, folder, args.rounds), nprocs=size)
            found[str(size)] = json.loads((Path(folder) / f"{size}.json").read_text())
            print(f"{size} processes: {found[str(size)] * 1e6:.0f} microseconds", flush=True)
    result = {"cores": os.cpu_count(), "rounds": args.rounds, "agreement_s": found}
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "exchanges.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
