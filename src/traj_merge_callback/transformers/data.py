"""The trainer's held-out data: its eval dataloaders, asked for, or seen when it evaluates."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers import Trainer, TrainingArguments

from ..evaluate.untouched.isolation import preserved_rng

logger = logging.getLogger("traj_merge_callback")


def eval_loaders(trainer: Trainer) -> Any:
    """The dataloader of the trainer's eval dataset; a dict of datasets gives one for each name."""
    datasets = trainer.eval_dataset
    with preserved_rng():  # a trainer of the user's own may draw here
        if isinstance(datasets, dict):
            return {name: trainer.get_eval_dataloader(name) for name in datasets}
        return trainer.get_eval_dataloader()


class Evaluations:
    """What a trainer has evaluated since training began, for a callback that cannot ask the trainer for it.

    Args:
        args: of the training.

    Raises:
        ValueError: the trainer is not going to evaluate.
    """

    def __init__(self, args: TrainingArguments) -> None:
        if args.eval_strategy == "no" and not args.eval_on_start:
            raise ValueError(
                "no held-out data: with eval_strategy='no' the trainer's eval dataset never comes to TrajMergeCallback "
                "in callbacks=[...]; use TrajMergeCallback(...).attach(trainer), or pass heldout="
            )
        self._args = args
        self._loaders: dict[str, Any] = {}

    def see(self, metrics: Mapping[str, float], loader: Any) -> None:
        """Note an evaluation.

        Args:
            metrics: of one dataset, as ``on_evaluate`` is given them; those of a named one begin with "eval_<name>_".
            loader: what was evaluated; None: the trainer has not said.
        """
        runtimes = (name.removesuffix("_runtime") for name in metrics if name.endswith("_runtime"))
        prefix = next(runtimes, "")
        if loader is not None and prefix.split("_")[0] == "eval":
            self._loaders.setdefault(prefix.removeprefix("eval").removeprefix("_"), loader)

    @property
    def heldout(self) -> Any:
        """A loader, or loaders by the names of their datasets; None: nothing was evaluated yet.

        An evaluation reads all datasets one after another, so they are complete when a step begins.
        """
        return self._loaders.get("", self._loaders or None)

    def say_none(self) -> None:
        """Warn at the end of training that there were no held-out data."""
        logger.warning(
            "no merge was made, as this trainer evaluated nothing (eval_steps=%s, eval_delay=%s), and "
            "TrajMergeCallback in callbacks=[...] has no other held-out data: use "
            "TrajMergeCallback(...).attach(trainer), or pass heldout=",
            self._args.eval_steps,
            self._args.eval_delay,
        )
