"""What a trainer trains, where that is not the loss that merges are measured by."""

from __future__ import annotations

import logging

from transformers import Trainer

logger = logging.getLogger("traj_merge_callback")


def say_if_another(trainer: Trainer) -> None:
    """Log one line if the trainer's loss, and so its ``eval_loss``, is not the language-model loss alone."""
    others = []
    if trainer.args.label_smoothing_factor:
        others.append(f"label_smoothing_factor={trainer.args.label_smoothing_factor}")
    if trainer.compute_loss_func is not None:
        others.append(f"compute_loss_func={getattr(trainer.compute_loss_func, '__name__', trainer.compute_loss_func)}")
    if getattr(trainer.compute_loss, "__func__", None) is not Trainer.compute_loss:
        others.append(f"{type(trainer).__name__}.compute_loss")
    if others and trainer.is_world_process_zero():
        logger.info(
            "held-out loss: merges are chosen and reported by the mean NLL per target token of the model; the trainer "
            "trains, and reports as eval_loss, what %s makes of it. For another loss pass nll=.",
            " and ".join(others),
        )
