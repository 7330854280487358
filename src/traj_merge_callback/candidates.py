"""Merge weights in, held-out losses out: where the k-world's candidates meet the model (N-world)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from torch import nn

from .evaluation import Evaluation, Gradient
from .heldout import HeldOutLoss, Split, device_of
from .isolation import isolated
from .parameters import unwrap
from .pieces import Pieces
from .window import CheckpointWindow


class Candidates:
    """Evaluates merges of a window, with a model as the skeleton whose own weights are never written.

    One row on the model's device holds the candidate at hand. All methods work in pieces, and between two of them the
    model has its own weights.

    Args:
        model: the model being trained, or another one of its kind.
        window: the checkpoints.
        heldout: the held-out loss.
        beside_training: whether the model is another one, and training goes on meanwhile.
    """

    def __init__(
        self, model: nn.Module, window: CheckpointWindow, heldout: HeldOutLoss, *, beside_training: bool = False
    ) -> None:
        self._model = model
        self._window = window
        self._heldout = heldout
        self._beside_training = beside_training
        self._row = window.staging_on(device_of(model))

    def installed(self) -> AbstractContextManager[None]:
        """Within the context the model has the weights of the candidate at hand."""
        return self._window.layout.installed(self._model, self._row)

    @contextmanager
    def _ready(self, gradients: bool) -> Iterator[None]:
        model, seed = unwrap(self._model), self._heldout.seed
        with (
            self.installed(),
            isolated(model, seed, gradients=gradients, beside_training=self._beside_training),
        ):
            yield

    def take(self, weights: np.ndarray | None) -> Pieces[None]:
        """Make the merge with these weights the candidate at hand; None: live as it was at the last capture."""
        yield from self._window.combining(weights, self._row)

    def evaluate(self, split: Split) -> Pieces[Evaluation]:
        """Evaluate the candidate at hand."""
        return (yield from self._heldout.evaluating(self._model, split, self._ready))

    def sample(self) -> Pieces[Evaluation]:
        """Evaluate the candidate at hand on one batch."""
        return (yield from self._heldout.sampling(self._model, self._ready))

    def measure(
        self, weights: np.ndarray, with_gradient: bool, parts: Sequence[int], abandon: Callable[[Evaluation], bool]
    ) -> Pieces[tuple[Evaluation, Gradient | None]]:
        """Evaluate a merge on parts of the search split and, if asked for, take the gradient in its merge weights."""

        def project(gradient: torch.Tensor) -> Pieces[np.ndarray]:
            return self._window.projecting(gradient, grouped=weights.ndim == 2)

        yield from self.take(weights)
        gradient = (self._window.layout, project) if with_gradient else None
        return (yield from self._heldout.searching(self._model, self._ready, parts, abandon=abandon, gradient=gradient))
