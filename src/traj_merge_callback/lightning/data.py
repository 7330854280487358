"""The trainer's held-out data: its validation dataloaders, and how it brings a batch to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader

from ..evaluate.untouched.isolation import preserved_rng

T = TypeVar("T")


@contextmanager
def validating(trainer: pl.Trainer) -> Iterator[None]:
    """Within the context hooks see a trainer that validates: they must not augment held-out batches."""
    stage = trainer.state.stage
    trainer.state.stage = RunningStage.VALIDATING
    try:
        yield
    finally:
        trainer.state.stage = stage


def transfer(trainer: pl.Trainer, dataloader_idx: int | None, batch: Any) -> Any:
    """Bring a batch to the device the way the trainer does, with the module's own transfer hooks."""
    index = dataloader_idx or 0
    with validating(trainer):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=index)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=index)


def validation_loaders(trainer: pl.Trainer) -> CombinedLoader:
    """The validation dataloaders; a trainer that has not asked for its own yet still will, with its own draws."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    before = dict(vars(loop))
    if trainer.val_dataloaders is None and loop._data_source.is_defined():
        # Validation is not due in this epoch, so the trainer has not asked for its loaders yet. It still will.
        with preserved_rng():
            loop.setup_data()
    combined = loop._combined_loader
    vars(loop).update(before)
    if combined is None:
        raise ValueError(
            "TrajMergeCallback has no held-out data: pass heldout=..., or give the trainer a validation dataloader"
        )
    return combined


def steps_of(trainer: pl.Trainer) -> float:
    """Optimizer steps of the whole run; -1 or infinite if they are not known, as where accumulation changes."""
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):
        return trainer.max_steps
    return trainer.estimated_stepping_batches


def by_loader(heldout: Any) -> tuple[Any, dict[str, int] | None]:
    """Held-out data, and for each name of several loaders of a trainer its ``dataloader_idx``.

    Args:
        heldout: what a :class:`HeldOutLoss` takes, or a trainer's loaders.

    Raises:
        ValueError: loaders that are combined to joint batches.
    """
    several = heldout.values() if isinstance(heldout, Mapping) else [heldout]
    for one in several:
        if isinstance(one, CombinedLoader) and (one is not heldout or one._mode != "sequential"):
            raise ValueError(
                f"held-out data is a CombinedLoader(mode={one._mode!r}), whose batches are of several loaders, so that "
                "their sequences cannot be dealt to a search and a report split: pass heldout=, a loader or a mapping "
                "from names to loaders, with nll=, the loss of one of their batches; or combine with mode='sequential'"
            )
    if not isinstance(heldout, CombinedLoader):
        return heldout, None
    loaders, given = heldout.flattened, heldout.iterables
    if len(loaders) == 1:
        return loaders[0], None
    flat = isinstance(given, Mapping) and len(given) == len(loaders)
    names = list(map(str, given)) if flat else [str(index) for index in range(len(loaders))]
    return dict(zip(names, loaders, strict=True)), {name: index for index, name in enumerate(names)}


def by_name(make: Callable[[int | None], T], indices: dict[str, int] | None) -> T | dict[str, T]:
    """What is made for each loader's ``dataloader_idx``, or for all held-out data alike."""
    return make(None) if indices is None else {name: make(index) for name, index in indices.items()}
