"""Candidates of a window: merge weights in, held-out losses and gradients in the merge weights out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor, nn

from ..search.evaluation import Evaluation, Gradient
from ..window.matrix import Matrix
from ..window.pieces import Pieces
from .fsdp import ShardedWeights, Units
from .heldout import HeldOutLoss, Split, device_of
from .kept import Kept
from .parking import Parking
from .weights import Weights, WholeWeights


def weights_in(
    model: nn.Module,
    window: Matrix,
    seed: int,
    parking: Parking,
    *,
    units: Units | None = None,
    kept: Kept | None = None,
    beside: int = 0,
) -> Weights:
    """Room for the weights of one candidate of a window, on the model's device.

    Args:
        model: the model being trained.
        window: the checkpoints.
        seed: see ``isolated``.
        parking: of the device memory that it takes, from now on until the next call.
        units: the model's FSDP units; None for a model without FSDP.
        kept: what every candidate takes from live; None: what live has whenever a candidate is evaluated.
        beside: bytes of device memory that the merge holds beside a candidate and its gradient.
    """
    slots = window.layout.slots
    # The candidate and its gradient, whole where they are not sharded.
    numbers = window.layout.numel if units is not None else sum(slot.whole_numel for slot in slots)
    parking.begin(8 * numbers + beside)
    row = parking.hold(window.staging_on(device_of(model)))
    kept = Kept() if kept is None else kept
    if units is not None:
        return ShardedWeights(model, window.layout, row, kept, seed, units, parking)
    return WholeWeights(model, window.layout, row, kept, seed, parking)


class ByParameter(Protocol):
    """Combines rows in another way than as their weighted mean, by what it learns of each row.

    Args:
        nbytes: of device memory that a merge holds for it.
    """

    nbytes: int

    def learn(
        self, load: Callable[[np.ndarray], Pieces[None]], weights: Weights, heldout: HeldOutLoss
    ) -> Pieces[float]:
        """Learn of each row on one part of the search split.

        Args:
            load: makes a row, given as merge weights, the current candidate.
            weights: of the current candidate.
            heldout: the held-out loss.

        Returns:
            What that cost, in forward passes over the search split.
        """

    def combine_pieces(self, weights: np.ndarray, out: Tensor) -> Pieces[None]:
        """Write a merge of at least two rows to ``out``, shape ``(N,)``."""

    def release(self) -> None:
        """Give up the device memory that it holds; called when a merge ends, however it does."""


class Candidates:
    """Evaluates merges of a window, one after another, in a model whose own weights are never written.

    All methods are generators of pieces. Between two pieces the model has its own weights, so training can go on.

    Args:
        weights: room for one candidate's weights.
        window: the checkpoints.
        heldout: the held-out loss.
        by_parameter: how rows are combined; None: as their weighted mean.
    """

    def __init__(
        self, weights: Weights, window: Matrix, heldout: HeldOutLoss, by_parameter: ByParameter | None = None
    ) -> None:
        self.weights = weights
        #: Names of the buffers that are live's in every candidate.
        self.unmerged = frozenset[str]()
        self._window = window
        self._heldout = heldout
        self._by_parameter = by_parameter

    def prepare(self) -> Pieces[None]:
        """Find out what candidates of the rows that the window holds now take from live."""
        self.unmerged = yield from self._window.unmerged_pieces()

    def learn(self) -> Pieces[float]:
        """Learn of the rows what combining them needs; what that cost, in forward passes over the search split."""
        if self._by_parameter is None:
            return 0.0
        return (yield from self._by_parameter.learn(self.load, self.weights, self._heldout))

    def load(self, weights: np.ndarray | None) -> Pieces[None]:
        """Make the merge with these merge weights the current candidate; None: live, as last captured."""
        if self._by_parameter is None or weights is None or np.count_nonzero(weights) == 1:
            yield from self._window.combine_pieces(weights, self.weights.row)
        else:
            yield from self._by_parameter.combine_pieces(weights, self.weights.row)
        if self.unmerged:
            layout, views = self._window.layout, self._window.layout.views(self.weights.row)
            for slot, tensor in zip(layout.slots, layout.tensors(self.weights.model), strict=True):
                if slot.name in self.unmerged:
                    views[slot.name].copy_(self.weights.kept.buffer(slot.name, tensor))
        yield from self.weights.gather()

    def not_finite(self) -> Pieces[str | None]:
        """The name of a merged tensor of the current candidate that is not finite in its own dtype, if there is one."""
        return (yield from self._window.not_finite_pieces(self.weights.row, self.unmerged))

    def evaluate(self, split: Split) -> Pieces[Evaluation]:
        """Evaluate the current candidate on a split."""
        return (yield from self._heldout.evaluate_pieces(self.weights.model, split, self.weights.ready))

    def evaluate_live(self, split: Split) -> Pieces[Evaluation]:
        """Evaluate live, which is the current candidate; see :meth:`HeldOutLoss.live_pieces`."""
        return (yield from self._heldout.live_pieces(self.weights.model, split, self.weights.ready))

    def sample(self) -> Pieces[Evaluation]:
        """Evaluate the current candidate on one batch of the report split."""
        return (yield from self._heldout.sample_pieces(self.weights.model, self.weights.ready))

    def measure(
        self, weights: np.ndarray, with_gradient: bool, parts: Sequence[int], abandon: Callable[[Evaluation], bool]
    ) -> Pieces[tuple[Evaluation, Gradient | None]]:
        """Load the merge with these merge weights and evaluate it on parts of the search split.

        Args:
            weights: merge weights, shape ``(num_weights,)`` or ``(groups, num_weights)``.
            with_gradient: whether to take the gradient in the merge weights too.
            parts, abandon: see :meth:`HeldOutLoss.search_pieces`.
        """
        yield from self.load(weights)
        gradient = _WindowGradient(self.weights, self._window, weights.ndim == 2) if with_gradient else None
        found = self._heldout.search_pieces(
            self.weights.model, self.weights.ready, parts, abandon=abandon, gradient=gradient
        )
        return (yield from found)


class _WindowGradient:
    """A :class:`MergeGradient`: ``dL/da = W @ dL/dtheta``, the window times the gradient in the candidate's weights."""

    def __init__(self, weights: Weights, window: Matrix, grouped: bool) -> None:
        self._weights = weights
        self._window = window
        self._grouped = grouped
        self.clear_gradient, self.add_gradient = weights.clear_gradient, weights.add_gradient

    def projected(self) -> Pieces[np.ndarray]:
        """See :class:`MergeGradient`."""
        columns = yield from self._weights.gradient()
        return (yield from self._window.project_pieces(columns, grouped=self._grouped, summands=True))
