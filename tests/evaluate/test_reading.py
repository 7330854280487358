"""Reading held-out batches leaves collators, datasets, samplers and transforms as they were, whatever they hold."""

import functools
import io
import itertools
import random
import time
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Subset

from traj_merge_callback import HeldOutLoss

BLOCKS = list(torch.arange(64, dtype=torch.float32).view(16, 4))
_global = random.Random(1)
_elsewhere = types.ModuleType("elsewhere")
_elsewhere.drawn = np.random.default_rng(5)
_lazy = None


class Drawing:
    """Owns a generator, and draws from it for each sequence."""

    def __init__(self, generator):
        self.generator = generator

    def __call__(self, batch):
        return torch.stack(batch) + draw(self.generator)


class Slotted(Drawing):
    __slots__ = ("hidden", "later")

    def __init__(self, generator):
        super().__init__(None)
        self.hidden = [{"deep": (generator,)}]

    def __call__(self, batch):
        self.later = draw(self.hidden[0]["deep"][0])
        return torch.stack(batch) + self.later


class Lazy:
    """Makes its generator when it is first needed, and counts."""

    generator, count, seen = None, 0, ()

    def __call__(self, batch):
        if self.generator is None:
            self.generator = random.Random(7)
        self.count += 1
        self.seen = [*self.seen, self.count]
        return torch.stack(batch) + draw(self.generator) + self.count

    def collate(self, batch, offset=0):
        return self(batch) + offset


class OfTheClass(Drawing):
    shared = np.random.RandomState(3)
    calls = 0

    def __init__(self, generator):
        pass

    def __call__(self, batch):
        type(self).calls += 1
        return torch.stack(batch) + draw(self.shared) + self.calls


def draw(generator):
    if isinstance(generator, torch.Generator):
        return float(torch.rand((), generator=generator))
    return generator.random() if hasattr(generator, "random") else generator.rand()


def from_a_global(batch):
    return torch.stack(batch) + _global.random() + _elsewhere.drawn.random()


def lazy_global(batch):
    global _lazy
    if _lazy is None:
        _lazy = random.Random(3)
    return torch.stack(batch) + _lazy.random()


def in_a_closure(generator):
    calls = 0

    def collate(batch):
        nonlocal calls
        calls += 1
        return torch.stack(batch) + draw(generator) + calls

    return collate


def noisy(batch, *, source):
    return torch.stack(batch) + draw(source)


