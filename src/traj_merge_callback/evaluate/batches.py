"""Batches as nested containers of tensors: cutting them into sequences, moving them, telling them apart."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


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


def interleaved(shares: list[list[Any]], sequences: int) -> list[Any]:
    """Batches in which the sequences of several processes come in turn: the first of each, the second of each, ...

    If tensors differ in more than the number of sequences, batches are left as they are, and come in turn.

    Args:
        shares: the batches of each process.
        sequences: in each batch that is returned, but the last.
    """
    kept = [share for share in shares if share]
    columns = [
        [torch.cat(parts) for parts in zip(*map(tensors_of, share), strict=True)] for share in kept if _alike(share)
    ]
    if len(columns) < len(kept) or not _alike(columns):
        return [batch for turn in itertools.zip_longest(*kept) for batch in turn if batch is not None]
    counts = [len(tensors[0]) for tensors in columns]
    starts = list(itertools.accumulate(counts, initial=0))
    turns = itertools.product(range(max(counts)), range(len(counts)))
    order = torch.tensor([starts[share] + index for index, share in turns if index < counts[share]])
    mixed = [torch.cat(column)[order].split(sequences) for column in zip(*columns, strict=True)]
    found = []
    for parts in zip(*mixed, strict=True):
        tensors = iter(parts)
        found.append(map_tensors(kept[0][0], lambda _: next(tensors)))  # noqa: B023
    return found


def _alike(batches: list[Any]) -> bool:
    """Whether batches have the same tensors, but for the number of sequences."""
    if any(tensor.dim() == 0 for batch in batches for tensor in tensors_of(batch)):
        return False
    return len({tuple((t.dtype, t.dim(), tuple(t.shape[1:])) for t in tensors_of(batch)) for batch in batches}) == 1


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
