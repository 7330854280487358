"""A Lightning module's ``validation_step`` as a held-out loss."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from ..evaluate.heldout import Nll
from ..evaluate.language_model import summed_nll
from .data import validating

logger = logging.getLogger("traj_merge_callback")
_USUAL = ("loss", "val_loss", "val/loss", "valid_loss", "valid/loss", "validation_loss", "validation/loss", "eval_loss")


class ValidationStep:
    """A module's ``validation_step`` as a held-out loss (see :func:`summed_nll`), with everything it logs silenced."""

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not is_overridden("validation_step", pl_module):
            raise ValueError(
                f"TrajMergeCallback has no loss: {type(pl_module).__name__} has no validation_step; define one, or "
                "pass nll=, a function (module, batch) -> (summed NLL, tokens)"
            )
        if trainer.is_global_zero:
            logger.info(
                "held-out loss: merges are chosen and reported by the loss of %s.validation_step",
                type(pl_module).__name__,
            )
        self._trainer = trainer
        self._said = False
        step = pl_module.validation_step
        self._takes_batch_idx = is_param_in_hook_signature(step, "batch_idx", min_args=2)
        found = inspect.signature(step).parameters.get("dataloader_idx")
        self._needs_loader = found is not None and found.default is inspect.Parameter.empty

    def of(self, dataloader_idx: int | None) -> Nll:
        """The loss of batches of one of several validation loaders; None: there are not several."""

        def validation_step(model: nn.Module, batch: Any) -> tuple[Tensor | float, int]:
            return self(model, batch, dataloader_idx)

        return validation_step

    def __call__(self, model: nn.Module, batch: Any, dataloader_idx: int | None = None) -> tuple[Tensor | float, int]:
        """See ``Nll`` and :meth:`of`."""
        arguments = [0] if self._takes_batch_idx else []
        if self._needs_loader or dataloader_idx is not None:
            arguments.append(dataloader_idx or 0)
        pl_module, strategy = self._trainer.lightning_module, self._trainer.strategy
        logged: dict[str, Any] = {}
        loggers = self._trainer.loggers
        # Attributes set on the module here vanish with the evaluation, which restores all of them.
        vars(pl_module)["log"] = lambda name, value, *args, **kwargs: logged.setdefault(name, value)
        vars(pl_module)["log_dict"] = lambda values, *args, **kwargs: logged.update(values)
        self._trainer.loggers = [DummyLogger() for _ in loggers]
        try:
            with validating(self._trainer):
                if model is pl_module:
                    output = pl_module.validation_step(batch, *arguments)  # type: ignore[operator]
                else:
                    # FSDP's wrapper has weights of its own to gather: the step is taken inside its forward pass.
                    redirected = strategy._forward_redirection
                    output = redirected(model, pl_module, "validation_step", batch, *arguments)
        finally:
            self._trainer.loggers = loggers
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if loss is None:
            loss = self._logged_loss(pl_module, logged)
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"{type(pl_module).__name__}.validation_step gave no loss: it should return a tensor or a mapping with "
                "'loss', or log a name with 'loss' in it; or pass nll= to TrajMergeCallback"
            )
        return summed_nll(pl_module, batch, loss)

    def _logged_loss(self, pl_module: pl.LightningModule, logged: dict[str, Any]) -> Any:
        """The loss among what was logged: the only name with "loss" in it, or the only one that is usual."""
        names = [name for name in logged if "loss" in name]
        usual = [name for name in names if name.removesuffix("_epoch").removesuffix("_step") in _USUAL]
        found = names if len(names) == 1 else usual
        if len(found) > 1 or (names and not found):
            raise TypeError(
                f"{type(pl_module).__name__}.validation_step returns no loss and logs {names}: which of them is meant? "
                "Return it, or pass nll= to TrajMergeCallback"
            )
        if found and not self._said and self._trainer.is_global_zero:
            self._said = True
            logger.info("held-out loss: validation_step returns none, and what it logs as %r is taken", found[0])
        return logged[found[0]] if found else None
