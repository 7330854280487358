"""Held-out batches: reading them once, making them the same on all ranks, cutting them into sequences.

A batch is a nested container (mapping, list, tuple) of tensors whose first dimension counts sequences.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from ..distributed import Processes
from .isolation import preserved_rng
from .reachable import preserved


def read_batches(name: str, loader: Any, count: int, seed: int, processes: Processes) -> list[Any]:
    """The first ``count`` batches of a loader, on the CPU, the same ones on every rank.

    Afterwards the loader, and everything that it can reach, is as it was (see ``reachable.py``).

    If all ranks read the same batches, only a digest is exchanged. Otherwise (a DistributedSampler, Accelerate's
    loaders) the batches read are gathered on every rank and put together by :func:`merge_shares`.

    Args:
        name: the domain's name, for messages.
        loader: a DataLoader or another iterable of batches.
        count: how many batches are wanted.
        seed: random seed for shuffled loaders.
        processes: the ranks that train the model together.

    Raises:
        ValueError: the loader yields no batches.
        TypeError: it is not an iterable of batches.
    """
    with processes.raise_on_all():
        mine = _read(name, loader, count, seed)
    if processes.size == 1:
        return mine
    digests = processes.all_gather_object(_digest(mine))
    shares = len(set(digests))
    if shares == 1:
        return mine
    # One rank sends each share, and no more of it than its portion of the batches wanted.
    sends = digests.index(digests[processes.rank]) == processes.rank
    sent = processes.all_gather_object(mine[: -(-count // shares)] if sends else [])
    by_sequence = isinstance(getattr(loader, "sampler", None), DistributedSampler)
    return merge_shares([share for share in sent if share], count, by_sequence=by_sequence)


def merge_shares(shares: list[list[Any]], count: int, *, by_sequence: bool) -> list[Any]:
    """At most ``count`` batches' worth of different sequences out of the batches that several ranks have read.

    Sequences, or whole batches, come in turn: the first of each share, the second of each, and so on. That is the
    dataset's order where a DistributedSampler without shuffling has dealt out its sequences, or Accelerate its batches.
    Repeated sequences (samplers repeat some, to give every rank as many) are dropped. Sequences of equal shape then
    form batches as large as the first batch of the first share.

    Args:
        shares: the batches of each rank, none empty.
        count: how many batches of that size are wanted.
        by_sequence: whether ranks were dealt single sequences, and not whole batches.
    """
    size = count_sequences(shares[0][0])
    dealt = [
        [[select_sequences(batch, [index]) for index in range(count_sequences(batch))] for batch in share]
        for share in shares
    ]
    if by_sequence:
        dealt = [[[sequence] for batch in share for sequence in batch] for share in dealt]
    turns = itertools.zip_longest(*dealt, fillvalue=[])
    different = {fingerprint(sequence, 0): sequence for turn in turns for batch in turn for sequence in batch}
    alike: dict[Any, list[Any]] = {}
    for sequence in itertools.islice(different.values(), count * size):
        # Numbers without a dimension belong to the whole batch: only sequences that agree on them share one.
        key = tuple((t.dtype, tuple(t.shape)) if t.dim() else t.item() for t in tensors_of(sequence))
        alike.setdefault(key, []).append(sequence)
    return [
        _concatenated(sequences[first : first + size])
        for sequences in alike.values()
        for first in range(0, len(sequences), size)
    ]


def _concatenated(sequences: list[Any]) -> Any:
    """One batch of sequences whose tensors have equal shapes; what is no tensor is that of the first."""
    columns = zip(*map(tensors_of, sequences), strict=True)
    joined = iter([torch.cat(column) if column[0].dim() and len(column) > 1 else column[0] for column in columns])
    return map_tensors(sequences[0], lambda _: next(joined))


def _digest(batches: list[Any]) -> bytes:
    digest = hashlib.sha256()
    for batch in batches:
        for index in range(count_sequences(batch)):
            digest.update(fingerprint(batch, index))
    return digest.digest()


def _read(name: str, loader: Iterable[Any], count: int, seed: int) -> list[Any]:
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise TypeError(f"heldout loader {name!r} is a {type(loader).__name__}, a Dataset: wrap it in a DataLoader")
    if not isinstance(loader, Iterable):
        raise TypeError(f"heldout loader {name!r} is a {type(loader).__name__}: give an iterable of batches")
    # Accelerate's loaders register themselves as the active one and move batches; their inner DataLoader does neither.
    loader = getattr(loader, "base_dataloader", loader)
    if isinstance(loader, DataLoader):
        # A shallow copy, so that persistent workers of the original keep the state they are in.
        loader = copy.copy(loader)
        loader._iterator = None  # type: ignore[attr-defined]
    # An iterator is there to be read once, as whoever gives one knows.
    said = "" if isinstance(loader, Iterator) else f"heldout loader {name!r}"
    with preserved_rng(seed), preserved([loader], seed=seed, name=said):
        iterator = iter(loader)
        found = [map_tensors(batch, lambda t: t.detach().cpu()) for batch in itertools.islice(iterator, count)]
        del iterator
    if not found:
        raise ValueError(f"heldout loader {name!r} yields no batches: give at least one batch of held-out data")
    return found


# One batch


def map_tensors(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """The nested batch with ``function`` applied to each tensor; mappings become dicts."""
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
    """The first dimension that all tensors of the batch share; 1 if they share none (the batch cannot be cut)."""
    sizes = {tensor.shape[0] for tensor in tensors_of(batch) if tensor.dim() > 0}
    return sizes.pop() if len(sizes) == 1 else 1


def select_sequences(batch: Any, indices: Sequence[int]) -> Any:
    """A copy, on the CPU, of the sequences at ``indices``, each below ``count_sequences(batch)``."""
    total = count_sequences(batch)
    chosen = torch.as_tensor(indices, dtype=torch.long)

    def select(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu()
        splittable = tensor.dim() > 0 and tensor.shape[0] == total
        return tensor.index_select(0, chosen) if splittable else tensor.clone()

    return map_tensors(batch, select)


def fingerprint(batch: Any, index: int) -> bytes:
    """A digest of the content of one sequence, which padding does not change where there is an attention mask."""
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
