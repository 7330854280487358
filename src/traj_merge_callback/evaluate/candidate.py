"""A candidate's weights in the model: merge weights in, held-out losses and gradients in the merge weights out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..distributed import all_gather_into, collective_timeout, reduce_scatter_sum
from ..pieces import EXCHANGE, Pieces
from ..search.evaluation import Evaluation, Gradient
from ..window.layout import ParameterLayout, unwrap
from ..window.sharding import EqualShares
from ..window.window import CheckpointWindow
from .fsdp import ShardedWeights, Units
from .heldout import HeldOutLoss, Split, device_of
from .install import add_gradients, installed
from .isolation import isolated


class Weights(Protocol):
    """The weights of one candidate after another, in a model whose own are never written.

    Args:
        model: that computes with them.
        row: this rank's columns of the candidate, to be filled.
    """

    model: nn.Module
    row: Tensor

    def gather(self) -> Pieces[None]:
        """The row has been filled: make it the candidate at hand."""

    def ready(self, gradients: bool) -> AbstractContextManager[None]:
        """Within the context the model computes with the candidate, without a trace (see ``isolated``)."""

    def clear_gradient(self) -> None:
        """Begin a new gradient."""

    def add_gradient(self) -> None:
        """Add what a backward pass inside :meth:`ready` has left."""

    def gradient(self) -> Pieces[Tensor]:
        """This process's columns of the gradient, or of a summand of it where others hold the same columns."""


class WholeWeights:
    """Weights that are all on the device: one process, or DDP, whose ranks gather each candidate once.

    Args:
        model: the model being trained; wrappers (compile, DDP) are looked through.
        layout: of this rank's columns.
        row: float32, on the model's device, for this rank's columns.
        seed: see ``isolated``.
    """

    def __init__(self, model: nn.Module, layout: ParameterLayout, row: Tensor, seed: int) -> None:
        self.row = row
        self.model = model
        self._isolated = functools.partial(isolated, unwrap(model), seed)
        self._gradient: Tensor | None = None
        sharding = layout.sharding
        self._shares = sharding if isinstance(sharding, EqualShares) and len(sharding.ranks) > 1 else None
        self.layout = layout
        self.whole = row
        if self._shares is not None:
            self.layout = ParameterLayout(model, trainable_only=layout.trainable_only)
            self._in_shares = self._shares.share * len(self._shares.ranks)
            self._mine = sum(slot.numel for slot in layout.slots if slot.is_parameter)
            self._parameters = sum(slot.numel for slot in self.layout.slots if slot.is_parameter)
            self.whole = self._new()

    def _new(self) -> Tensor:
        """A whole row, long enough for equal shares of its parameters, of which buffers overwrite the end."""
        size = self.layout.numel if self._shares is None else max(self.layout.numel, self._in_shares)
        return torch.zeros(size, device=self.row.device)

    def gather(self) -> Pieces[None]:
        """See :class:`Weights`."""
        if self._shares is None:
            return
        yield EXCHANGE
        part = self.row.new_zeros(self._shares.share)
        part[: self._mine].copy_(self.row[: self._mine])
        with collective_timeout(self._shares.processes.timeout):
            all_gather_into(self.whole[: self._in_shares], part, self._shares.group)
        self.whole[self._parameters : self.layout.numel].copy_(self.row[self._mine :])

    def installed(self) -> AbstractContextManager[None]:
        """Within the context the model has the weights of the candidate."""
        return installed(self.layout, self.model, self.whole)

    @contextmanager
    def ready(self, gradients: bool) -> Iterator[None]:
        """See :class:`Weights`."""
        with self.installed(), self._isolated(gradients=gradients):
            yield

    def clear_gradient(self) -> None:
        """See :class:`Weights`."""
        self._gradient = self._new() if self._gradient is None else self._gradient.zero_()

    def add_gradient(self) -> None:
        """See :class:`Weights`; buffers and unused parameters have none."""
        assert self._gradient is not None
        add_gradients(self.layout.slots, self._gradient, self.layout.tensors(unwrap(self.model)))

    def gradient(self) -> Pieces[Tensor]:
        """See :class:`Weights`."""
        assert self._gradient is not None
        if self._shares is None:
            return self._gradient
        yield EXCHANGE
        share, found = self.row.new_empty(self._shares.share), torch.zeros_like(self.row)
        with collective_timeout(self._shares.processes.timeout):
            reduce_scatter_sum(share, self._gradient[: self._in_shares], self._shares.group)
        found[: self._mine].copy_(share[: self._mine])
        return found


def weights_in(model: nn.Module, window: CheckpointWindow, seed: int, *, units: Units | None = None) -> Weights:
    """Room for the weights of one candidate of a window.

    Args:
        model: the model being trained.
        window: the checkpoints.
        seed: see ``isolated``.
        units: the FSDP modules of a model that has some.
    """
    row = window.staging_on(device_of(model))
    if units is not None:
        return ShardedWeights(model, window.layout, row, seed, units)
    return WholeWeights(model, window.layout, row, seed)


class Candidates:
    """Evaluates merges of a window, with a model whose own weights are never written.

    All methods work in pieces; between two pieces the model has its own weights.

    Args:
        weights: of the candidate at hand, in the model.
        window: the checkpoints.
        heldout: the held-out loss.
    """

    def __init__(self, weights: Weights, window: CheckpointWindow, heldout: HeldOutLoss) -> None:
        self.weights = weights
        self._window = window
        self._heldout = heldout

    def load(self, weights: np.ndarray | None) -> Pieces[None]:
        """Make the merge with these weights the candidate at hand; None: live as it was at the last capture."""
        yield from self._window.combine_pieces(weights, self.weights.row)
        yield from self.weights.gather()

    def evaluate(self, split: Split) -> Pieces[Evaluation]:
        """Evaluate the candidate at hand."""
        return (yield from self._heldout.evaluate_pieces(self.weights.model, split, self.weights.ready))

    def sample(self) -> Pieces[Evaluation]:
        """Evaluate the candidate at hand on one batch."""
        return (yield from self._heldout.sample_pieces(self.weights.model, self.weights.ready))

    def measure(
        self, weights: np.ndarray, with_gradient: bool, parts: Sequence[int], abandon: Callable[[Evaluation], bool]
    ) -> Pieces[tuple[Evaluation, Gradient | None]]:
        """Evaluate a merge on parts of the search split and, if asked for, take the gradient in its merge weights."""
        yield from self.load(weights)
        gradient = _InMergeWeights(self.weights, self._window, weights.ndim == 2) if with_gradient else None
        found = self._heldout.search_pieces(
            self.weights.model, self.weights.ready, parts, abandon=abandon, gradient=gradient
        )
        return (yield from found)


class _InMergeWeights:
    """The gradient with respect to merge weights: the window times that in the candidate's weights."""

    def __init__(self, weights: Weights, window: CheckpointWindow, grouped: bool) -> None:
        self._weights = weights
        self._window = window
        self._grouped = grouped
        self.clear_gradient, self.add_gradient = weights.clear_gradient, weights.add_gradient

    def projected(self) -> Pieces[np.ndarray]:
        """See :class:`GradientOf`."""
        columns = yield from self._weights.gradient()
        return (yield from self._window.project_pieces(columns, grouped=self._grouped, summands=True))
