"""Which optimizer steps mixed precision skipped."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class LossScaleWatch:
    """Tells from the loss scale whether a step was skipped: gradients that overflow lower it.

    Trainers' own flags do not know: a fused optimizer is called all the same, and skips the update by itself. The scale
    stays on its device until someone asks, so watching does not make the CPU wait for the GPU.
    """

    def __init__(self) -> None:
        self._scaler: Any = None
        self._before: Tensor | None = None

    def before_step(self, scaler: Any) -> None:
        """Note the scale between the backward pass and the optimizer step; ``scaler`` is a GradScaler or None."""
        scale = getattr(scaler, "_scale", None)
        self._scaler = scaler
        self._before = None if scale is None else scale.detach().clone()

    def skipped(self) -> bool:
        """Whether the step since then was skipped."""
        return self._before is not None and bool(self._scaler._scale < self._before)
