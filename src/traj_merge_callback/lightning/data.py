"""The trainer's held-out data: its validation dataloaders, and how it brings a batch to the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import RunningStage

from ..evaluate.isolation import preserved_rng


@contextmanager
def validating(trainer: pl.Trainer) -> Iterator[None]:
    """Within the context hooks see a trainer that validates: they must not augment held-out batches."""
    stage = trainer.state.stage
    trainer.state.stage = RunningStage.VALIDATING
    try:
        yield
    finally:
        trainer.state.stage = stage


def transfer(trainer: pl.Trainer, batch: Any) -> Any:
    """Bring a batch to the device the way the trainer does, with the module's own transfer hooks."""
    with validating(trainer):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def validation_loaders(trainer: pl.Trainer) -> Any:
    """The validation dataloaders; a trainer that has not asked for its own yet still will, with its own draws."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    before = dict(vars(loop))
    if trainer.val_dataloaders is None:
        # Validation is not due in this epoch, so the trainer has not asked for its loaders yet. It still will.
        with preserved_rng():
            loop.setup_data()
    loaders = trainer.val_dataloaders
    vars(loop).update(before)
    if loaders is None:
        raise ValueError(
            "TrajMergeCallback has no held-out data: pass heldout=..., or give the trainer a validation dataloader"
        )
    if isinstance(loaders, (list, tuple)):
        return loaders[0] if len(loaders) == 1 else {str(index): loader for index, loader in enumerate(loaders)}
    return loaders
