"""What a model holds that is neither a parameter nor a buffer: training finds it as it was."""

import itertools

import pytest
import torch
from conftest import AT_ONCE
from torch import nn

from traj_merge_callback import HeldOutLoss, TrajectoryMerger


class Meter:
    def __init__(self):
        self.total, self.count, self.parts = 0.0, 0, [[], []]


class Masks:
    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inside = nn.Linear(4, 4)
        self.meter, self.masks = Meter(), Masks()
        self.losses = {"all": [], "deep": {"last": [torch.zeros(())]}}
        self.scale = torch.ones(4, requires_grad=True)
        self.unregistered = [nn.Parameter(torch.ones(4))]

    def forward(self, x):
        kept = torch.rand(x.shape, generator=self.masks.generator) > 0.2
        loss = ((self.inside(x * kept) * self.scale + self.unregistered[0] - x) ** 2).sum()
        self.meter.total, self.meter.count = self.meter.total + float(loss.detach()), self.meter.count + 1
        self.meter.parts[0].append(float(loss.detach()))
        self.losses["all"].append(loss)
        self.losses["deep"]["last"][0] = loss
        return loss


@pytest.mark.parametrize("search", ["auto", "lawa"])
def test_helpers_meters_and_unregistered_weights_are_as_without_the_callback(tmp_path, search):
    def run(merging):
        model = Model()
        held = [*torch.randn(8, 4, 4, generator=torch.Generator().manual_seed(1))]
        options = {"window_size": 3, "capture_every": 1, "merge_every": 3, "search": search, "on_error": "raise"}
        nll = lambda model, batch: (model(batch), len(batch))  # noqa: E731
        merger = TrajectoryMerger(held, nll=nll, output_dir=str(tmp_path), **options, **AT_ONCE)
        weights = [*model.parameters(), model.scale, *model.unregistered]
        optimizer = torch.optim.SGD(weights, lr=1e-3)
        generator = torch.Generator().manual_seed(2)
        for step in range(1, 13):
            model(torch.randn(4, 4, generator=generator))
            # Of the last two losses, so that what an evaluation added would be found.
            sum(model.losses["all"][-1:], model.losses["deep"]["last"][0]).backward()
            if step % 2 == 0:
                optimizer.step()
                optimizer.zero_grad()
                merger.step(model, step // 2) if merging else None
        merger.close()
        return model, weights

    plain, expected = run(False)
    model, found = run(True)
    assert all(map(torch.equal, expected, found))
    assert vars(plain.meter) == vars(model.meter)
    assert len(model.losses["all"]) == 12


class Lines(torch.utils.data.IterableDataset):
    def __init__(self, path):
        self.file, self.turns = path.open(), itertools.cycle([1, 2, 3])

    def __iter__(self):
        for line in self.file:
            yield torch.full((2, 4), float(len(line) + next(self.turns)))


def test_open_text_files_and_endless_cycles_stay_usable(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join("x" * n + "\n" for n in range(1, 9)))
    data = Lines(path)
    HeldOutLoss(torch.utils.data.DataLoader(data, batch_size=None), nll=lambda model, x: (x.sum(), 1), batches=4)
    assert data.file.readline() == "x\n"
    assert [next(data.turns) for _ in range(6)] in ([1, 2, 3, 1, 2, 3], [2, 3, 1, 2, 3, 1], [3, 1, 2, 3, 1, 2])
