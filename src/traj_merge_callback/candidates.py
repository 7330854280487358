"""Merge weights in, held-out losses out: where the k-world's candidates meet the model (N-world)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor, nn

from .evaluation import Evaluation, Gradient
from .heldout import HeldOutLoss, Split
from .window import CheckpointWindow


class Candidates:
    """Evaluates merges of a window, with the training model as the skeleton; live weights are never written.

    Args:
        model: the model being trained.
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

    def evaluate_live(self, split: Split) -> Evaluation:
        """Evaluate live as it is, which is exact whatever the rows' precision."""
        return self._heldout.evaluate(self._model, split, on_batch=self._on_batch)

    def evaluate(self, weights: np.ndarray, split: Split) -> Evaluation:
        """Evaluate a merge with weights of shape ``(num_weights,)`` or ``(groups, num_weights)``."""
        with self._window.layout.installed(self._model, self._window.combine(weights)):
            return self._heldout.evaluate(self._model, split, on_batch=self._on_batch)

    def measure(
        self, weights: np.ndarray, with_gradient: bool, parts: Sequence[int], abandon: Callable[[Evaluation], bool]
    ) -> tuple[Evaluation, Gradient | None]:
        """Evaluate a merge on parts of the search split and, if asked for, take the gradient in its merge weights."""

        def project(gradient: Tensor) -> np.ndarray:
            return self._window.project(gradient, grouped=weights.ndim == 2)

        with self._window.layout.installed(self._model, self._window.combine(weights)):
            return self._heldout.search(
                self._model,
                parts=parts,
                on_batch=self._on_batch,
                abandon=abandon,
                gradient=(self._window.layout, project) if with_gradient else None,
            )
