"""Which held-out sequences are read, and how they are dealt to the splits: evenly, in runs, each to one owner."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    random_split,
)
from transformers import DataCollatorWithFlattening

from traj_merge_callback import HeldOutLoss
from traj_merge_callback.evaluate.sample import choose


class Numbered(Dataset):
    """Sequences whose tokens say where in the dataset they stand."""

    def __init__(self, length=1286, first=0):
        self.length, self.first = length, first

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        assert 0 <= index < self.length
        ids = torch.full((6,), self.first + index)
        return {"input_ids": ids, "labels": ids}


class Stream(IterableDataset):
    def __iter__(self):
        return (Numbered()[index] for index in range(1286))


def numbers(loss, split, domain=None):
    """The places of a split's sequences in the dataset, in order."""
    batches = [batch for batch in loss._batches[split] if domain in (None, batch.domain)]
    return sorted(int(row[0]) for batch in batches for row in batch.data["input_ids"])


def near(loss, within, place=lambda number: number, **domain):
    """How many report sequences stand next to a search sequence."""
    search = np.array([place(number) for number in numbers(loss, "search", **domain)])
    return sum(np.abs(search - place(number)).min() <= within for number in numbers(loss, "report", **domain))


@given(st.integers(2, 5000), st.integers(2, 400), st.floats(0.05, 0.95), st.integers(0, 9))
def test_runs_are_disjoint_and_as_large_as_asked_for(total, wanted, fraction, seed):
    found = choose(total, wanted, fraction, seed)
    search, report = (set(found[split].tolist()) for split in ("search", "report"))
    assert search
    assert report
    assert not search & report
    assert len(search) + len(report) == sum(map(len, found.values()))
    assert max(search | report) < total
    wanted = min(total, wanted)
    assert wanted - total // 16 - 4 <= len(search | report) <= wanted
    assert len(search) <= max(1, round(wanted * fraction))


def test_a_dataset_that_is_too_large_to_list_is_sampled():
    found = choose(10**12, 128, 0.5, 0)
    assert [len(places) for places in found.values()] == [64, 64]
    loss = HeldOutLoss(DataLoader(Numbered(10**9), batch_size=8))
    assert max(numbers(loss, "search")) > 0.9e9


LOADERS = {
    "in order": lambda: DataLoader(Numbered(), batch_size=8),
    "shuffled": lambda: DataLoader(Numbered(), batch_size=8, shuffle=True),
    "with workers": lambda: DataLoader(Numbered(), batch_size=8, num_workers=1),
    "distributed": lambda: DataLoader(Numbered(), batch_size=8, sampler=DistributedSampler(Numbered(), 2, 1)),
    "a random subset": lambda: DataLoader(random_split(Numbered(), [1286])[0], batch_size=8),
    "a batch sampler": lambda: DataLoader(Numbered(), batch_sampler=Buckets()),
    "a list of batches": lambda: list(DataLoader(Numbered(), batch_size=8)),
    "items that are batches": lambda: DataLoader(list(DataLoader(Numbered(), batch_size=8)), batch_size=None),
}


