"""What two processes hold out of loaders of different kinds; run by test_reading.py with torchrun."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SubsetRandomSampler

from traj_merge_callback import HeldOutLoss
from traj_merge_callback.distributed import Processes


class Numbered(Dataset):
    def __init__(self, numbers):
        self.numbers = numbers

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        return {"input_ids": torch.full((4,), self.numbers[index])}


def loaders(rank, size):
    everything = Numbered(range(1000))
    yield "all", DataLoader(everything, batch_size=4)
    for shuffle in (False, True):
        sampler = DistributedSampler(everything, size, rank, shuffle=shuffle)
        yield f"distributed, shuffled {shuffle}", DataLoader(everything, batch_size=4, sampler=sampler)
    yield "accelerate", Accelerator(cpu=True).prepare(DataLoader(everything, batch_size=4))
    some = SubsetRandomSampler(range(0, 1000, 7))
    wrapped = DistributedSamplerWrapper(some, num_replicas=size, rank=rank, shuffle=False)
    yield "some, by Lightning", DataLoader(everything, batch_size=4, sampler=wrapped)
    yield "some", DataLoader(everything, batch_size=4, sampler=some)
    yield "dealt by hand", DataLoader(Numbered(range(rank, 1000, size)), batch_size=4)
    yield "a part each", DataLoader(Numbered(range(500 * rank, 500 * rank + 500 + 20 * rank)), batch_size=4)
    yield "iterables", iter(DataLoader(Numbered(range(rank, 1000, size)), batch_size=4))
    yield "only one has indices", [everything[0]] if rank else DataLoader(everything, batch_size=4)


def main():
    several = dist.is_torchelastic_launched()
    if several:
        dist.init_process_group("gloo")
    rank, size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    found = {}
    for name, loader in loaders(rank, size):
        if name == "only one has indices":
            loader = [{"input_ids": batch["input_ids"].view(1, -1)} for batch in loader] if rank else loader
        loss = HeldOutLoss(loader, processes=Processes(), batches=16)
        splits = {
            split: sorted(int(row[0]) for batch in batches for row in batch.data["input_ids"])
            for split, batches in loss._batches.items()
        }
        found[name] = {"digest": loss.digest, **splits}
    Path(sys.argv[1], f"found-{rank}-of-{size}.json").write_text(json.dumps(found))
    if several:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
