"""Domains that are parts of one dataset: neighbours of a search sequence are no report sequences of another domain."""

import numpy as np
import pytest
import torch
from test_sample import Numbered, numbers
from torch.utils.data import ConcatDataset, DataLoader, Subset

from traj_merge_callback import HeldOutLoss

LENGTH = 1286


def rows():
    datasets = pytest.importorskip("datasets")
    rows = [{key: value.tolist() for key, value in Numbered()[index].items()} for index in range(LENGTH)]
    return datasets.Dataset.from_list(rows).with_format("torch")


def scattered(count, seed=0):
    return np.sort(np.random.default_rng(seed).choice(LENGTH, count, replace=False)).tolist()


def first_and_joined(one):
    datasets = pytest.importorskip("datasets")
    return {"all": one, "joined": datasets.concatenate_datasets([one.select(range(300)), one.select(range(600, 900))])}


DOMAINS = {
    "a scattered subset": lambda: {"all": (one := Numbered()), "some": Subset(one, scattered(300))},
    "a contiguous subset": lambda: {"all": (one := Numbered()), "some": Subset(one, range(300, 700))},
    "twice": lambda: {"all": (one := Numbered()), "again": one},
    "interleaved": lambda: {
        "even": Subset(one := Numbered(), range(0, LENGTH, 2)),
        "odd": Subset(one, range(1, LENGTH, 2)),
    },
    "disjoint": lambda: {"a": Subset(one := Numbered(), range(500)), "b": Subset(one, range(500, LENGTH))},
    "partly": lambda: {"a": Subset(one := Numbered(), range(700)), "b": Subset(one, range(600, LENGTH))},
    "subsets of subsets": lambda: {
        "all": (one := Numbered()),
        "some": Subset(two := Subset(one, torch.randperm(LENGTH).tolist()), range(0, 900, 2)),
        "others": Subset(two, range(1, 900, 2)),
    },
    "joined": lambda: {
        "a": ConcatDataset([one := Numbered(400), two := Numbered(400, 500)]),
        "b": ConcatDataset([two, Subset(one, range(100, 300))]),
    },
    "selected": lambda: {
        "all": (one := rows()),
        "some": one.select(scattered(300)),
        "slice": one.select(range(90, 400)),
    },
    "shuffled": lambda: {"all": (one := rows()).shuffle(seed=1), "some": one.shuffle(seed=2).select(range(400))},
    "split": lambda: {"all": (one := rows()), **one.train_test_split(0.3, seed=0)},
    "selections joined": lambda: first_and_joined(rows()),
}


@pytest.mark.parametrize("kind", DOMAINS)
def test_neighbours_have_one_owner_over_all_domains(kind):
    named = DOMAINS[kind]()
    loss = HeldOutLoss({name: DataLoader(dataset, batch_size=8) for name, dataset in named.items()})
    search, report = (np.array(numbers(loss, split)) for split in ("search", "report"))
    assert np.abs(search[:, None] - report).min() > 1
    near = (np.abs(search[:, None] - report).min(axis=0) <= 4).sum()
    assert near <= 6
    for name in named:
        counts = [len(numbers(loss, split, name)) for split in ("search", "report")]
        assert min(counts) >= 0.25 * sum(counts)
        assert sum(counts) >= 90


@pytest.mark.parametrize("kept", [range(300, 400), scattered(100)])
def test_neighbours_of_what_is_only_reported_on_are_not_searched_on(kept):
    everything = Numbered()
    loaders = {"all": DataLoader(everything, batch_size=8), "law": DataLoader(Subset(everything, kept), batch_size=8)}
    loss = HeldOutLoss(loaders, report_only=["law"])
    assert np.abs(np.array(numbers(loss, "search"))[:, None] - numbers(loss, "report", "law")).min() > 1
    assert len(numbers(loss, "search", "all")) >= 40


def test_batch_samplers_of_ones_own_follow_too():
    everything = Numbered()
    batches = [list(range(first, first + 8)) for first in range(0, 1280, 8)]
    loaders = {
        "all": DataLoader(everything, batch_sampler=batches),
        "some": DataLoader(Subset(everything, scattered(300)), batch_size=8),
    }
    loss = HeldOutLoss(loaders)
    search, report = (np.array(numbers(loss, split)) for split in ("search", "report"))
    assert np.abs(search[:, None] - report).min() > 1


def test_a_small_domain_inside_a_run_of_a_scattered_one_still_has_two_splits():
    everything = Numbered()
    named = {"scattered": Subset(everything, range(0, LENGTH, 60)), "inside": Subset(everything, range(100, 200))}
    loss = HeldOutLoss({name: DataLoader(dataset, batch_size=4) for name, dataset in named.items()})
    for name in named:
        assert numbers(loss, "search", name)
        assert numbers(loss, "report", name)
    assert not set(numbers(loss, "search")) & set(numbers(loss, "report"))
