"""Held-out loss: cached batches in two splits that share no sequence, evaluated without a trace."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ..distributed import Processes
from ..pieces import BACKWARD, EXCHANGE, FORWARD, Pieces, finish
from ..search.evaluation import PARTS, Evaluation, Gradient
from ..window.layout import unwrap
from .data import count_sequences, fingerprint, map_tensors, read_heldout, select_sequences
from .isolation import isolated

Nll: TypeAlias = Callable[[nn.Module, Any], tuple[Tensor | float, Tensor | float | int]]
Split = Literal["search", "report"]
# ready(gradients) is a context in which the model is evaluated without a trace, with gradients or without.
Ready = Callable[[bool], AbstractContextManager[Any]]


class GradientOf(Protocol):
    """Turns what backward passes leave in the model into a gradient in the merge weights."""

    def clear_gradient(self) -> None:
        """Begin a new gradient."""

    def add_gradient(self) -> None:
        """Add the gradients of one backward pass."""

    def projected(self) -> Pieces[np.ndarray]:
        """The gradient in the merge weights, summed over ranks."""


# A standard error needs several independent units, so large batches are cut until each split has about this many.
_MIN_UNITS = 8


@dataclass(frozen=True)
class _Batch:
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
        processes: the ranks. They hold the same batches, whatever each one's loader reads, and divide them at every
            evaluation; the result is that of one process.

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
        processes: Processes | None = None,
    ) -> None:
        self._processes = Processes(alone=True) if processes is None else processes
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
        self._batches: dict[Split, list[_Batch]] = {"search": [], "report": []}
        self._digest = hashlib.sha256()
        for name, loader in loaders.items():
            fraction = 0.0 if name in self.report_only else search_fraction
            self._deal(name, read_heldout(name, loader, batches, seed, self._processes), fraction)
        for split, found in self._batches.items():
            if not any(batch.domain in self.searched for batch in found):
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
                self._batches[split] += _cut(_Batch(domain, batch), indices, pieces)

    def _divide(self) -> list[list[int]]:
        """Indices of the batches in each part of the search split: an equal share of every domain, domain by domain."""
        domains = sorted(self.searched)
        used = [
            [index for index, batch in enumerate(self._batches["search"]) if batch.domain == name] for name in domains
        ]
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
        return len(self._batches["report"]) if split == "report" else sum(map(len, self._parts))

    def cut(self, pieces: int) -> None:
        """Cut every batch into ``pieces`` smaller ones (at most one per sequence), so that each pass is shorter."""
        for split, batches in self._batches.items():
            cut = [_cut(one, list(range(count_sequences(one.batch))), pieces) for one in batches]
            self._batches[split] = list(itertools.chain(*cut))
        self._parts = self._divide()

    @property
    def longest(self) -> int:
        """Sequences in the largest batch."""
        return max(count_sequences(one.batch) for batches in self._batches.values() for one in batches)

    def evaluate(self, model: nn.Module, split: Split) -> Evaluation:
        """Evaluate ``model`` as it stands, in eval mode and without gradients, leaving no trace (see ``isolated``).

        Args:
            model: the model; wrappers (compile, DDP) are looked through.
            split: "search" to choose merge weights, "report" for every number that is shown.

        Returns:
            Sums per batch in float64. Non-finite losses are returned as they are.
        """
        ready = functools.partial(isolated, unwrap(model), self.seed)
        return finish(self.evaluate_pieces(model, split, lambda gradients: ready(gradients=gradients)))

    def evaluate_pieces(self, model: nn.Module, split: Split, ready: Ready) -> Pieces[Evaluation]:
        """:meth:`evaluate` in pieces of a batch, each inside ``ready(False)``, which may give it other weights."""
        indices = range(len(self._batches["report"])) if split == "report" else sorted(itertools.chain(*self._parts))
        return (yield from self._evaluating(model, split, indices, ready))

    def sample_pieces(self, model: nn.Module, ready: Ready) -> Pieces[Evaluation]:
        """Evaluate one batch of the report split, in a piece."""
        return (yield from self._evaluating(model, "report", [0], ready))

    def search_pieces(
        self,
        model: nn.Module,
        ready: Ready,
        parts: Sequence[int],
        *,
        abandon: Callable[[Evaluation], bool] = lambda _: False,
        gradient: GradientOf | None = None,
    ) -> Pieces[tuple[Evaluation, Gradient | None]]:
        """Evaluate on some parts of the search split, one batch a piece, with the gradient of the loss if asked for.

        Like :meth:`evaluate` it runs in eval mode and leaves no trace; the live gradients are put back untouched. A
        gradient costs about two forward passes more.

        Args:
            model: the model; wrappers (compile, DDP) are looked through.
            ready: each batch is evaluated inside ``ready(gradients)``, which may give the model other weights.
            parts: indices of the split's parts, in the order of evaluation.
            abandon: called after each part with the evaluation so far; True stops there.
            gradient: collects the gradient in the merge weights, for each domain of each part; None: not wanted.

        Returns:
            The evaluation, of fewer batches if it was abandoned, and the gradient.

        Raises:
            RuntimeError: the loss does not depend on the parameters (an ``nll`` that detaches it, say).
        """
        done = Evaluation(np.zeros(0), np.zeros(0), ())
        sums: list[np.ndarray] = []
        tokens: list[float] = []
        domains: list[str] = []
        for part in parts:
            batches = self._parts[part]
            for domain, group in itertools.groupby(batches, key=lambda index: self._batches["search"][index].domain):
                if gradient is not None:
                    gradient.clear_gradient()
                found = yield from self._evaluating(model, "search", group, ready, gradient)
                if gradient is not None:
                    sums.append((yield from gradient.projected()))
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
        gradient: GradientOf | None = None,
    ) -> Pieces[Evaluation]:
        """Evaluate batches of a split, one per rank at a time."""
        model = unwrap(model)
        indices = tuple(chosen)
        batches = [self._batches[split][index] for index in indices]
        turns = range(0, len(batches), self._processes.size)
        values = np.zeros((len(turns), 2))
        for turn, first in enumerate(turns):
            yield FORWARD if gradient is None else BACKWARD
            mine = first + self._processes.rank
            # A rank without a batch of its own takes another one with weight 0: under FSDP a pass needs all ranks.
            share = float(mine < len(batches))
            held = batches[mine if share else first].batch
            with ready(gradient is not None):
                batch = self._to_device(held) if self._to_device else _to_device_of(model, held)
                with self._precision():
                    nll, tokens = self._nll(model, batch)
                if gradient is not None and float(tokens):
                    (share * torch.as_tensor(nll)).backward()
                    gradient.add_gradient()
                values[turn] = float(torch.as_tensor(nll).detach()), float(tokens)
        found: np.ndarray = values
        if self._processes.size > 1:
            yield EXCHANGE
            found = self._processes.all_gather_array(values).swapaxes(0, 1).reshape(-1, 2)[: len(batches)]
        return Evaluation(found[:, 0], found[:, 1], tuple(batch.domain for batch in batches), indices)


def _cut(batch: _Batch, indices: list[int], pieces: int) -> list[_Batch]:
    """Some sequences of a batch as so many batches, or fewer if there are not as many sequences."""
    parts = np.array_split(indices, min(pieces, len(indices))) if indices else []
    return [_Batch(batch.domain, select_sequences(batch.batch, part.tolist())) for part in parts]


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes: where its first parameter is, or the device that FSDP brings offloaded parameters to."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        return torch.device("cpu")
    computing = getattr(getattr(parameter, "device_mesh", None), "device_type", parameter.device.type)
    return parameter.device if computing == parameter.device.type else torch.device(computing)


def _to_device_of(model: nn.Module, batch: Any) -> Any:
    return map_tensors(batch, lambda tensor: tensor.to(device_of(model), non_blocking=True))


# From a model and a batch to a summed negative log-likelihood

_IGNORED = -100


def language_model_nll(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """``(summed NLL in nats, target tokens)`` of a model that returns its mean loss per target token as ``.loss``.

    Args:
        model: called as ``model(**batch)``, like every Hugging Face model.
        batch: a mapping with "labels", shape ``(sequences, length)``; labels of -100 are no targets. A causal model
            predicts labels from the second position on.

    Raises:
        TypeError: the batch is no mapping with labels, or the output has no loss; the message names ``nll=``.
    """
    if not isinstance(batch, Mapping) or not ("labels" in batch or "shift_labels" in batch):
        raise TypeError(
            f"held-out batches must be mappings with 'labels', got {_describe(batch)}; "
            "for other batches pass nll=, a function (model, batch) -> (summed NLL, tokens)"
        )
    tokens = count_targets(model, batch)
    if tokens == 0:
        return torch.zeros(()), 0
    # In eval mode a decoder would otherwise build a key-value cache that nobody reads.
    no_cache = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    output = model(**{**no_cache, **batch})
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None and isinstance(output, tuple) and output:
        loss = output[0]
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"{type(model).__name__} returned no .loss for a batch with labels; "
            "pass nll=, a function (model, batch) -> (summed NLL, tokens)"
        )
    return loss.float().mean() * tokens, tokens


def count_targets(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """The number of labels the model's loss averages over: not -100, and shifted by one for causal models."""
    if "shift_labels" in batch:
        labels = batch["shift_labels"]
    else:
        labels = batch["labels"][..., 1:] if shifts_labels(model) and batch["labels"].dim() > 1 else batch["labels"]
    return int((labels != _IGNORED).sum())


def shifts_labels(model: nn.Module) -> bool:
    """Whether the model shifts labels itself: causal decoders do, encoder-decoders and masked models do not."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    loss_function = getattr(model, "loss_function", None)
    return loss_function is None or getattr(loss_function, "__name__", "") == "ForCausalLMLoss"


def _describe(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a mapping with keys {sorted(map(str, batch))}"
    return f"a {type(batch).__name__}"


def summed_nll(model: nn.Module, batch: Any, mean_loss: Tensor) -> tuple[Tensor | float, int]:
    """A mean loss as ``(summed NLL, tokens)``: weighted with the batch's labels, without labels with its sequences."""
    has_labels = isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor)
    weight = count_targets(model, batch) if has_labels else count_sequences(batch)
    return mean_loss.float().mean() * weight if weight else 0.0, weight
