"""``metric_for_best_model`` and ``EarlyStoppingCallback`` on the metrics of merges."""

from __future__ import annotations

import logging
import math
import re
from fnmatch import fnmatchcase
from typing import Any

from transformers import EarlyStoppingCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

from ..config import DEFAULT_NAME
from ..metrics import MEANINGS, MergeRecord

logger = logging.getLogger("traj_merge_callback")


class Monitored:
    """A metric of merges that a trainer selects checkpoints by.

    The trainer looks for it among the metrics of each evaluation, and counts evaluations; ``EarlyStoppingCallback`` is
    asked once for each merge, however often the trainer evaluates between two.

    Args:
        args: of the training.
        name: of the metric, as "merge/loss".
        trainer: the trainer.
    """

    def __init__(self, args: TrainingArguments, name: str, trainer: Trainer) -> None:
        self._name = name
        self._none_yet = -math.inf if args.greater_is_better else math.inf
        self._stoppers = [one for one in trainer.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]
        self.end()  # of a training that failed
        for one in self._stoppers:
            vars(one)["on_evaluate"] = _OncePerMerge(one, self)
        #: The newest merge.
        self.record: MergeRecord | None = None

    @classmethod
    def of(cls, args: TrainingArguments, merges: str, trainer: Trainer | None) -> Monitored | None:
        """What the trainer monitors of the merges of this name; None: nothing.

        Raises:
            ValueError: merges have no such metric, or the callback is not attached, and cannot give it to the trainer.
        """
        given = args.metric_for_best_model
        name = str(given).removeprefix("eval_")
        if not name.startswith((f"{merges}/", f"{merges}_details/")):
            return None
        known = [meant.replace(DEFAULT_NAME, merges, 1) for meant in MEANINGS]
        if not any(fnmatchcase(name, re.sub("<.*>", "*", one)) for one in known):
            raise ValueError(f"metric_for_best_model={given!r} is not among the metrics of merges: {known}")
        if trainer is None:
            raise ValueError(
                f"metric_for_best_model={given!r} needs TrajMergeCallback(...).attach(trainer): in callbacks=[...] the "
                "callback does not come before others that look for it"
            )
        if args.load_best_model_at_end and trainer.is_world_process_zero():
            logger.info(
                "load_best_model_at_end loads the trainer's checkpoint, of live weights, at which %s was best; "
                "load_merged_at_end=True loads the best merge",
                name,
            )
        return cls(args, name, trainer)

    def add_to(self, metrics: dict[str, float], record: MergeRecord | None) -> None:
        """Add the metric of the newest merge to those of an evaluation; the worst value where there is none yet."""
        self.record = record
        scalars = {} if record is None else record.scalars()
        metrics[f"eval_{self._name}"] = scalars.get(self._name, self._none_yet)

    def end(self) -> None:
        """Give callbacks their own methods back."""
        for one in self._stoppers:
            vars(one).pop("on_evaluate", None)


class _OncePerMerge:
    """``EarlyStoppingCallback.on_evaluate``, for each merge once."""

    def __init__(self, callback: EarlyStoppingCallback, monitored: Monitored) -> None:
        self._check = callback.on_evaluate
        self._monitored = monitored
        self._checked: int | None = None

    def __call__(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        record = self._monitored.record
        if record is None or record.step == self._checked:
            return None
        self._checked = record.step
        return self._check(args, state, control, **kwargs)
