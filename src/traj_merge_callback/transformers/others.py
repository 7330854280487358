"""Who else may write the model's weights while ``transformers.Trainer`` trains."""

from __future__ import annotations

from transformers import Trainer, TrainerCallback

_WRITE_NOTHING = ("transformers.", "trl.", "traj_merge_callback.")


def others_may_write(trainer: Trainer | None, me: TrainerCallback) -> bool:
    """Whether somebody's own callback runs before the next optimizer step, where it may write weights.

    Args:
        trainer: None: it is not known, nor what callbacks it has.
        me: the callback that asks.
    """
    if trainer is None:
        return True
    callbacks = trainer.callback_handler.callbacks
    foreign = [one for one in callbacks if not type(one).__module__.startswith(_WRITE_NOTHING)]
    # Another callback of ours that rolls back.
    ours = [one for one in callbacks if one is not me and getattr(getattr(one, "config", None), "on_spike", None)]
    return bool(foreign or ours)
