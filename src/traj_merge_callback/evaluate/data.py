"""Held-out batches: reading them once, making them the same on all ranks, cutting them into sequences.

A batch is a nested container (mapping, list, tuple) of tensors whose first dimension counts sequences.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from ..distributed import Processes
from ..search.checks import shown
from .indices import Indices
from .sample import Laid, Split, evenly, lay_together
from .untouched.isolation import preserved_rng
from .untouched.reachable import preserved

# The label of a position that is no target.
IGNORED = -100
#: The name of a single domain that was given none.
NAMELESS = "heldout"
logger = logging.getLogger("traj_merge_callback")
_TAGS: tuple[Split | None, ...] = (None, "search", "report")


@dataclass
class Held:
    """What was read of one domain.

    Args:
        batches: on the CPU, each with the split that all its sequences are for; None: not decided yet.
        total: how many sequences there were to choose from; None: not known, and these are the first.
        packed: how many sequences the rows of the batches were made of, where the collator packs; None: a row is one.
    """

    batches: list[tuple[Any, Split | None]]
    total: int | None
    packed: int | None = None


@dataclass(frozen=True)
class Dealt:
    """Batches that are dealt to the splits already, for instance by document; they stand for a loader.

    Args:
        batches: each with the split that all its sequences are for.
        total: how many sequences there were to choose from; None: not known.
    """

    batches: Sequence[tuple[Any, Split]]
    total: int | None = None

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch, _ in self.batches)


def read_domains(
    loaders: Mapping[str, Any], count: int, seed: int, processes: Processes, fractions: Mapping[str, float]
) -> dict[str, Held]:
    """:func:`read_batches` of several loaders; runs of domains that are parts of one dataset are laid together.

    Args:
        loaders: by domain.
        count, seed, processes: see :func:`read_batches`.
        fractions: for each domain the share of the search split.
    """
    # Accelerate's loaders register themselves as the active one and move batches; their inner DataLoader does neither.
    inner = {name: getattr(loader, "base_dataloader", loader) for name, loader in loaders.items()}
    indices = {name: _indices(name, loader, seed, processes) for name, loader in inner.items()}
    asked = {
        name: one
        for name, found in indices.items()
        if found is not None and (one := found.asked(inner[name].dataset, count, fractions[name])) is not None
    }
    with processes.raise_on_all():
        laid = lay_together(asked)
    return {
        name: read_batches(name, loader, count, seed, processes, fractions[name], indices[name], laid.get(name))
        for name, loader in inner.items()
    }


def _indices(name: str, loader: Any, seed: int, processes: Processes) -> Indices | None:
    """What all ranks draw of a loader, if it can be asked for by index."""
    with processes.raise_on_all(), _undisturbed(loader, seed, name):
        mine = Indices.of(loader)
    return Indices.of_all(processes.all_gather_object(mine), processes.rank)


def read_batches(
    name: str,
    loader: Any,
    count: int,
    seed: int,
    processes: Processes,
    search_fraction: float,
    indices: Indices | None,
    laid: Laid | None,
) -> Held:
    """``count`` batches of a loader, on the CPU, the same ones on every rank.

    They are an even sample of everything there is where that can be asked for by index: of the sequences of a
    DataLoader's map-style dataset (as far as its sampler draws them), or of a list's batches. Of any other iterable
    they are the first. Samples of single sequences come apart by split, each in about ``count`` smaller batches.

    If all ranks read the same batches, only a digest is exchanged. Otherwise (each rank has data of its own) the
    batches read are gathered on every rank and put together by :func:`merge_shares`. Afterwards the loader, and
    everything that it can reach, is as it was (see ``reachable.py``).

    Args:
        name: the domain's name, for messages.
        loader: a DataLoader or another iterable of batches.
        count: how many batches are wanted, each as large as the loader's.
        seed: random seed for shuffled loaders, and for the sample.
        processes: the ranks that train the model together.
        search_fraction: see :func:`choose`.
        indices: what all ranks draw, if that can be asked for.
        laid: see :func:`lay_together`.

    Raises:
        ValueError: the loader yields no batches.
        TypeError: it is not an iterable of batches.
    """
    with processes.raise_on_all():
        held = _read(name, loader, indices, count, seed, search_fraction, laid)
    if processes.size == 1:
        return held
    digests = processes.all_gather_object(_digest(held))
    shares = len(set(digests))
    if shares == 1:
        return held
    # One rank sends each share, and no more of it than its portion of the batches wanted.
    sends = digests.index(digests[processes.rank]) == processes.rank
    sent = processes.all_gather_object(_portion(held, count, shares) if sends else None)
    by_sequence = isinstance(getattr(loader, "sampler", None), DistributedSampler)
    return _merged([share for share in sent if share is not None], count, by_sequence=by_sequence)


def _portion(held: Held, count: int, shares: int) -> Held:
    """The part of a rank's batches that it sends where ranks read different ones: an even one of an even sample."""
    if held.total is None:
        return Held(held.batches[: -(-count // shares)], None)
    by_split = {split: [batch for batch in held.batches if batch[1] == split] for split in _TAGS}
    return Held([batch for batches in by_split.values() for batch in batches[::shares]], held.total)


def _merged(shares: list[Held], count: int, *, by_sequence: bool) -> Held:
    merged: list[tuple[Any, Split | None]] = []
    for split in _TAGS:
        tagged = [[batch for batch, of in share.batches if of == split] for share in shares]
        if tagged := [batches for batches in tagged if batches]:
            wanted = count if split is None else sum(map(len, tagged))
            merged += [(batch, split) for batch in merge_shares(tagged, wanted, by_sequence=by_sequence)]
    totals = [share.total for share in shares]
    return Held(merged, None if None in totals else sum(total for total in totals if total is not None))


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


def _digest(held: Held) -> bytes:
    digest = hashlib.sha256()
    for batch, split in held.batches:
        digest.update(str(split).encode())
        for index in range(count_sequences(batch)):
            digest.update(fingerprint(batch, index))
    return digest.digest()


def _read(
    name: str,
    loader: Any,
    indices: Indices | None,
    count: int,
    seed: int,
    search_fraction: float,
    laid: Laid | None,
) -> Held:
    total: int | None = None
    splits: Sequence[Split | None] | None = None
    wanted: list[Any] = []
    asked: int | None = None  # sequences in the first batch
    if isinstance(loader, Dealt):
        return Held([*loader.batches], loader.total)
    if isinstance(loader, DataLoader):
        # A shallow copy, so that persistent workers of the original keep the state they are in.
        loader = copy.copy(loader)
        asked = loader.batch_size
        loader._iterator = None
        if indices is not None:
            # Set past DataLoader's own check: its workers and its collate_fn read what is asked for here.
            key, wanted, splits, total = indices.chosen(loader.dataset, count, seed, search_fraction, laid)
            vars(loader)[key] = wanted
            asked = len(wanted[0]) if key == "batch_sampler" else None
            count = len(wanted)
    elif isinstance(loader, (list, tuple)):
        total = sum(map(count_sequences, loader))
        loader = [loader[index] for index in evenly(len(loader), count, seed)]
    with _undisturbed(loader, seed):
        iterator = iter(loader)
        found = [map_tensors(batch, lambda t: t.detach().cpu()) for batch in itertools.islice(iterator, count)]
        del iterator
    if not found:
        raise ValueError(f"heldout loader {name!r} yields no batches: give at least one batch of held-out data")
    if len(found) > 1:  # so that the first one is whole
        _check_first_dimension(name, found[0], asked)
    if indices is not None and splits is None:
        # The dataset's items are batches.
        total = int(len(indices.drawn) * np.mean([count_sequences(batch) for batch in found]))
    drawn = None if splits is None else sum(map(len, wanted))
    packed = None if drawn == sum(map(count_sequences, found)) else drawn
    return Held(list(zip(found, splits or [None] * len(found), strict=True)), total, packed)


def _check_first_dimension(name: str, batch: Any, asked: int | None) -> None:
    """Raise a ValueError if the sequences that were asked for are counted by the second dimension of the tensors."""
    shapes = {tuple(tensor.shape) for tensor in tensors_of(batch) if tensor.dim() > 1}
    if asked is not None and 1 < count_sequences(batch) != asked > 1 and {shape[1] for shape in shapes} == {asked}:
        raise ValueError(
            f"heldout loader {name!r} makes tensors of shape {min(shapes)} of {asked} sequences: time-major batches "
            "cannot be cut into sequences; let the first dimension count sequences, and transpose in nll"
        )


def check_heldout(heldout: Any, nll: Any) -> dict[str, Any]:
    """The held-out loaders by domain, if these arguments can be right; nothing is read.

    Raises:
        ValueError, TypeError: see ``HeldOutLoss``.
    """
    for one in nll.values() if isinstance(nll, Mapping) else [] if nll is None else [nll]:
        right = "must be a function (model, batch) -> (summed NLL, tokens)"
        if not callable(one):
            raise TypeError(f"nll={shown(one)}: {right}")
        try:
            signature = inspect.signature(one)
        except ValueError:  # of a builtin, which does not tell
            continue
        try:
            signature.bind(None, None)
        except TypeError as error:
            raise TypeError(f"nll={shown(one)}: {right}, and takes {signature}: {error}") from None
    if not isinstance(heldout, Mapping):
        _check("heldout", heldout)
        return {NAMELESS: heldout}
    for name, loader in heldout.items():
        _check(f"heldout[{name!r}]", loader)
    loaders = {str(name): loader for name, loader in heldout.items()}
    if len(loaders) < max(1, len(heldout)):
        raise ValueError(f"heldout has the domains {[*heldout]}: give at least one, with names that differ as text")
    return loaders


def _check(which: str, loader: Any) -> None:
    kind = type(loader).__name__
    is_dataset = isinstance(loader, Dataset) and not isinstance(loader, IterableDataset)
    # Datasets of Hugging Face are none of torch's.
    if is_dataset or (type(loader).__module__.startswith("datasets.") and hasattr(loader, "__getitem__")):
        raise TypeError(f"{which} is a {kind}, a Dataset: wrap it in a DataLoader")
    if isinstance(loader, Tensor):
        raise TypeError(
            f"{which} is a Tensor: give an iterable of batches, such as a DataLoader; a single batch goes into a list"
        )
    if not isinstance(loader, Iterable) or isinstance(loader, (str, bytes, Mapping, nn.Module)):
        raise TypeError(f"{which}={shown(loader)} is a {kind}: give an iterable of batches, such as a DataLoader")


def say_if_trained_on(heldout: Any, trained: Any) -> None:
    """Warn where held-out sequences are those that the run trains on.

    Args:
        heldout: a loader or a dataset, or a mapping from domain names to such.
        trained: the loader or the dataset that the run trains on, if it is known.
    """
    loaders = heldout.values() if isinstance(heldout, Mapping) else [heldout]
    trained = getattr(trained, "dataset", trained)
    if trained is not None and any(getattr(one, "dataset", one) is trained for one in loaders):
        logger.warning(
            "heldout (by default the trainer's eval dataset) is the training dataset: merge weights are chosen, and "
            "losses reported, on what the model trains on; give a dataset that it does not train on"
        )


@contextmanager
def _undisturbed(loader: Any, seed: int, name: str = "") -> Iterator[None]:
    """Everything random that a loader draws from is seeded inside the context, and afterwards is as it was.

    Args:
        name: of the loader, for a warning where that cannot be; by default none is given.
    """
    # An iterator is there to be read once, as whoever gives one knows.
    said = f"heldout loader {name!r}" if name and not isinstance(loader, Iterator) else ""
    with preserved_rng(seed), preserved([loader], seed=seed, name=said):
        yield


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
    """A digest of the content of one sequence, the same one wherever that sequence is found.

    Of a sequence of tokens only these count: neither padding, where there is an attention mask, nor other entries of
    the batch change it, nor which tokens a collator has masked at random.
    """
    sequence = select_sequences(batch, [index])
    if isinstance(sequence, Mapping) and isinstance(sequence.get("input_ids"), Tensor):
        tensors = [_tokens(sequence)]
    else:
        tensors = tensors_of(sequence)
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    if not tensors:
        digest.update(repr(sequence).encode())
    return digest.digest()


def _tokens(sequence: Mapping[str, Any]) -> Tensor:
    """The tokens of one sequence, without padding, as int64."""
    tokens, labels, mask = (sequence.get(key) for key in ("input_ids", "labels", "attention_mask"))
    assert isinstance(tokens, Tensor)
    if isinstance(labels, Tensor) and labels.shape == tokens.shape and not labels.is_floating_point():
        tokens = torch.where(labels == IGNORED, tokens, labels)
    if isinstance(mask, Tensor) and mask.shape == tokens.shape:
        tokens = tokens[mask.bool()]
    return tokens.flatten().long()


def describe(value: Any) -> str:
    """What a batch, or another value, is made of, in words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} ({str(value.dtype).removeprefix('torch.')})"
    if isinstance(value, Mapping):
        return "a mapping with " + (", ".join(f"{key!r}: {describe(one)}" for key, one in value.items()) or "nothing")
    if isinstance(value, (list, tuple)) and len(value) < 5:
        return f"a {type(value).__name__} of " + (" and ".join(map(describe, value)) or "nothing")
    return f"{value!r}" if isinstance(value, (int, float, str, type(None))) else f"a {type(value).__name__}"


def as_tensors(values: Mapping[str, float]) -> dict[str, Tensor]:
    """Numbers as scalar tensors."""
    return {name: torch.tensor(value) for name, value in values.items()}
