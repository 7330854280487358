"""Who else may write the model's weights while Lightning trains."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden

# Lightning's callbacks write weights in validation and in hooks of an epoch and the end, before which captures finish.
_HOOKS = (
    *("on_train_batch_end", "on_train_batch_start", "on_train_epoch_end", "on_train_epoch_start", "optimizer_step"),
    *("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step"),
)
_WRITE_NOTHING = ("lightning.", "pytorch_lightning.", "traj_merge_callback.")


def others_may_write(trainer: pl.Trainer) -> bool:
    """Whether somebody's own code runs between this hook and the next optimizer step, where it may write weights."""
    foreign = [one for one in trainer.callbacks if not type(one).__module__.startswith(_WRITE_NOTHING)]
    # Another callback of ours that rolls back; its own capture it settles itself.
    foreign += [one for one in trainer.callbacks if getattr(getattr(one, "config", None), "on_spike", None)]
    module = trainer.lightning_module
    own = any(is_overridden(name, module) for name in _HOOKS) or not module.automatic_optimization
    return own or bool(foreign)
