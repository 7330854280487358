"""The held-out loss: batches in two splits that share no sequence, evaluated without changing the training run."""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ..distributed import Processes
from ..search.checks import LARGEST_SEED, function, integer, names, share, shown
from ..search.evaluation import PARTS, Evaluation, Gradient
from ..window.devices import without_autocast
from ..window.names import unwrap
from ..window.pieces import BACKWARD, EXCHANGE, FORWARD, Pieces, finish
from .data import (
    NAMELESS,
    Held,
    check_heldout,
    count_sequences,
    fingerprint,
    map_tensors,
    read_domains,
    select_sequences,
    tensors_of,
)
from .language_model import LanguageModelNll
from .sample import Split, choose
from .untouched.isolation import isolated, uncached_casts
from .untouched.reachable import Owned

logger = logging.getLogger("traj_merge_callback")
#: In the place of held-out data that are not there yet.
LATER = "later"

Nll: TypeAlias = Callable[[nn.Module, Any], tuple[Tensor | float, Tensor | float | int]]
ToDevice: TypeAlias = Callable[[Any], Any]
# ready(gradients) -> a context that isolates the model (see isolated) and may give it a candidate's weights.
Ready = Callable[[bool], AbstractContextManager[Any]]

# A standard error needs several independent batches, so large ones are cut until each split has about this many.
_MIN_BATCHES = 8
# Of the share that a split is to have of a domain's sequences it gets at least this part.
_MOST_UNEVEN = 0.5


class MergeGradient(Protocol):
    """Accumulates the gradients of backward passes and converts their sum to merge weights."""

    def clear_gradient(self) -> None:
        """Set the accumulated gradient to zero."""

    def add_gradient(self) -> None:
        """Add the gradients that a backward pass has left in the model."""

    def projected(self) -> Pieces[np.ndarray]:
        """The accumulated gradient with respect to the merge weights, summed over ranks."""


@dataclass(frozen=True)
class _Batch:
    domain: str
    data: Any


