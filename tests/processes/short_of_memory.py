"""Run in two processes by test_failures: memory is short in the last one, in one way after another.

Argument: the folder for results.
"""

import json
import logging
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from conftest import AT_ONCE, LENGTH, tiny_llama
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import realtext
from traj_merge_callback import TrajectoryMerger
from traj_merge_callback.evaluate.kept import Keeper
from traj_merge_callback.evaluate.language_model import language_model_nll

dist.init_process_group("gloo")
rank = dist.get_rank()
logging.basicConfig(level=logging.WARNING, format=f"[{rank}] %(message)s")
text = realtext.split_blocks(realtext.python_source()[:60], LENGTH)
folder, heldout = Path(sys.argv[1]), realtext.Blocks(text[1][:40])
ROWS = 3


def failing(original, when, times=10**9):
    """``original``, but in the last process out of memory so many times, where ``when`` holds for the arguments."""
    left = times

    def called(*arguments, **options):
        nonlocal left
        if rank == 1 and left and when(*arguments, **options):
            left -= 1
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes.")
        return original(*arguments, **options)

    return called


def sharded(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def rows(shape=(), *_, device=None, **options):
    return device is None and isinstance(shape, tuple) and len(shape) == 2 and shape[0] == ROWS


def large(model, batch):
    return len(batch["input_ids"]) > 1


RUNS = {
    "giant": {"window_size": 10**9},
    "allocation": {"short": ("torch.empty", failing(torch.empty, rows))},
    "kept": {"short": (f"{Keeper.__module__}.Keeper.keep", failing(Keeper.keep, lambda *_: step == 4, 1))},
    # The share of a candidate that DDP's ranks exchange.
    "share": {"short": ("torch.Tensor.new_zeros", failing(torch.Tensor.new_zeros, lambda *_: step == 4, 1))},
    "passes": {"nll": failing(language_model_nll, large)},
    "passes-fsdp": {"nll": failing(language_model_nll, large), "wrap": sharded},
}


def run(name, short=None, wrap=DistributedDataParallel, **options):
    """Train; the steps of merges, the seconds that it took, and the weights at the end."""
    global step
    torch.manual_seed(0)
    model, step = wrap(tiny_llama(dropout=0.0)), 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    merger = None
    if name != "plain":
        defaults = {"window_size": ROWS, "capture_every": 2, "merge_every": 4, "row": "last", "evaluations": 3}
        defaults |= {"heldout_batches": 5, "progress": False, "output_dir": str(folder / name), **AT_ONCE}
        merger = TrajectoryMerger(DataLoader(heldout, 8), process_timeout=60.0, **{**defaults, **options})
    began = time.monotonic()
    for step in range(1, 9):
        batch = text[0][4 * step + 2 * rank : 4 * step + 2 * rank + 2]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if merger is not None:
            with patch(*short, autospec=False) if short else nullcontext():
                merger.step(model, step)
    seconds = time.monotonic() - began
    if merger is not None:
        merger.finish(model)
    weights = torch.cat([p.full_tensor().flatten() if wrap is sharded else p.flatten() for p in model.parameters()])
    return [one.step for one in merger.records] if merger else [], seconds, weights.detach()


found = {}
plain = {wrap: run("plain", wrap=wrap)[2] for wrap in (DistributedDataParallel, sharded)}
for name, how in RUNS.items():
    print(f"BEGIN {name}", flush=True)
    records, seconds, weights = run(name, **how)
    same = torch.equal(weights, plain[how.get("wrap", DistributedDataParallel)])
    found[name] = {"records": records, "seconds": seconds, "same": same}
(folder / f"found-{rank}.json").write_text(json.dumps(found))
dist.destroy_process_group()
