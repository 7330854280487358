"""A short run of a tiny model with real files, for tests of what it leaves and of what it finds."""

import torch
from conftest import AT_ONCE
from torch import nn

from traj_merge_callback import TrajectoryMerger


def nll(model, batch):
    return ((model(batch) - batch) ** 2).sum(), len(batch)


class Run:
    """A short run of a tiny model, continued from its saved state or begun anew."""

    def __init__(self, folder, resume=False, **options):
        self.folder, self.resume = folder, resume
        torch.manual_seed(0)
        self.model = nn.Linear(3, 3)
        batches = list(torch.randn(8, 4, 3))
        defaults = {"capture_every": 1, "merge_every": 2, "window_size": 2, "search": "lawa", **AT_ONCE}
        options = {**defaults, "output_dir": str(folder / "merged"), **options}
        self.merger = TrajectoryMerger(batches, nll=nll, **options)

    def steps(self, first, last):
        if self.resume:
            self.merger.resume_from(lambda: self.folder / "state", self.model, first - 1)
        for step in range(first, last + 1):
            self.merger.settle()
            with torch.no_grad():
                self.model.weight.mul_(0.9)
            self.merger.step(self.model, step)
        self.merger.wait()
        return self

    def save(self):
        self.merger.save_state(self.folder / "state")
        self.merger.wait()
        return self
