"""What a merge logs: to a trainer's loggers, to its metrics, and to its console."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from ..config import MergeConfig
from ..evaluate.data import as_tensors
from ..metrics import MergeRecord, for_console

# Of the metrics those that the progress bar shows.
_SHOWN = ("/loss", "/gain")


def prepare_for_images(trainer: pl.Trainer) -> None:
    """Load what draws, if a logger takes images, before training begins."""
    if _take_images(trainer):
        from ..offline.report.image import can_draw

        can_draw()


def log_merge(trainer: pl.Trainer, records: Sequence[MergeRecord], config: MergeConfig) -> None:
    """Log the last of a run's merges, on every rank: its numbers, a line, and a heat map of the weights of all."""
    record = records[-1]
    _log(trainer, record.step, record.scalars(), record.scalars(details=config.log_details), record.line())
    if loggers := _take_images(trainer):
        # It loads matplotlib, which nobody needs whose loggers take no images.
        from ..offline.report.image import weights_image

        if (image := weights_image(records)) is not None:
            for logger in loggers:
                _send(logger, f"{record.name}/weights", image, record.step)


def log_eval(trainer: pl.Trainer, record: MergeRecord) -> None:
    """Log what ``on_publish`` found in the snapshot of a merge, on every rank."""
    scalars = record.eval_scalars()
    _log(trainer, record.step, scalars, scalars, record.eval_line())


def _log(trainer: pl.Trainer, step: int, scalars: dict[str, float], logged: dict[str, float], line: str) -> None:
    """Metrics that callbacks may monitor, those of them for loggers, and a line for the console."""
    for logger in trainer.loggers if trainer.is_global_zero else []:
        logger.log_metrics(logged, step=step)
        logger.save()
    trainer.logged_metrics.update(scalars)
    trainer.callback_metrics.update(as_tensors(scalars))
    shown = {name: scalars[name] for name in scalars if name.count("/") == 1 and name.endswith(_SHOWN)}
    trainer.progress_bar_metrics.update(shown)
    trainer.lightning_module.print(for_console(line))  # on rank 0, above the progress bar


def _take_images(trainer: pl.Trainer) -> list[Any]:
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger for logger in loggers if isinstance(logger, (TensorBoardLogger, WandbLogger))]


def _send(logger: Any, name: str, image: np.ndarray, step: int) -> None:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, image, step, dataformats="HWC")
    else:
        logger.log_image(name, [image], step)
