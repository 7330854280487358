"""Reading held-out batches once, without a trace in the loaders, and the same ones in every process."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from ..distributed import Processes
from .batches import count_sequences, fingerprint, interleaved, map_tensors, select_sequences
from .isolation import preserved_rng


def read_together(name: str, loader: Any, batches: int, seed: int, processes: Processes) -> list[Any]:
    """The first batches of a loader, on the CPU, the same ones in every process.

    Where each process's loader reads a share of its own (a DistributedSampler, Accelerate's loaders), the shares are
    exchanged, and put in the order in which one process would have read them; what a sampler repeats, to give each
    process as many, is left out.

    Args:
        name: of the domain, for messages.
        loader: a DataLoader or another iterable of batches.
        batches: how many are wanted.
        seed: for shuffled loaders.
        processes: those that train the model together.

    Raises:
        ValueError, TypeError: the loader has no batches, or is none.
    """
    with processes.raise_on_all():
        mine = _read(name, loader, batches, seed)
    if processes.size == 1 or len(set(processes.all_gather_object(_digest(mine)))) == 1:
        return mine
    loader = _plain(loader)
    if isinstance(getattr(loader, "sampler", None), DistributedSampler):
        sequences = processes.from_rank0(lambda: count_sequences(mine[0]))
        shares = processes.all_gather_object(_first_sequences(mine, _share(batches * sequences, processes)))
        found = interleaved(shares, sequences)
    else:
        shares = processes.all_gather_object(mine[: _share(batches, processes)])
        found = [batch for turn in itertools.zip_longest(*shares) for batch in turn if batch is not None]
    found = found[:batches]
    dataset = getattr(loader, "dataset", None)
    return _first_sequences(found, len(dataset)) if isinstance(dataset, Sized) else found


def _share(count: int, processes: Processes) -> int:
    """How many of so many things this process has, if they are dealt out in turn."""
    return max(0, -(-(count - processes.rank) // processes.size))


def _digest(batches: list[Any]) -> bytes:
    digest = hashlib.sha256()
    for batch in batches:
        for index in range(count_sequences(batch)):
            digest.update(fingerprint(batch, index))
    return digest.digest()


def _first_sequences(batches: list[Any], count: int) -> list[Any]:
    kept = []
    for batch in batches:
        sequences = count_sequences(batch)
        if count <= 0:
            break
        kept.append(batch if sequences <= count else select_sequences(batch, range(count)))
        count -= sequences
    return kept


def _plain(loader: Any) -> Any:
    # Accelerate's loaders register themselves as the active one and move batches; their inner DataLoader does neither.
    return getattr(loader, "base_dataloader", loader)


def _read(name: str, loader: Iterable[Any], batches: int, seed: int) -> list[Any]:
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise TypeError(f"heldout loader {name!r} is a {type(loader).__name__}, a Dataset: wrap it in a DataLoader")
    if not isinstance(loader, Iterable):
        raise TypeError(f"heldout loader {name!r} is a {type(loader).__name__}: give an iterable of batches")
    loader = _plain(loader)
    if isinstance(loader, DataLoader):
        # A shallow copy, so that persistent workers of the original keep the state they are in.
        loader = copy.copy(loader)
        loader._iterator = None  # type: ignore[attr-defined]
    with preserved_rng(seed), _preserved_generators(loader, seed):
        iterator = iter(loader)
        found = [map_tensors(batch, lambda t: t.detach().cpu()) for batch in itertools.islice(iterator, batches)]
        del iterator
    if not found:
        raise ValueError(f"heldout loader {name!r} yields no batches: give at least one batch of held-out data")
    return found


@contextmanager
def _preserved_generators(loader: Any, seed: int) -> Iterator[None]:
    """Generators that belong to a loader or its samplers start from ``seed`` and are put back."""
    owners = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    owners.append(getattr(owners[-1], "sampler", None))
    found = {id(g): g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)}
    states = [(generator, generator.get_state()) for generator in found.values()]
    try:
        for generator, _ in states:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