class HeldOutLoss:
    """Token-weighted held-out loss with its standard error, on a search split and a report split.

    ``batches`` batches of each loader are read once (see :func:`read_domains`), with random states saved and restored,
    and kept on the CPU. Runs of sequences are dealt to the two splits, with gaps between them. A sequence has one split
    in all domains, as have equal sequences, so the splits share none.

    Args:
        heldout: a DataLoader or any iterable of batches, or a mapping from domain names to such; "later": :meth:`read`
            is called with them.
        nll: ``nll(model, batch) -> (summed NLL in nats, number of target tokens)``; by default
            :class:`LanguageModelNll`, for models whose output has ``.loss``. Or a mapping from domain names to such.
        batches: batches to read of each loader.
        search_fraction: share of the sequences in the search split, strictly between 0 and 1.
        report_only: domains that are reported but never searched on, nor part of the overall loss.
        precision: returns a context for the forward pass, for instance the trainer's autocast.
        to_device: moves a batch to the training device; by default every tensor goes to the model's device. Or a
            mapping from domain names to such.
        seed: seed for reading shuffled loaders, and for any randomness in an evaluation.
        processes: the ranks that train the model together. All ranks hold the same batches, even if their loaders
            read different ones; each evaluates a share of them, and the results are gathered on all ranks.

    Raises:
        ValueError: a loader without batches, fewer than two different sequences, unknown ``report_only`` names, or no
            domain left to search on.
        TypeError: a loader that is not an iterable of batches (a Dataset, say), or an argument that is no function of
            the kind that is meant.
    """

    def __init__(
        self,
        heldout: Iterable[Any] | Mapping[str, Iterable[Any]],
        *,
        nll: Nll | Mapping[str, Nll] | None = None,
        batches: int = 16,
        search_fraction: float = 0.5,
        report_only: Iterable[str] = (),
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
        to_device: ToDevice | Mapping[str, ToDevice] | None = None,
        seed: int = 0,
        processes: Processes | None = None,
    ) -> None:
        self._processes = Processes(alone=True) if processes is None else processes
        with self._processes.raise_on_all():
            self._count = integer("batches", batches, 1)
            self.seed = integer("seed", seed, 0, LARGEST_SEED)
            share("search_fraction", search_fraction)
            function("precision", precision, 'such as lambda: torch.autocast("cuda", torch.bfloat16)')
        self._search_fraction, self._precision = search_fraction, precision
        self._nll_given, self._to_device_given = nll, to_device
        self._owned: Owned | None = None
        self.report_only = frozenset(report_only)
        #: The domains searched on; none until the data are read.
        self.searched: frozenset[str] = frozenset()
        self._batches: dict[Split, list[_Batch]] = {"search": [], "report": []}
        self._digest = hashlib.sha256()
        #: Number of sequences left out so far, because their loss is not finite.
        self.left_out = 0
        if not is_later(heldout):
            self.read(heldout)

    def read(self, heldout: Iterable[Any] | Mapping[str, Iterable[Any]]) -> None:
        """Read the batches and deal them to the splits, once; arguments and errors are those of the class."""
        with self._processes.raise_on_all():
            loaders, nll = check_heldout(heldout, self._nll_given), self._nll_given
            self._nlls: dict[str, Nll] = _by_domain("nll", LanguageModelNll(self._say) if nll is None else nll, loaders)
            self._to_device: dict[str, ToDevice | None] = _by_domain("to_device", self._to_device_given, loaders)
            for one in filter(None, self._to_device.values()):
                function("to_device", one, "from a batch to that batch on the training device")
        names("report_only", sorted(self.report_only), loaders, "held-out domains")
        self.searched = frozenset(loaders) - self.report_only
        if not self.searched:
            raise ValueError(f"report_only={sorted(self.report_only)} leaves no domain to search on")
        fractions = {name: 0.0 if name in self.report_only else self._search_fraction for name in loaders}
        held = read_domains(loaders, self._count, self.seed, self._processes, fractions)
        # What is never searched on comes first, then small domains, which large ones may contain.
        order = sorted(held, key=lambda name: (name in self.searched, sum(_sequences(held[name]))))
        owners: dict[bytes, Split] = {}
        dealt = {name: _deal(held[name], fractions[name], owners) for name in order}
        for name in loaders:
            self._keep(name, held[name], dealt[name])
        for split, kept in self._batches.items():
            if not any(batch.domain in self.searched for batch in kept):
                raise ValueError(
                    f"heldout leaves no sequence for the {split} split: give at least 2 different sequences "
                    f"(and more for a useful standard error), or raise heldout_batches={self._count}"
                )
        self._warn_of_few()
        self._parts = self._divide()

    def _warn_of_few(self) -> None:
        for split, kept in self._batches.items():
            count = sum(count_sequences(batch.data) for batch in kept if batch.domain in self.searched)
            if count == 1 and self._processes.is_rank_zero:
                logger.warning(
                    "heldout leaves one sequence for the %s split: give more, as one says little of a merge and has "
                    "no standard error",
                    split,
                )

    def _say(self, sentence: str) -> None:
        if self._processes.is_rank_zero:
            logger.info(sentence)

    def _keep(self, domain: str, held: Held, dealt: list[list[tuple[bytes, Split | None]]]) -> None:
        """Keep what was read of one domain: each batch cut into the sequences of either split."""
        counts: dict[Split, int] = {"search": 0, "report": 0}
        parts: dict[Split, list[tuple[Any, list[int]]]] = {"search": [], "report": []}
        for (batch, _), sequences in zip(held.batches, dealt, strict=True):
            for digest, split in sequences:
                self._digest.update(digest + str(split).encode())
            for split, found in parts.items():
                if indices := [index for index, (_, owner) in enumerate(sequences) if owner == split]:
                    found.append((batch, indices))
                    counts[split] += len(indices)
        for split, found in parts.items():
            cuts = -(-_MIN_BATCHES // max(1, len(found)))
            for batch, indices in found:
                self._batches[split] += _cut(_Batch(domain, batch), indices, cuts)
        of = f"of the first {sum(_sequences(held))}" if held.total is None else f"of {held.total}"
        kept = f"{sum(counts.values())} {of} sequences"
        if held.packed is not None:
            kept = f"{held.packed} {of} sequences, packed into {sum(counts.values())}"
        self._say(
            f"held-out{'' if domain == NAMELESS else f' {domain!r}'}: {kept}, "
            f"{counts['search']} to search, {counts['report']} to report"
        )

    def _divide(self) -> list[list[int]]:
        """Indices of the search split's batches in each part: a like share of each domain, one domain after another.

        Each part takes batches from all over a domain, because it stands for the whole.
        """
        domains, batches = sorted(self.searched), self._batches["search"]
        used = [[index for index, batch in enumerate(batches) if batch.domain == name] for name in domains]
        parts: list[list[int]] = [[] for _ in range(max(1, min(PARTS, *map(len, used))))]
        for indices in used:
            for first, part in enumerate(parts):
                part += indices[first :: len(parts)]
        return parts

    @property
    def parts(self) -> int:
        """Number of parts of the search split: 4, or fewer if a domain has fewer batches."""
        return len(self._parts)

    @property
    def digest(self) -> str:
        """A digest of the sequences and their splits: losses are comparable if their digests are equal.

        Empty until the data are read.
        """
        return self._digest.hexdigest() if self.searched else ""

    def num_batches(self, split: Split) -> int:
        """Number of batches of one evaluation on the split."""
        return len(self._batches["report"]) if split == "report" else sum(map(len, self._parts))

    def cut(self, count: int) -> None:
        """Cut every batch into ``count`` smaller ones, or fewer if it has fewer sequences, so that each forward pass is
        shorter and takes less memory; a collective, after which all ranks hold the same batches.
        """
        with self._processes.raise_on_all():
            cut = {
                split: [_cut(batch, list(range(count_sequences(batch.data))), count) for batch in batches]
                for split, batches in self._batches.items()
            }
        self._batches = {split: list(itertools.chain(*batches)) for split, batches in cut.items()}
        self._parts = self._divide()

    @property
    def longest(self) -> int:
        """Number of sequences in the largest batch."""
        return max(count_sequences(batch.data) for batches in self._batches.values() for batch in batches)

    def evaluate(self, model: nn.Module, split: Split) -> Evaluation:
        """Evaluate ``model`` with its present weights, in eval mode and without gradients, under ``isolated``.

        Args:
            model: the model; wrappers (compile, DDP) are looked through.
            split: "search" to choose merge weights, "report" for every number that is shown.

        Returns:
            Summed NLL (nats) and target tokens of each batch, float64 of shape ``(batches,)``. Losses that are not
            finite are returned as they are.
        """
        if not isinstance(model, nn.Module) or split not in self._batches:
            raise ValueError(f"evaluate({shown(model)}, {split!r}): takes a torch module, and 'search' or 'report'")
        ready = functools.partial(isolated, unwrap(model), self.seed)
        return finish(self.evaluate_pieces(model, split, lambda gradients: ready(gradients=gradients)))

    def evaluate_pieces(self, model: nn.Module, split: Split, ready: Ready) -> Pieces[Evaluation]:
        """:meth:`evaluate`, one piece for each batch, which is evaluated inside ``ready(False)``."""
        indices = range(len(self._batches["report"])) if split == "report" else sorted(itertools.chain(*self._parts))
        return (yield from self._evaluating(model, split, indices, ready))

    def live_pieces(self, model: nn.Module, split: Split, ready: Ready) -> Pieces[Evaluation]:
        """:meth:`evaluate_pieces` for live weights; sequences whose loss is not finite are left out from now on.

        Where at least half of a domain's batches are like that, the model is to blame, and nothing is left out.
        """
        found = yield from self.evaluate_pieces(model, split, ready)
        if not (odd := _odd(found)):
            return found
        # In batches of one sequence each it shows which ones they are.
        self._put(split, odd, lambda batch: count_sequences(batch.data))
        found = yield from self.evaluate_pieces(model, split, ready)
        if not (odd := _odd(found)):
            return found
        self._put(split, odd, lambda _: 0)
        self.left_out += len(odd)
        if self._processes.is_rank_zero:
            logger.warning(
                "the loss of %d held-out sequences of the %s split is not finite: they are left out from now on",
                len(odd),
                split,
            )
        return (yield from self.evaluate_pieces(model, split, ready))

    def _put(self, split: Split, chosen: set[int], pieces: Callable[[_Batch], int]) -> None:
        """Put so many smaller batches in the place of each of the chosen ones."""
        kept: list[_Batch] = []
        for index, batch in enumerate(self._batches[split]):
            count = pieces(batch) if index in chosen else 1
            kept += _cut(batch, list(range(count_sequences(batch.data))), count) if count else []
        self._batches[split] = kept
        self._parts = self._divide()

    def sample_pieces(self, model: nn.Module, ready: Ready) -> Pieces[Evaluation]:
        """Evaluate the first batch of the report split."""
        return (yield from self._evaluating(model, "report", [0], ready))

    def search_pieces(
        self,
        model: nn.Module,
        ready: Ready,
        parts: Sequence[int],
        *,
        abandon: Callable[[Evaluation], bool] = lambda _: False,
        gradient: MergeGradient | None = None,
    ) -> Pieces[tuple[Evaluation, Gradient | None]]:
        """Evaluate parts of the search split, with the gradient if asked for, one piece for each batch.

        A gradient costs about two forward passes more.

        Args:
            model: the model; wrappers (compile, DDP) are looked through.
            ready: each batch is evaluated inside ``ready(gradients)``.
            parts: indices of parts of the split (each has an equal share of every domain), in order of evaluation.
            abandon: called after each part with the evaluation so far; True ends the evaluation there.
            gradient: accumulates and projects the gradient, once for each domain of each part; None: no gradient.

        Returns:
            The evaluation, of fewer batches if it was abandoned, and the gradient or None.

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
        gradient: MergeGradient | None = None,
    ) -> Pieces[Evaluation]:
        """Evaluate batches of a split in turns, in each of which every rank evaluates one."""
        model = unwrap(model)
        indices = tuple(chosen)
        batches = [self._batches[split][index] for index in indices]
        turns = range(0, len(batches), self._processes.size)
        values = np.zeros((len(turns), 2))
        for turn, first in enumerate(turns):
            yield FORWARD if gradient is None else BACKWARD
            mine = first + self._processes.rank
            # A rank for which no batch is left evaluates one all the same, because under FSDP a forward pass needs all
            # ranks; its loss counts zero times.
            counts = float(mine < len(batches))
            of = batches[mine if counts else first]
            # The model's own gradients are looked after, and looked at, inside ``ready``.
            with self.undisturbed(), ready(gradient is not None):
                returned, tokens = self.returned(model, of.domain, self.moved(model, of.domain, of.data))
                nll = torch.as_tensor(returned)
                if gradient is not None and float(tokens):
                    if not nll.requires_grad:
                        raise RuntimeError("the held-out loss has no gradient: nll must not detach it")
                    with without_autocast(device_of(model)):
                        (counts * nll).backward()
                    gradient.add_gradient()
                values[turn] = float(nll.detach()), float(tokens)
        found: np.ndarray = values
        if self._processes.size > 1:
            yield EXCHANGE
            found = self._processes.all_gather_array(values).swapaxes(0, 1).reshape(-1, 2)[: len(batches)]
        return Evaluation(found[:, 0], found[:, 1], tuple(batch.domain for batch in batches), indices)

    # One batch

    def by_domain(self) -> dict[str, list[Any]]:
        """All batches of each domain, on the CPU, those with the longest sequences first."""
        found: dict[str, list[Any]] = {}
        for batch in itertools.chain(*self._batches.values()):
            found.setdefault(batch.domain, []).append(batch.data)
        return {name: sorted(batches, key=_length, reverse=True) for name, batches in found.items()}

    def nll(self, domain: str) -> Nll:
        """The function that gives the loss of a domain's batches."""
        return self._nlls[domain]

    def undisturbed(self) -> AbstractContextManager[Any]:
        """A context after which all that ``nll`` and ``to_device`` hold of their own is as it was."""
        if self._owned is None:
            self._owned = Owned((self._nlls, self._to_device))
        return self._owned.preserved()

    def moved(self, model: nn.Module, domain: str, data: Any) -> Any:
        """A batch of a domain on the training device."""
        transfer = self._to_device[domain] or functools.partial(_to_device_of, model)
        return transfer(data)

    def returned(self, model: nn.Module, domain: str, batch: Any) -> Any:
        """What ``nll`` returns for a batch on the training device."""
        with self._precision(), uncached_casts():
            return self._nlls[domain](model, batch)


def _odd(found: Evaluation) -> set[int]:
    """The batches whose loss is not finite, by position; none if in some domain they are half of all or more."""
    odd = ~np.isfinite(found.nll)
    shares = [float(odd[[name == domain for name in found.domains]].mean()) for domain in set(found.domains)]
    return set(np.flatnonzero(odd).tolist()) if max(shares) < 0.5 else set()


def _length(batch: Any) -> int:
    """The length of a batch's sequences."""
    return max((tensor.shape[1] for tensor in tensors_of(batch) if tensor.dim() > 1), default=0)


def is_later(heldout: Any) -> bool:
    """Whether held-out data are to be given later."""
    return isinstance(heldout, str) and heldout == LATER


def _by_domain(option: str, given: Any, domains: Iterable[str]) -> dict[str, Any]:
    """What was given for each domain, or for all of them alike."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(domains, given)
    if given.keys() != set(domains):
        raise ValueError(f"{option}: a mapping must have the held-out domains {sorted(domains)}, got {sorted(given)}")
    return dict(given)


def _sequences(held: Held) -> list[int]:
    """Number of sequences of each batch."""
    return [count_sequences(batch) for batch, _ in held.batches]


def _deal(held: Held, search_fraction: float, owners: dict[bytes, Split]) -> list[list[tuple[bytes, Split | None]]]:
    """The fingerprint and the split of each sequence of each batch; None where neither split is to have it.

    A sequence that was dealt before, in this domain or another one, stays where it is.

    Args:
        held: what was read of one domain.
        search_fraction: see :func:`choose`.
        owners: the split of every sequence that was dealt before; those dealt here are added.
    """
    digests = [
        [fingerprint(batch, index) for index in range(count)]
        for (batch, _), count in zip(held.batches, _sequences(held), strict=True)
    ]
    new = [digest for digest in dict.fromkeys(itertools.chain(*digests)) if digest not in owners]
    planned: dict[bytes, Split] = {}
    for (_, split), found in zip(held.batches, digests, strict=True):
        if split is not None:
            planned = dict.fromkeys(found, split) | planned
    mine = {digest: planned[digest] for digest in new if digest in planned}
    share = sum(split == "search" for split in mine.values()) / max(1, len(mine))
    even = share >= _MOST_UNEVEN * search_fraction and 1 - share >= _MOST_UNEVEN * (1 - search_fraction)
    # Equal sequences at many places can leave little of what was planned; different ones are then dealt in order.
    if len(mine) < len(new) or not even:
        dealt = choose(len(new), len(new), search_fraction, seed=0)
        mine = {new[at]: split for split, places in dealt.items() for at in places}
    owners |= mine
    return [[(digest, owners.get(digest)) for digest in found] for found in digests]


def _cut(batch: _Batch, indices: list[int], count: int) -> list[_Batch]:
    """The sequences at ``indices`` as ``count`` batches, or one each if there are fewer sequences."""
    each = np.array_split(indices, min(count, len(indices))) if indices else []
    return [_Batch(batch.domain, select_sequences(batch.data, chosen.tolist())) for chosen in each]


def device_of(model: nn.Module) -> torch.device:
    """The device a model computes on: its first parameter's, or the one FSDP moves CPU-offloaded parameters to."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        return torch.device("cpu")
    computing = getattr(getattr(parameter, "device_mesh", None), "device_type", parameter.device.type)
    return parameter.device if computing == parameter.device.type else torch.device(computing)


def _to_device_of(model: nn.Module, batch: Any) -> Any:
    return map_tensors(batch, lambda tensor: tensor.to(device_of(model), non_blocking=True))
