"""Merge weights in, held-out losses out: where the k-world's candidates meet the model (N-world)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from .evaluation import Evaluation
from .heldout import HeldOutLoss, Split
from .selection import is_row
from .window import CheckpointWindow


class Candidates:
    """Evaluates merges of a window, with the training model as the skeleton; live weights are never written.

    Args:
        model: the model being trained, whose weights are the window's newest row.
        window: the checkpoints.
        heldout: the held-out loss.
        on_batch: called after each held-out batch, to show progress.
    """

    def __init__(
        self, model: nn.Module, window: CheckpointWindow, heldout: HeldOutLoss, on_batch: Callable[[], None]
    ) -> None:
        self._model = model
        self._window = window
        self._heldout = heldout
        self._on_batch = on_batch

    @property
    def live(self) -> np.ndarray:
        """The merge weights that are live alone."""
        weights = np.zeros(self._window.num_weights)
        weights[-1] = 1.0
        return weights

    def evaluate(self, weights: np.ndarray, split: Split) -> Evaluation:
        """Evaluate a merge; live is evaluated as it is, which is exact whatever the rows' precision."""
        if is_row(weights, len(weights) - 1):
            return self._heldout.evaluate(self._model, split, on_batch=self._on_batch)
        with self._window.layout.installed(self._model, self._window.combine(weights)):
            return self._heldout.evaluate(self._model, split, on_batch=self._on_batch)

    def search_loss(self, weights: np.ndarray, with_gradient: bool) -> tuple[float, np.ndarray | None]:
        """Loss on the search split and, if asked for, its gradient in the merge weights, shape ``(num_weights,)``."""
        if not with_gradient:
            return self.evaluate(weights, "search").loss, None
        layout = self._window.layout
        gradient = torch.empty(layout.numel)
        with layout.installed(self._model, self._window.combine(weights)):
            found = self._heldout.evaluate_with_gradient(self._model, layout, gradient, on_batch=self._on_batch)
        return found.loss, self._window.project(gradient)
