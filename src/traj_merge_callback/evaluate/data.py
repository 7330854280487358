"""Held-out batches: read once without a trace in the loaders, the same on every rank; cut, moved, told apart."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..distributed import Processes
from .isolation import preserved_rng


def read_heldout(name: str, loader: Any, batches: int, seed: int, processes: Processes) -> list[Any]:
    """The first batches of a loader, on the CPU, the same ones on every rank.

    Where each rank's loader reads a share of its own (a DistributedSampler, Accelerate's loaders), the shares are
    gathered, first batches of all ranks first, and sequences that were there before are dropped: samplers repeat some,
    to give each rank as many.

    Args:
        name: of the domain, for messages.
        loader: a DataLoader or another iterable of batches.
        batches: how many are wanted.
        seed: for shuffled loaders.
        processes: the ranks.

    Raises:
        ValueError, TypeError: the loader has no batches, or is none.
    """
    with processes.raise_on_all():
        mine = _read(name, loader, batches, seed)
    digest = hashlib.sha256(b"".join(_fingerprints(mine))).digest()
    if processes.size == 1 or len(set(processes.all_gather_object(digest))) == 1:
        return mine
    shares = processes.all_gather_object(mine)
    in_turn = [batch for turn in itertools.zip_longest(*shares) for batch in turn if batch is not None]
    return _without_repeats(in_turn)[:batches]


def _fingerprints(batches: list[Any]) -> list[bytes]:
    return [fingerprint(batch, index) for batch in batches for index in range(count_sequences(batch))]


def _without_repeats(batches: list[Any]) -> list[Any]:
    """Batches without the sequences that stand in one before."""
    seen: set[bytes] = set()
    kept = []
    for batch in batches:
        found = _fingerprints([batch])
        new = [index for index, digest in enumerate(found) if digest not in seen and digest not in found[:index]]
        seen.update(found)
        if new:
            kept.append(batch if len(new) == len(found) else select_sequences(batch, new))
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


# Batches as nested containers of tensors


def map_tensors(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same nested mapping, sequence or tensor, with ``function`` applied to each tensor."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, function) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map_tensors(value, function) for value in batch)
    return batch


def tensors_of(batch: Any) -> list[Tensor]:
    """Every tensor in the nested batch, in order."""
    found: list[Tensor] = []
    map_tensors(batch, found.append)
    return found


def count_sequences(batch: Any) -> int:
    """The length of the first dimension that the batch's tensors share; 1 if there is none (the batch is one unit)."""
    sizes = {tensor.shape[0] for tensor in tensors_of(batch) if tensor.dim() > 0}
    return sizes.pop() if len(sizes) == 1 else 1


def select_sequences(batch: Any, indices: Sequence[int]) -> Any:
    """A copy, on the CPU, of the sequences at ``indices`` of a batch that holds ``count_sequences(batch)``."""
    total = count_sequences(batch)
    chosen = torch.as_tensor(indices, dtype=torch.long)

    def select(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu()
        splittable = tensor.dim() > 0 and tensor.shape[0] == total
        return tensor.index_select(0, chosen) if splittable else tensor.clone()

    return map_tensors(batch, select)


def fingerprint(batch: Any, index: int) -> bytes:
    """A digest of one sequence's content, equal for equal sequences however much each was padded."""
    sequence = select_sequences(batch, [index])
    if isinstance(sequence, Mapping) and "input_ids" in sequence and "attention_mask" in sequence:
        tensors = [sequence["input_ids"][sequence["attention_mask"].bool()]]
    else:
        tensors = tensors_of(sequence)
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    if not tensors:
        digest.update(repr(sequence).encode())
    return digest.digest()


def as_tensors(values: Mapping[str, float]) -> dict[str, Tensor]:
    """Numbers as scalar tensors."""
    return {name: torch.tensor(value) for name, value in values.items()}
