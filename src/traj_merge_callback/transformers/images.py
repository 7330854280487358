"""The heat map of merge weights, to those of a trainer's trackers that take images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import Trainer
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ..metrics import MergeRecord


def prepare_for_images(trainer: Trainer) -> None:
    """Load what draws, if a tracker takes images, before training begins."""
    if _trackers(trainer):
        from ..offline.report.image import can_draw

        can_draw()


def log_image(trainer: Trainer, records: Sequence[MergeRecord]) -> None:
    """Log the weights of a run's merges so far as ``train/<name>/weights``, at the step of the numbers' log."""
    if not (trackers := _trackers(trainer)):
        return
    # It loads matplotlib, which nobody needs whose trackers take no images.
    from ..offline.report.image import weights_image

    if (image := weights_image(records)) is not None:
        for tracker in trackers:
            _send(tracker, f"train/{records[-1].name}/weights", image, trainer.state.global_step)


def _trackers(trainer: Trainer) -> list[Any]:
    if not trainer.is_world_process_zero():
        return []
    kinds = (TensorBoardCallback, WandbCallback, TrackioCallback)
    return [one for one in trainer.callback_handler.callbacks if isinstance(one, kinds)]


def _send(tracker: Any, name: str, image: np.ndarray, step: int) -> None:
    if isinstance(tracker, TensorBoardCallback):
        if tracker.tb_writer is not None:
            tracker.tb_writer.add_image(name, image, step, dataformats="HWC")
        return
    package = tracker._wandb if isinstance(tracker, WandbCallback) else tracker._trackio
    if package is not None:
        package.log({name: package.Image(image), "train/global_step": step})
