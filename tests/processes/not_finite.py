"""Run in two processes by test_failures: weights that are not finite in one rank's columns, at some steps.

Arguments: the folder for results, and what rows are.
"""

import json
import logging
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import AT_ONCE, LENGTH, tiny_llama
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import realtext
from traj_merge_callback import TrajectoryMerger

dist.init_process_group("gloo")
rank = dist.get_rank()
logging.basicConfig(level=logging.WARNING, format=f"[{rank}] %(message)s")
text = realtext.split_blocks(realtext.python_source()[:60], LENGTH)
folder, row = sys.argv[1:]
torch.manual_seed(0)
model = DistributedDataParallel(tiny_llama(dropout=0.0))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
merger = TrajectoryMerger(
    DataLoader(realtext.Blocks(text[1][:28]), 4),
    output_dir=f"{folder}/merged",
    row=row,
    window_size=3,
    capture_every=2,
    samples_per_row=2 if row == "multiscale" else None,
    merge_every=4,
    heldout_batches=7,
    progress=False,
    **AT_ONCE,
)
spans = {}
for step in range(1, 21):
    batch = text[0][4 * step + 2 * rank : 4 * step + 2 * rank + 2]
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    last = model.module.model.norm.weight  # whose columns are the second rank's
    kept = last.detach().clone()
    if step in (7, 10, 12):
        last.data[-1] = float("nan")
    merger.step(model, step)
    merger.settle()
    last.data.copy_(kept)
    spans[step] = [list(span) for span in merger.window.spans]
merger.finish(model)
found = {"records": [record.step for record in merger.records], "spans": spans}
Path(folder, f"found-{rank}.json").write_text(json.dumps(found))
dist.destroy_process_group()