class Transforms(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.steps = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.steps[1].noise = functools.partial(draw, generator)

    def forward(self, batch):
        return torch.stack(batch) + self.steps[1].noise()


COLLATORS = {
    "attribute": Drawing,
    "slots, nested": Slotted,
    "created at first use": lambda generator: Lazy(),
    "bound method": lambda generator: functools.partial(Lazy().collate, offset=1),
    "of the class": OfTheClass,
    "global": lambda generator: from_a_global,
    "lazy global": lambda generator: lazy_global,
    "closure": in_a_closure,
    "lambda": lambda generator: lambda batch: Drawing(generator)(batch),
    "module": Transforms,
    "keyword": lambda generator: functools.partial(
        lambda batch, source: torch.stack(batch) + draw(source), source=generator
    ),
    "cycle": lambda generator: generator_cycle(generator),
}


def generator_cycle(generator):
    collate = Drawing(generator)
    collate.me = {"me": [collate]}
    return collate


GENERATORS = {
    "torch": lambda: torch.Generator().manual_seed(7),
    "numpy": lambda: np.random.default_rng(7),
    "numpy, old": lambda: np.random.RandomState(7),
    "random": lambda: random.Random(7),
    "random, of the system": random.SystemRandom,
}


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("where", COLLATORS)
def test_what_a_collator_draws_for_training_is_not_changed(where, kind):
    def drawn(read):
        make = COLLATORS[where]
        collate = make(GENERATORS[kind]())
        loader = DataLoader(BLOCKS, batch_size=4, collate_fn=collate)
        first = [batch.tolist() for batch in loader]  # which may be the first use, or not
        if read:
            HeldOutLoss(DataLoader(BLOCKS, batch_size=4, collate_fn=collate), nll=nll)
        return first, [batch.tolist() for batch in loader]

    global _lazy, _global
    found = []
    for read in (False, True):
        _lazy, _global = None, random.Random(1)
        _elsewhere.drawn = np.random.default_rng(5)
        OfTheClass.calls, OfTheClass.shared = 0, np.random.RandomState(3)
        random.seed(0)
        found.append(drawn(read))
    if "system" not in kind:
        assert found[0] == found[1]


def nll(model, batch):
    return batch.sum(), 4


def test_an_unused_collator_stays_unused():
    collate = Lazy()
    HeldOutLoss(DataLoader(BLOCKS, batch_size=4, collate_fn=collate), nll=nll)
    assert vars(collate) == {}
    slotted = Slotted(random.Random(7))
    HeldOutLoss(DataLoader(BLOCKS, batch_size=4, collate_fn=slotted), nll=nll)
    assert not hasattr(slotted, "later")


class Noisy(Dataset):
    """Keeps everything that a dataset may keep."""

    def __init__(self):
        self.rngs = [np.random.default_rng(index) for index in range(16)]
        self.order = list(range(16))
        self.cache, self.read = {}, 0

    def __len__(self):
        return 16

    def __getitem__(self, index):
        self.read += 1
        self.cache[index] = self.read
        self.rngs[0].shuffle(self.order)
        return BLOCKS[self.order[index]] + self.rngs[index].normal() + self.read


class Lines(IterableDataset):
    """A file that is read on and on, and a position of its own."""

    def __init__(self):
        self.file = io.StringIO("\n".join(map(str, range(200))))
        self.position = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.position += 1
        return torch.full((3,), float(self.file.readline())) + self.position


class Epochs(RandomSampler):
    """Draws another order in each epoch from its own generator, and counts epochs."""

    def __iter__(self):
        self.epoch = getattr(self, "epoch", -1) + 1
        yield from np.random.default_rng(self.epoch).permutation(16).tolist()


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Noisy(), batch_size=4),
        lambda: DataLoader(Subset(Noisy(), range(12)), batch_size=4, shuffle=True),
        lambda: DataLoader(Lines(), batch_size=4),
        lambda: DataLoader(BLOCKS, batch_size=4, sampler=Epochs(BLOCKS)),
        lambda: DataLoader(BLOCKS, batch_sampler=[[0, 1], [2, 3]], collate_fn=Lazy()),
        lambda: [collate([block, block]) for collate in [Lazy()] for block in BLOCKS],
    ],
)
def test_datasets_and_samplers_are_as_they_were(make):
    def batches(read):
        torch.manual_seed(0)
        loader = make()
        found = [batch.tolist() for batch in itertools.islice(loader, 2)]
        if read:
            HeldOutLoss(loader, nll=nll, batches=3)
        return found + [batch.tolist() for batch in itertools.islice(loader, 3)]

    assert batches(False) == batches(True)


def test_an_iterator_that_cannot_be_put_back_is_named(caplog):
    class Stream(IterableDataset):
        def __init__(self):
            self.source = (block for block in BLOCKS)

        def __iter__(self):
            return self.source

    HeldOutLoss(DataLoader(Stream(), batch_size=2), nll=nll, batches=2)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "heldout loader 'heldout' reads from the generator" in message
    caplog.clear()
    # Whoever gives an iterator knows that it is used up; what it draws from is put back all the same.
    source = Drawing(random.Random(7))
    HeldOutLoss((source(BLOCKS[i : i + 2]) for i in range(0, 16, 2)), nll=nll, batches=2)
    assert not caplog.records
    assert source.generator.random() == random.Random(7).random()


def test_a_large_dataset_of_python_objects_is_read_in_no_time():
    loader = DataLoader(
        [{"ids": list(range(8)), "text": "x"} for _ in range(100_000)], batch_size=2, collate_fn=Lists(7)
    )
    started = time.perf_counter()
    HeldOutLoss(loader, nll=nll, batches=2)
    assert time.perf_counter() - started < 10
    assert loader.collate_fn.generator.random() == random.Random(7).random()


class Lists:
    def __init__(self, seed):
        self.generator = random.Random(seed)

    def __call__(self, batch):
        return torch.tensor([[*row["ids"], self.generator.random()] for row in batch])
