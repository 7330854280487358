"""Held-out loss: cached batches in two splits that share no sequence, evaluated without a trace."""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .batches import count_sequences, fingerprint, map_tensors, select_sequences
from .evaluation import PARTS, Evaluation, Gradient
from .isolation import isolated, preserved_rng
from .losses import Nll, language_model_nll
from .parameters import ParameterLayout, unwrap
from .pieces import BACKWARD, FORWARD, Pieces, finish

Split = Literal["search", "report"]
# Given whether gradients are wanted, a context in which the model can be evaluated without a trace.
Ready = Callable[[bool], AbstractContextManager[Any]]
GradientOf = tuple[ParameterLayout, Callable[[Tensor], Pieces[np.ndarray]]]
# A standard error needs several independent units, so large batches are cut until each split has about this many.
_MIN_UNITS = 8


@dataclass(frozen=True)
class _Unit:
    domain: str
    batch: Any


class HeldOutLoss:
    """Token-weighted held-out loss with its standard error, on a search split and a report split.

    The first ``batches`` batches of each loader are read once, under a random state of their own, and kept on the CPU.
    Their sequences are dealt to the two splits; equal sequences always go to the same split, so the splits share none.

    Args:
        heldout: a DataLoader or any iterable of batches, or a mapping from domain names to such.
        nll: ``nll(model, batch) -> (summed NLL in nats, number of target tokens)``; by default
            :func:`language_model_nll`, for models whose output has ``.loss``.
        batches: batches to read of each loader.
        search_fraction: share of the sequences in the search split, strictly between 0 and 1.
        report_only: domains that are reported but never searched on, nor part of the overall loss.
        precision: returns a context for the forward pass, for instance the trainer's autocast.
        to_device: moves a batch to the training device; by default every tensor goes to the model's device.
        seed: seed for reading shuffled loaders, and for any randomness in an evaluation.

    Raises:
        ValueError: a loader without batches, fewer than two different sequences, or unknown ``report_only`` names.
        TypeError: something that is no loader (a Dataset, say), or an ``nll`` that cannot be called.
    """

    def __init__(
        self,
        heldout: Iterable[Any] | Mapping[str, Iterable[Any]],
        *,
        nll: Nll | None = None,
        batches: int = 16,
        search_fraction: float = 0.5,
        report_only: Iterable[str] = (),
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
        to_device: Callable[[Any], Any] | None = None,
        seed: int = 0,
    ) -> None:
        if nll is not None and not callable(nll):
            raise TypeError(f"nll={nll!r}: must be a function (model, batch) -> (summed NLL, tokens)")
        self._nll = language_model_nll if nll is None else nll
        self._precision = precision
        self._to_device = to_device
        self.seed = seed
        named = heldout if isinstance(heldout, Mapping) else {"heldout": heldout}
        loaders = {str(name): loader for name, loader in named.items()}
        self.report_only = frozenset(report_only)
        if unknown := self.report_only - loaders.keys():
            raise ValueError(f"report_only={sorted(unknown)} are not among the held-out domains {sorted(loaders)}")
        self.searched = frozenset(loaders) - self.report_only
        if not self.searched:
            raise ValueError(f"report_only={sorted(self.report_only)} leaves no domain to search on")
        self._units: dict[Split, list[_Unit]] = {"search": [], "report": []}
        self._share = 1.0
        self._digest = hashlib.sha256()
        for name, loader in loaders.items():
            fraction = 0.0 if name in self.report_only else search_fraction
            self._deal(name, _read(name, loader, batches, seed), fraction)
        for split, units in self._units.items():
            if not any(unit.domain in self.searched for unit in units):
                raise ValueError(
                    f"heldout leaves no sequence for the {split} split: give at least 2 different sequences "
                    f"(and more for a useful standard error), or raise heldout_batches={batches}"
                )
        self._parts = self._divide()

    def _deal(self, domain: str, batches: list[Any], search_fraction: float) -> None:
        """Deal the sequences of one domain to the two splits, spreading both evenly over the batches."""
        owner: dict[bytes, Split] = {}
        pieces = -(-_MIN_UNITS // len(batches))
        for batch in batches:
            dealt: dict[Split, list[int]] = {"search": [], "report": []}
            for index in range(count_sequences(batch)):
                digest = fingerprint(batch, index)
                if digest not in owner:
                    count = len(owner)
                    to_search = int((count + 1) * search_fraction) > int(count * search_fraction)
                    owner[digest] = "search" if to_search else "report"
                dealt[owner[digest]].append(index)
                self._digest.update(digest + owner[digest].encode())
            for split, indices in dealt.items():
                self._units[split] += _cut(_Unit(domain, batch), indices, pieces)

    def _divide(self) -> list[list[int]]:
        """The batches of each part of the search split, a like share of every domain's, those of a domain together."""
        domains = sorted(self.searched)
        used = [[index for index, unit in enumerate(self._units["search"]) if unit.domain == name] for name in domains]
        used = [indices[: math.ceil(self._share * len(indices))] for indices in used]
        parts: list[list[int]] = [[] for _ in range(max(1, min(PARTS, *map(len, used))))]
        for indices in used:
            for part, share in zip(parts, np.array_split(indices, len(parts)), strict=True):
                part += share.tolist()
        return parts

    @property
    def parts(self) -> int:
        """How many parts the search split has: 4, or fewer if a domain has fewer batches."""
        return len(self._parts)

    @property
    def digest(self) -> str:
        """A digest of the sequences and their splits: losses are comparable where it is equal."""
        return self._digest.hexdigest()

    def num_batches(self, split: Split) -> int:
        """How many batches one evaluation on the split takes."""
        return len(self._units["report"]) if split == "report" else sum(map(len, self._parts))

    def use(self, share: float) -> None:
        """Let the search split be a share of itself, at least one batch of each domain, until said otherwise."""
        self._share = share
        self._parts = self._divide()

    def cut(self, pieces: int) -> None:
        """Cut every batch into so many, by sequences, where it has as many: each is evaluated in that less time."""
        for split, units in self._units.items():
            cut = [_cut(unit, list(range(count_sequences(unit.batch))), pieces) for unit in units]
            self._units[split] = list(itertools.chain(*cut))
        self._parts = self._divide()

    @property
    def searchable(self) -> int:
        """How many batches the whole search split has."""
        return sum(unit.domain in self.searched for unit in self._units["search"])

    @property
    def longest(self) -> int:
        """Sequences in the largest batch."""
        return max(count_sequences(unit.batch) for units in self._units.values() for unit in units)

    def evaluate(self, model: nn.Module, split: Split) -> Evaluation:
        """Evaluate ``model`` as it stands, in eval mode and without gradients, leaving no trace (see ``isolated``).

        Args:
            model: the model; wrappers (compile, DDP) are looked through.
            split: "search" to choose merge weights, "report" for every number that is shown.

        Returns:
            Sums per batch in float64. Non-finite losses are returned as they are.
        """
        ready = functools.partial(isolated, unwrap(model), self.seed)
        return finish(self.evaluating(model, split, lambda gradients: ready(gradients=gradients)))

    def evaluating(self, model: nn.Module, split: Split, ready: Ready) -> Pieces[Evaluation]:
        """:meth:`evaluate` in pieces of a batch, each inside ``ready(False)``, which may give it other weights."""
        indices = range(len(self._units["report"])) if split == "report" else sorted(itertools.chain(*self._parts))
        return (yield from self._evaluating(model, split, indices, ready))

    def sampling(self, model: nn.Module, ready: Ready) -> Pieces[Evaluation]:
        """Evaluate one batch of the report split, in a piece."""
        return (yield from self._evaluating(model, "report", [0], ready))

    def searching(
        self,
        model: nn.Module,
        ready: Ready,
        parts: Sequence[int],
        *,
        abandon: Callable[[Evaluation], bool] = lambda _: False,
        gradient: GradientOf | None = None,
    ) -> Pieces[tuple[Evaluation, Gradient | None]]:
        """Evaluate on some parts of the search split, with the gradient of the loss if asked for, in pieces of a batch.

        Like :meth:`evaluate` it runs in eval mode and leaves no trace; the live gradients are put back untouched. A
        gradient costs about two forward passes more.

        Args:
            model: the model; wrappers (compile, DDP) are looked through.
            ready: each batch is evaluated inside ``ready(gradients)``, which may give the model other weights.
            parts: which of the split's parts, each with a like share of every domain, and in which order.
            abandon: asked after each part, with the evaluation so far, whether that is enough.
            gradient: which tensors the gradient is wanted in, and what makes of it, a row of ``layout.numel``
                numbers, a gradient in the merge weights (:meth:`CheckpointWindow.projecting`), for each domain of each
                part.

        Returns:
            The evaluation, of fewer batches if it was abandoned, and the gradient.

        Raises:
            RuntimeError: the loss does not depend on the parameters (an ``nll`` that detaches it, say).
        """
        done = Evaluation(np.zeros(0), np.zeros(0), ())
        row = torch.zeros(gradient[0].numel, device=device_of(model)) if gradient else None
        sums: list[np.ndarray] = []
        tokens: list[float] = []
        domains: list[str] = []
        for part in parts:
            units = self._parts[part]
            for domain, group in itertools.groupby(units, key=lambda index: self._units["search"][index].domain):
                if gradient is None or row is None:
                    found = yield from self._evaluating(model, "search", group, ready)
                else:
                    row.zero_()
                    target = (gradient[0], row)
                    found = yield from self._evaluating(model, "search", group, ready, target)
                    sums.append((yield from gradient[1](row)))
                    tokens.append(found.tokens.sum())
                    domains.append(domain)
                done = done.joined(found)
            if abandon(done):
                break
        return done, Gradient(np.array(sums), np.array(tokens), tuple(domains)) if gradient is not None else None

    def _evaluating(
        self,
        model: nn.Module,
        split: Split,
        chosen: Iterable[int],
        ready: Ready,
        gradient: tuple[ParameterLayout, Tensor] | None = None,
    ) -> Pieces[Evaluation]:
        model = unwrap(model)
        indices = tuple(chosen)
        units = [self._units[split][index] for index in indices]
        values = []
        for unit in units:
            yield FORWARD if gradient is None else BACKWARD
            with ready(gradient is not None):
                batch = self._to_device(unit.batch) if self._to_device else _to_device_of(model, unit.batch)
                with self._precision():
                    nll, tokens = self._nll(model, batch)
                if gradient is not None and float(tokens):
                    torch.as_tensor(nll).backward()
                    _add_gradients(model, *gradient)
                values.append([float(torch.as_tensor(nll).detach()), float(tokens)])
        found = np.array(values).reshape(-1, 2)
        return Evaluation(found[:, 0], found[:, 1], tuple(unit.domain for unit in units), indices)


def _cut(unit: _Unit, indices: list[int], pieces: int) -> list[_Unit]:
    """Some sequences of a batch as so many batches, or fewer if there are not as many sequences."""
    parts = np.array_split(indices, min(pieces, len(indices))) if indices else []
    return [_Unit(unit.domain, select_sequences(unit.batch, part.tolist())) for part in parts]


def _add_gradients(model: nn.Module, layout: ParameterLayout, row: Tensor) -> None:
    """Add the parameters' gradients to a row; buffers and unused parameters have none."""
    for target, tensor in zip(layout.views(row).values(), layout.tensors(model), strict=True):
        if tensor.grad is not None:
            target.add_(tensor.grad)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter is."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _to_device_of(model: nn.Module, batch: Any) -> Any:
    return map_tensors(batch, lambda tensor: tensor.to(device_of(model), non_blocking=True))


def _read(name: str, loader: Iterable[Any], batches: int, seed: int) -> list[Any]:
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