class Buckets:
    """Batches of neighbours, in an order of their own, for ever."""

    def __iter__(self):
        while True:
            for first in torch.randperm(1280 // 8).tolist():
                yield range(8 * first, 8 * first + 8)


@pytest.mark.parametrize("name", LOADERS)
def test_held_out_sequences_are_spread_over_the_whole_set_and_said(name, caplog):
    loader = LOADERS[name]()
    with caplog.at_level(logging.INFO, "traj_merge_callback"):
        loss = HeldOutLoss(loader)
    for split in ("search", "report"):
        found = numbers(loss, split)
        assert len(found) == pytest.approx(64, abs=4)
        assert np.histogram(found, 4, (0, 1286))[0].min() >= 12
    (line,) = [record.getMessage() for record in caplog.records if "held-out" in record.getMessage()]
    if name in ("in order", "shuffled", "distributed"):
        assert line == "held-out: 128 of 1286 sequences, 64 to search, 64 to report"
    assert near(loss, 4) <= 5


def test_of_an_iterable_the_first_are_read_and_that_is_said(caplog):
    with caplog.at_level(logging.INFO, "traj_merge_callback"):
        loss = HeldOutLoss(DataLoader(Stream(), batch_size=8))
    assert max(numbers(loss, "report") + numbers(loss, "search")) == 127
    assert "held-out: 120 of the first 128 sequences, 60 to search, 60 to report" in caplog.text
    assert near(loss, 1) == 0


@pytest.mark.parametrize("sampler", [SubsetRandomSampler, lambda kept: WeightedRandomSampler(weights(kept), 500)])
def test_what_a_sampler_leaves_out_is_never_read(sampler):
    kept = list(range(0, 1286, 10))
    loss = HeldOutLoss(DataLoader(Numbered(), batch_size=8, sampler=sampler(kept)))
    assert set(numbers(loss, "search") + numbers(loss, "report")) <= set(kept)
    assert len(numbers(loss, "report")) >= 45


def weights(kept):
    found = torch.zeros(1286)
    found[kept] = 1.0
    return found


def test_neighbours_are_kept_apart_where_the_order_was_shuffled_before():
    datasets = pytest.importorskip("datasets")
    rows = [{key: value.tolist() for key, value in Numbered()[index].items()} for index in range(400)]
    shuffled = datasets.Dataset.from_list(rows).with_format("torch").shuffle(seed=1).select(range(300))
    order = torch.randperm(1286)[:300].tolist()
    for subset in (shuffled, Subset(Numbered(), order), Subset(Subset(Numbered(), order), range(0, 300, 2))):
        loss = HeldOutLoss(DataLoader(subset, batch_size=8), batches=100)
        assert len(numbers(loss, "report")) >= 60
        assert near(loss, 1) <= 1


@pytest.mark.parametrize("kept", [range(0, 28), range(100, 128), range(0, 1286, 46)])
def test_a_sequence_has_one_owner_over_all_domains(kept):
    everything = Numbered()
    named = {"all": everything, "some": Subset(everything, kept), "again": Subset(everything, list(kept)[::2])}
    loss = HeldOutLoss({name: DataLoader(dataset, batch_size=8) for name, dataset in named.items()}, batches=200)
    assert not set(numbers(loss, "search")) & set(numbers(loss, "report"))
    for name in named:
        search, report = numbers(loss, "search", name), numbers(loss, "report", name)
        assert 0.3 < len(search) / len(search + report) < 0.7


def test_what_is_only_reported_on_is_not_searched_on_in_another_domain():
    everything = Numbered(200)
    loaders = {"all": DataLoader(everything, batch_size=8), "law": DataLoader(Subset(everything, range(30, 60)))}
    loss = HeldOutLoss(loaders, batches=50, report_only=["law"])
    assert not set(numbers(loss, "search")) & set(range(30, 60))
    assert numbers(loss, "report", "law") == list(range(30, 60))


def test_one_owner_whatever_the_domains_batches_hold_beside_the_tokens(heldout):
    ids = heldout.blocks[:32]
    masked = torch.where(torch.arange(32) % 5 == 0, 1, ids)
    bare, padded = torch.nn.functional.pad(ids, (4, 0)), torch.nn.functional.pad(torch.ones_like(ids), (4, 0))
    loss = HeldOutLoss(
        {
            "bare": [{"input_ids": ids}],
            "labels": [{"labels": ids.flip(0), "input_ids": ids.flip(0)}],
            "short": [{"input_ids": ids[5:15].int(), "position_ids": torch.arange(32).expand(10, 32)}],
            "padded": [{"input_ids": bare, "attention_mask": padded}],
            "masked at random": [{"input_ids": masked, "labels": torch.where(masked == ids, -100, ids)}],
        }
    )
    found = {}
    for split, batches in loss._batches.items():
        for batch in batches:
            rows = batch.data["input_ids"][:, -32:].long()
            if "random" in batch.domain:
                rows = torch.where(batch.data["labels"] == -100, rows, batch.data["labels"])
            for row in rows:
                found.setdefault(tuple(row.tolist()), set()).add(split)
    assert all(len(splits) == 1 for splits in found.values())


def test_sequences_that_are_there_often_still_give_two_splits():
    repeated = torch.utils.data.ConcatDataset([Numbered(4)] * 100)
    loss = HeldOutLoss(DataLoader(repeated, batch_size=8))
    assert set(numbers(loss, "search")) | set(numbers(loss, "report")) == {0, 1, 2, 3}
    assert not set(numbers(loss, "search")) & set(numbers(loss, "report"))


def test_a_collator_that_packs_a_batch_into_one_sequence_mixes_no_splits(caplog):
    class Items(Numbered):
        def __getitem__(self, index):
            return {"input_ids": super().__getitem__(index)["input_ids"].tolist()}

    with caplog.at_level(logging.INFO, "traj_merge_callback"):
        loss = HeldOutLoss(DataLoader(Items(), batch_size=4, collate_fn=DataCollatorWithFlattening()))
    assert "held-out: 64 of 1286 sequences, packed into 32, 16 to search, 16 to report" in caplog.text
    found = [{int(n) for batch in loss._batches[split] for n in batch.data["input_ids"][0]} for split in loss._batches]
    assert not found[0] & found[1]
    assert min(map(len, found)) == 32


def test_a_registry_that_makes_what_it_is_asked_for_is_left_as_it_is():
    from transformers.activations import ACT2FN

    class Registered(Numbered):
        registry = ACT2FN

    before = dict(dict.items(ACT2FN))
    HeldOutLoss(DataLoader(Registered(), batch_size=8), batches=1)
    assert dict(dict.items(ACT2FN)) == before
