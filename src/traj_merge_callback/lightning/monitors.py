"""Callbacks that monitor a merge's metrics: they act on merges, and not on their absence."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

_METHODS = ("_run_early_stopping_check", "_save_topk_checkpoint")


def let_wait(trainer: pl.Trainer, merges: str) -> None:
    """Let callbacks that monitor merges of this name wait for them, where they would raise or count idle steps.

    ``EarlyStopping`` checks each merge once, however often it is asked to between two merges. ``ModelCheckpoint`` ranks
    no checkpoint before the first merge; ``save_last`` saves all the same. ``ReduceLROnPlateau`` leaves the learning
    rate as it is until then.
    """
    prefix = (f"{merges}/", f"{merges}_details/")
    for config in trainer.lr_scheduler_configs:
        if str(config.monitor).startswith(prefix):
            config.strict = False
    for callback in trainer.callbacks:
        if not str(getattr(callback, "monitor", None)).startswith(prefix):
            continue
        if isinstance(callback, EarlyStopping):
            check = _OncePerMerge(callback._run_early_stopping_check, f"{merges}_details/step")
            vars(callback).setdefault(_METHODS[0], check)
        if isinstance(callback, ModelCheckpoint):
            save = functools.partial(_save_if_there, callback, callback._save_topk_checkpoint)
            vars(callback).setdefault(_METHODS[1], save)


def stop_waiting(trainer: pl.Trainer) -> None:
    """Give callbacks their own methods back."""
    for callback in trainer.callbacks:
        for name in _METHODS:
            vars(callback).pop(name, None)


class _OncePerMerge:
    """``EarlyStopping``'s check, for each merge once; no check is as good as an improvement."""

    def __init__(self, check: Callable[[pl.Trainer], None], step: str) -> None:
        self._check = check
        self._step = step
        self._checked: Any = None

    def __call__(self, trainer: pl.Trainer) -> None:
        step = trainer.callback_metrics.get(self._step)
        if step is not None and (self._checked is None or float(step) != self._checked):
            self._checked = float(step)
            self._check(trainer)


def _save_if_there(callback: Any, save: Callable[..., None], trainer: pl.Trainer, candidates: dict[str, Any]) -> None:
    if callback.monitor in candidates:
        save(trainer, candidates)
