"""Logging through a trainer without changing what it does next, or logs itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import Trainer, TrainerControl

_FLAGS = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")


@contextmanager
def preserved_flags(control: TrainerControl) -> Iterator[None]:
    """Logging clears ``should_log``; what the trainer has still to do at this step must stay to be done."""
    flags = {name: getattr(control, name) for name in _FLAGS}
    try:
        yield
    finally:
        for name, value in flags.items():
            setattr(control, name, value or getattr(control, name))


@contextmanager
def preserved_averages(trainer: Trainer) -> Iterator[None]:
    """TRL's trainers add running averages since the last log to each log and clear them; ours is not their turn."""
    averages = getattr(trainer, "_metrics", None)
    if not isinstance(averages, dict):
        yield
        return
    trainer._metrics = {mode: {} for mode in averages}
    try:
        yield
    finally:
        trainer._metrics = averages
