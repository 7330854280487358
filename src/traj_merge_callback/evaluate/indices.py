"""The sequences that a DataLoader can be asked for by index: those that its sampler draws from a map-style dataset."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from .sample import Asked, Laid, Split, choose, evenly, in_order


@dataclass(frozen=True)
class Indices:
    """What a loader draws.

    Args:
        drawn: indices, each once.
        size: sequences of a batch; None where the loader has no fixed batch size.
        batches: what a batch sampler that is not torch's own draws; None: batches are ``size`` sequences, or, without
            a size, each item of the dataset is a batch.
        length: of the dataset.
    """

    drawn: Sequence[int] | np.ndarray
    size: int | None
    batches: list[list[int]] | None
    length: int

    @classmethod
    def of(cls, loader: Any) -> Indices | None:
        """What a loader draws; None if its sequences cannot be asked for by index. Iterates over its sampler."""
        # A loader that iterates in a way of its own may not look at the sampler.
        if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
            return None
        try:
            length = 0 if isinstance(loader.dataset, IterableDataset) else len(loader.dataset)  # type: ignore[arg-type]
            if length == 0:
                return None
            batch_sampler: Any = loader.batch_sampler
            if type(batch_sampler).__name__ == "BatchSamplerShard":  # Accelerate's, of what all ranks draw together
                batch_sampler = batch_sampler.batch_sampler
            if batch_sampler is None:
                return cls(_drawn(loader.sampler, length), None, None, length)
            if type(batch_sampler).__iter__ is BatchSampler.__iter__:
                return cls(_drawn(batch_sampler.sampler, length), batch_sampler.batch_size, None, length)
            batches = [[operator.index(i) for i in batch] for batch in itertools.islice(batch_sampler, length)]
            batches = [batch for batch in batches if batch]
            return cls(_unique(itertools.chain(*batches)), None, batches, length) if batches else None
        except TypeError:  # no length, or indices that are no numbers
            return None

    @classmethod
    def of_all(cls, found: Sequence[Indices | None], rank: int) -> Indices | None:
        """What all ranks draw together; what ``rank`` draws where they do not draw from datasets alike."""
        first, mine = found[0], found[rank]
        if (
            first is None
            or mine is None
            or any(
                one is None
                or (one.length, one.size, one.batches is None) != (first.length, first.size, first.batches is None)
                for one in found
            )
        ):
            return mine
        ranks = [one for one in found if one is not None]
        if all(isinstance(one.drawn, range) and one.drawn == first.drawn for one in ranks):
            return first
        batches = None
        if first.batches is not None:
            batches = [list(b) for b in dict.fromkeys(tuple(b) for one in ranks for b in one.batches or [])]
        return replace(first, drawn=_unique(itertools.chain(*(one.drawn for one in ranks))), batches=batches)

    def asked(self, dataset: Any, count: int, search_fraction: float) -> Asked | None:
        """What ``count`` batches ask of the dataset; None if its items are batches."""
        if self.size is None and self.batches is None:
            return None
        return Asked(dataset, self.drawn, count * (self.size or len((self.batches or [[]])[0])), search_fraction)

    def chosen(
        self, dataset: Any, count: int, seed: int, search_fraction: float, laid: Laid | None = None
    ) -> tuple[str, list[Any], list[Split] | None, int]:
        """An even sample.

        Args:
            dataset: which they are indices of.
            count: how many batches are wanted.
            seed, search_fraction: see :func:`choose`.
            laid: how sequences are dealt, where other domains have a say in that.

        Returns:
            The name of the DataLoader's attribute that draws, what it is to draw, the split of each batch (None: not
            decided), and how many sequences (or batches, if items are batches) there are.
        """
        if self.batches is not None:
            return self._chosen_batches(dataset, self.batches, count, seed, search_fraction, laid)
        order, runs = (in_order(dataset, self.drawn), None) if laid is None else (laid.order, laid.runs)
        if self.size is None:
            return "sampler", [int(order[at]) for at in evenly(len(order), count, seed)], None, len(order)
        wanted: list[list[int]] = []
        splits: list[Split] = []
        picked = choose(len(order), count * self.size, search_fraction, seed, runs)
        batches = -(-sum(map(len, picked.values())) // self.size)
        for split, places in picked.items():
            each = [part for part in np.array_split(places, batches) if len(part)]
            wanted += [[int(order[at]) for at in part] for part in each]
            splits += [split] * len(each)
        return "batch_sampler", wanted, splits, len(order)

    def _chosen_batches(
        self, dataset: Any, batches: list[list[int]], count: int, seed: int, search_fraction: float, laid: Laid | None
    ) -> tuple[str, list[Any], list[Split] | None, int]:
        """Whole batches, because others may be too large, each cut into the sequences of either split."""
        batches = sorted(batches, key=min)
        some = [batches[at] for at in evenly(len(batches), count, seed)]
        if laid is None:
            order = in_order(dataset, _unique(itertools.chain(*some)))
            picked = choose(len(order), len(order), search_fraction, seed)
        else:
            order = laid.order
            every = {split: [range(*run) for run in runs] for split, runs in laid.runs.items()}
            picked = {split: np.array([*itertools.chain(*runs)], dtype=int) for split, runs in every.items()}
        owner = {int(order[at]): split for split, places in picked.items() for at in places}
        wanted: list[list[int]] = []
        splits: list[Split] = []
        for batch in some:
            for split in picked:
                if part := [index for index in batch if owner.get(index) == split]:
                    wanted.append(part)
                    splits.append(split)
        return "batch_sampler", wanted, splits, len(self.drawn)


def _drawn(sampler: Any, length: int) -> Sequence[int] | np.ndarray:
    """The different indices that a sampler draws; at most ``length`` draws, as some never end."""
    if type(sampler) in (SequentialSampler, RandomSampler):
        return range(len(sampler.data_source))
    if type(sampler) is DistributedSampler:
        return range(len(sampler.dataset))  # type: ignore[arg-type]
    return _unique(itertools.islice(sampler, length))


def _unique(indices: Iterable[Any]) -> np.ndarray:
    return np.unique(np.fromiter((operator.index(index) for index in indices), dtype=np.int64))
