"""The hooks, logs and checkpoints of ``transformers.Trainer``, translated for the engine."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn
from transformers import DefaultFlowCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config import MergeConfig, check_side_by_side
from ..disk.model_files import collect_pretrained
from ..engine.capturing import say_if_too_short
from ..evaluate.data import check_heldout, say_if_trained_on
from ..evaluate.heldout import LATER
from ..merger import TrajectoryMerger
from ..metrics import MergeRecord
from ..search.checks import shown
from ..window.capture import LossScaleWatch
from .data import Evaluations, eval_loaders
from .hub import leave_out_of_uploads
from .images import prepare_for_images
from .logs import log_eval, log_merge
from .monitors import Monitored
from .others import others_may_write
from .trained_loss import say_if_another

logger = logging.getLogger("traj_merge_callback")
_STATE_FOLDER = "traj_merge"


class TrajMergeCallback(TrainerCallback):
    """Merges recent checkpoints of the run while it trains, and logs and publishes the merged snapshots.

    Steps are the trainer's ``global_step``: optimizer steps, whatever ``gradient_accumulation_steps`` is; a step that
    AMP skipped is not captured. The trained weights are bit-identical to a run without the callback.

    Use it as ``TrajMergeCallback(...).attach(trainer)``. Then

    - ``heldout=None`` takes the trainer's eval dataset (a dict of datasets gives named domains);
    - metrics go through the trainer's own ``log``: to ``trainer_state.json``, and to whatever ``report_to`` names, in
      the same run as the training loss. TensorBoard shows them as ``train/merge/...``. The console has a line for each
      merge. TensorBoard, W&B and trackio get the merge weights as an image.

    In ``Trainer(callbacks=[TrajMergeCallback()])`` the callback cannot reach the trainer: ``heldout=None`` takes what
    the trainer evaluates first, until when checkpoints are captured and nothing is merged, and metrics go to
    ``trainer_state.json`` and ``metrics.jsonl`` only, and a line to the console.

    Snapshots go to ``output_dir``, by default "merged" in ``args.output_dir``, and load with ``from_pretrained``; the
    tokenizer is saved along. Resuming with ``train(resume_from_checkpoint=...)`` restores the window, which is saved in
    each ``checkpoint-<step>/traj_merge``. Callbacks with different names (``name=``) work side by side. Under DDP and
    FSDP the ranks merge together, each its own columns; DeepSpeed ZeRO stage 3 is refused at the start of training.

    Args:
        heldout: held-out batches, or a mapping from domain names to such; None: the trainer's eval dataset.
        nll: ``nll(model, batch) -> (summed NLL in nats, number of target tokens)``; None: the model's ``.loss``.
        **config: the options of :class:`MergeConfig`, among them ``window_size``, ``capture_every``, ``merge_every``.

    Example::

        trainer = Trainer(model, args, train_dataset=train, eval_dataset=heldout)
        TrajMergeCallback(capture_every=50, merge_every=500).attach(trainer)
        trainer.train()
        model = AutoModelForCausalLM.from_pretrained(f"{args.output_dir}/merged/best")

    Raises:
        ValueError, TypeError: an option is wrong; when attached or at the start of training also if there are no
            held-out data and none are going to be evaluated, or the model cannot be merged.
    """

    def __init__(
        self,
        heldout: Iterable[Any] | Mapping[str, Iterable[Any]] | None = None,
        nll: Callable[[nn.Module, Any], tuple[Any, Any]] | None = None,
        **config: Any,
    ) -> None:
        self.config = MergeConfig(**config)
        check_heldout([] if heldout is None else heldout, nll)
        self.merger: TrajectoryMerger | None = None
        self._heldout = heldout
        self._nll = nll
        self._options = config
        self._trainer: Trainer | None = None
        self._evaluations: Evaluations | None = None  # while held-out data are waited for
        self._monitored: Monitored | None = None
        self._resume_from: Any = None
        self._loss_scale = LossScaleWatch()
        self._loss: float | None = None  # the training loss that was logged last, until a step has used it

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(
                f"TrajMergeCallback of transformers.Trainer has no {name!r}; with Lightning take "
                "traj_merge_callback.lightning.TrajMergeCallback"
            )

    def attach(self, trainer: Trainer) -> TrajMergeCallback:
        """Add the callback to a trainer, so that it can use its eval dataset, its ``log`` and its checkpoints.

        Returns:
            The callback itself.

        Raises:
            ValueError: neither the callback nor the trainer has held-out data.
            TypeError: this is no ``Trainer``.
        """
        if not isinstance(trainer, Trainer):
            raise TypeError(f"attach(trainer={shown(trainer)}): must be a transformers.Trainer, or one derived from it")
        if self._heldout is None and trainer.eval_dataset is None:
            raise ValueError("no held-out data: pass heldout= to TrajMergeCallback, or eval_dataset= to the trainer")
        others = [one for one in trainer.callback_handler.callbacks if isinstance(one, TrajMergeCallback)]
        check_side_by_side(one.config for one in [*(one for one in others if one is not self), self])
        self._trainer = trainer
        if self not in others:
            trainer.add_callback(self)
        train = trainer.train

        @functools.wraps(train)
        def noting_the_checkpoint(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
            # Callbacks are not told which folder training resumes from.
            self._resume_from = resume_from_checkpoint
            # Weights are captured before other callbacks, which may swap them for an average of their own, but after
            # the one that decides what is due at a step.
            callbacks = trainer.callback_handler.callbacks
            others = [one for one in callbacks if one is not self]
            first = [one for one in others if isinstance(one, (DefaultFlowCallback, TrajMergeCallback))]
            callbacks[:] = [*first, self, *(one for one in others if one not in first)]
            try:
                return train(resume_from_checkpoint, *args, **kwargs)
            except BaseException:
                # Nor are they told that training ends like this.
                if self.merger is not None:
                    self.merger.close()
                raise

        trainer.train = noting_the_checkpoint
        return self

    # The life of a run

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse callbacks that would write over each other."""
        self._meet(control, "init")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Build the engine, read the held-out data, and take over the window of a resumed run."""
        self._meet(control, "train")
        if self.merger is not None:
            self.merger.close()  # of a training that was given up, for instance to find a batch size
        if self._trainer is None and state.is_world_process_zero:
            logger.warning(
                "TrajMergeCallback in callbacks=[...] writes its metrics to the console, trainer_state.json and "
                "metrics.jsonl. TrajMergeCallback(...).attach(trainer) also sends them to report_to=%s, in the run of "
                "the training loss, and has the trainer's eval dataset from the beginning.",
                args.report_to,
            )
        heldout = self._heldout if self._heldout is not None or self._trainer is None else eval_loaders(self._trainer)
        self._evaluations = Evaluations(args) if heldout is None else None
        self._monitored = Monitored.of(args, self.config.name, self._trainer)
        if self._trainer is not None and self._nll is None:
            say_if_another(self._trainer)
        if state.is_world_process_zero:
            say_if_too_short(self.config, state.max_steps)
            if self._trainer is not None:
                say_if_trained_on(
                    heldout if self._heldout is not None else self._trainer.eval_dataset, self._trainer.train_dataset
                )
        self.merger = TrajectoryMerger(
            LATER if heldout is None else heldout,
            nll=self._nll,
            log=lambda record: log_merge(self._trainer, state, control, self._records or [record], self.config),
            log_eval=lambda record: log_eval(self._trainer, state, control, record),
            log_everywhere=True,
            extra=lambda: collect_pretrained(kwargs.get("processing_class")),
            optimizer=kwargs.get("optimizer"),
            **{
                **self._options,
                "output_dir": self.config.output_dir or str(Path(args.output_dir) / self.config.named("merged")),
            },
        )
        if self._trainer is not None:
            prepare_for_images(self._trainer)
        if args.push_to_hub:
            leave_out_of_uploads(self.config.named(_STATE_FOLDER))
        self.merger.start(kwargs["model"])
        if state.global_step > 0:
            self.merger.resume_from(lambda: self._saved_window(args, state), kwargs["model"], state.global_step)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note what is evaluated, where held-out data are waited for, and add a metric that the trainer monitors."""
        if self._evaluations is not None:
            self._evaluations.see(kwargs["metrics"], kwargs.get("eval_dataloader"))
        if self._monitored is not None and self.merger is not None:
            self.merger.complete()
            self._monitored.add_to(kwargs["metrics"], next(reversed(self._records), None))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the held-out data that were waited for, before the weights of the last step change."""
        if self.merger is None or self._evaluations is None or (heldout := self._evaluations.heldout) is None:
            return
        self._evaluations = None
        if state.is_world_process_zero:
            say_if_trained_on(heldout, kwargs.get("train_dataloader"))
        self.merger.read_heldout(heldout, kwargs["model"], state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the loss scale, from which a step that AMP skips can be told."""
        self._loss_scale.before_step(getattr(kwargs.get("optimizer"), "scaler", None))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Capture and merge if due; at the last step, merge for the last time while the loggers are still open."""
        if self.merger is None:
            return
        loss, self._loss = self._loss, None
        self.merger.step(kwargs["model"], state.global_step, loss=loss, skipped=self._loss_scale.skipped)
        flags = (control.should_evaluate, control.should_save, control.should_epoch_stop)
        if any(flags) or others_may_write(self._trainer, self):
            self.merger.settle()
        if control.should_training_stop:
            self.merger.merge_at_end(kwargs["model"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the training loss, in which the next step looks for a spike."""
        self._loss = kwargs.get("logs", {}).get("loss", self._loss)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Merge for the last time if something stopped training early."""
        if self.merger is not None:
            self.merger.settle()
            self.on_step_begin(args, state, control, **kwargs)
            if control.should_training_stop:
                self.merger.merge_at_end(kwargs["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the window into the trainer's checkpoint, if the checkpoint can be resumed from."""
        self.on_step_begin(args, state, control, **kwargs)
        if self.merger is None or args.save_only_model:
            return
        folder = _checkpoint_folder(args, state)
        self.merger.save_state(folder / self.config.named(_STATE_FOLDER) if folder.is_dir() else None)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Load the best snapshot if asked to."""
        vars(control).pop("_traj_merge_train", None)
        if not args.load_best_model_at_end:  # which may have put other weights into the model
            self.on_step_begin(args, state, control, **kwargs)
        if self.merger is not None:
            self.merger.finish(kwargs["model"])
        if self._evaluations is not None and state.is_world_process_zero:
            self._evaluations.say_none()
        if self._monitored is not None:
            self._monitored.end()

    @property
    def _records(self) -> list[MergeRecord]:
        return [] if self.merger is None else self.merger.records

    # What the trainer has to offer

    def _meet(self, control: TrainerControl, event: str) -> None:
        """Check that the callbacks of this trainer, which share its ``control``, can work side by side."""
        ours = vars(control).setdefault(f"_traj_merge_{event}", [])
        if self not in ours:
            check_side_by_side(one.config for one in [*ours, self])
            ours.append(self)

    def _saved_window(self, args: TrainingArguments, state: TrainerState) -> Path | None:
        given = [self._resume_from, args.resume_from_checkpoint]
        folders = [Path(path) for path in given if isinstance(path, (str, Path))]
        for folder in folders or [_checkpoint_folder(args, state)]:
            if (saved := folder / self.config.named(_STATE_FOLDER)).is_dir():
                return saved
        return None


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
