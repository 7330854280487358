"""Lightning's hooks, loggers and checkpoints, translated for the engine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer

from ..config import DEFAULT_NAME, MergeConfig, check_side_by_side
from ..disk.atomic import remove_leftovers, remove_tree
from ..disk.model_files import collect_checkpoint
from ..disk.state import remove_other_states
from ..disk.untrusted import folder_name_of_step
from ..engine.capturing import say_if_too_short
from ..evaluate.data import check_heldout, say_if_trained_on
from ..merger import TrajectoryMerger
from ..window.capture import LossScaleWatch
from ..window.names import unwrap
from ..window.sharding import has_fsdp
from .data import by_loader, by_name, steps_of, transfer, validation_loaders
from .logs import log_eval, log_merge, prepare_for_images
from .monitors import let_wait, stop_waiting
from .others import others_may_write
from .validation_step import ValidationStep


class TrajMergeCallback(pl.Callback):
    """Merges recent checkpoints of the run while it trains, and logs and publishes the merged snapshots.

    Steps are the trainer's ``global_step``: optimizer steps, whatever ``accumulate_grad_batches`` is; a step that AMP
    skipped is not captured. The trained weights are bit-identical to a run without the callback.

    - Held-out data: ``heldout``, or the trainer's validation dataloaders. The loss is ``nll``, or what the module's own
      ``validation_step`` returns, with its logging silenced.
    - Metrics go to every logger at the step of the merge, to ``trainer.callback_metrics`` (so
      ``ModelCheckpoint(monitor="merge/loss")`` and ``EarlyStopping`` see them) and to the progress bar; the console has
      a line for each merge. TensorBoard and W&B get the merge weights as an image.
    - Snapshots go to ``output_dir``, by default "merged" in the trainer's log folder; ``load_merged(folder, module)``
      reads one. With ``save_ckpt=True`` each also holds ``merged.ckpt`` for ``load_from_checkpoint``.
    - Resuming with ``fit(ckpt_path=...)`` restores the window from ``<checkpoint>.ckpt.merge``, which is written and
      removed together with the checkpoint. Checkpoints on remote storage have none.
    - Callbacks with different names (``name=``) work side by side in one trainer.
    - Under DDP, FSDPStrategy and ModelParallelStrategy (FSDP2) the ranks merge together, each its own columns.
      DeepSpeed ZeRO stage 3 and tensor parallelism are refused at the start of ``fit``.

    Args:
        heldout: held-out batches, or a mapping from domain names to such; None: the trainer's validation dataloaders.
        nll: ``nll(module, batch) -> (summed NLL in nats, number of target tokens)``; None: ``validation_step``.
        save_ckpt: also write a Lightning checkpoint of the merged weights into each snapshot.
        **config: the options of :class:`MergeConfig`, among them ``window_size``, ``capture_every``, ``merge_every``.

    Example::

        trainer = Trainer(callbacks=[TrajMergeCallback(capture_every=50, merge_every=500)])
        trainer.fit(module, train_loader, val_loader)
        load_merged(find_snapshot("lightning_logs/version_0/merged"), module)

    Raises:
        ValueError, TypeError: an option is wrong; at the start of ``fit`` also if there are no held-out data, no loss
            to take from the module, or a strategy that is not supported.
    """

    def __init__(
        self,
        heldout: Iterable[Any] | Mapping[str, Iterable[Any]] | None = None,
        nll: Callable[[nn.Module, Any], tuple[Any, Any]] | None = None,
        save_ckpt: bool = False,
        **config: Any,
    ) -> None:
        self.config = MergeConfig(**config)
        check_heldout([] if heldout is None else heldout, nll)
        if not isinstance(save_ckpt, bool):
            raise TypeError(f"save_ckpt={save_ckpt!r}: must be True or False")
        self.merger: TrajectoryMerger | None = None
        self._heldout = heldout
        self._nll = nll
        self._save_ckpt = save_ckpt
        self._options = config
        self._model: nn.Module = nn.Module()
        self._last_step = 0
        self._resumed = False
        self._loss_scale = LossScaleWatch()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(
                f"TrajMergeCallback of Lightning has no {name!r}; with transformers.Trainer take "
                "traj_merge_callback.transformers.TrajMergeCallback"
            )

    # The life of a run

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the merging state be written and removed together with the trainer's checkpoints."""
        self.teardown(trainer, pl_module, stage)  # which a fit that failed has not come to
        self._resumed = False
        ours = [callback for callback in trainer.callbacks if isinstance(callback, TrajMergeCallback)]
        check_side_by_side(callback.config for callback in ours)
        if stage == "fit":
            # Strategies that save in parts have no plugin to ask; they all have these methods, on every rank. The last
            # callback that is set up replaces them for all.
            strategy, replaced = trainer.strategy, vars(trainer.strategy)
            replaced["save_checkpoint"] = functools.partial(_save_checkpoint, ours, strategy.save_checkpoint)
            replaced["remove_checkpoint"] = functools.partial(_remove_checkpoint, ours, strategy.remove_checkpoint)
            loop = trainer.fit_loop
            vars(loop)["on_run_end"] = functools.partial(_merge_before, ours, loop.on_run_end)
            vars(loop)["run"] = functools.partial(_run, ours, trainer, loop.run)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Build the engine, read the held-out data, and take over the window of a resumed run."""
        self._last_step = trainer.global_step
        # Both may run collectives, so every rank asks.
        given = self._heldout if self._heldout is not None else validation_loaders(trainer)
        heldout, indices = by_loader(given)
        if trainer.is_global_zero:
            say_if_trained_on(heldout, trainer.train_dataloader)
            say_if_too_short(self.config, steps_of(trainer))
        default_folder = Path(trainer.log_dir or trainer.default_root_dir) / self.config.named("merged")
        self._model = unwrap(trainer.strategy.model or pl_module)
        if self._save_ckpt and has_fsdp(self._model):
            raise ValueError("save_ckpt=True is not supported under FSDP: load the snapshot with load_merged instead")
        # Not trainer.save_checkpoint: it waits for the other ranks, and its plugin may write later or elsewhere.
        dump = trainer._checkpoint_connector.dump_checkpoint
        extra = lambda: collect_checkpoint("merged.ckpt", dump(weights_only=True), pl_module)  # noqa: E731
        self.merger = TrajectoryMerger(
            heldout,
            nll=by_name(ValidationStep(trainer, pl_module).of, indices) if self._nll is None else self._nll,
            precision=trainer.precision_plugin.val_step_context,
            to_device=by_name(lambda index: functools.partial(transfer, trainer, index), indices),
            log=lambda record: log_merge(trainer, self.merger.records if self.merger else [record], self.config),
            log_eval=lambda record: log_eval(trainer, record),
            log_everywhere=True,
            extra=extra if self._save_ckpt else None,
            optimizer=trainer.optimizers,
            **{**self._options, "output_dir": self.config.output_dir or str(default_folder)},
        )
        prepare_for_images(trainer)
        self.merger.start(self._model)
        if self._resumed:
            self.merger.resume_from(lambda: self._saved_window(trainer), self._model, trainer.global_step)
            self._resumed = False
        let_wait(trainer, self.config.name)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Note the loss scale, from which a step that AMP skips can be told."""
        self._loss_scale.before_step(getattr(trainer.precision_plugin, "scaler", None))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Capture and merge if an optimizer step was taken and something is due."""
        step = trainer.global_step
        if self.merger is None or step == self._last_step:
            return
        self._last_step = step
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        self.merger.step(self._model, step, loss=loss, skipped=self._loss_scale.skipped)
        if others_may_write(trainer):
            self.merger.settle()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let a capture finish: other callbacks may put other weights into the module, such as an average of them."""
        if self.merger is not None:
            self.merger.settle()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let a capture finish: an epoch may begin with averaged weights."""
        if self.merger is not None:
            self.merger.settle()

    def _merge_at_end(self) -> None:
        if self.merger is not None:
            self.merger.merge_at_end(self._model)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Load the best snapshot if asked to, and release the window."""
        if self.merger is not None:
            self.merger.finish(self._model)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give up the merge under way, and finish what is being written."""
        if self.merger is not None:
            self.merger.close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the trainer's strategy, loop and callbacks their own methods back."""
        for name in ("save_checkpoint", "remove_checkpoint"):
            vars(trainer.strategy).pop(name, None)
        for name in ("run", "on_run_end"):
            vars(trainer.fit_loop).pop(name, None)
        stop_waiting(trainer)

    # The trainer's checkpoints

    def _beside(self, path: Any) -> Path | None:
        """The folder for a checkpoint's merging state; None for remote storage."""
        return None if "://" in str(path) else Path(self.config.named(f"{path}.merge"))

    def _saved_window(self, trainer: pl.Trainer) -> Path | None:
        """The state beside the checkpoint that training resumes from, also where that is a link (save_last="link").

        What a killed process has left half-written there is removed.
        """
        for path in (trainer.ckpt_path, Path(trainer.ckpt_path or "").resolve()):
            if (base := self._beside(path)) is None:
                continue
            remove_leftovers(base, "step-*")
            if (folder := base / folder_name_of_step(trainer.global_step)).is_dir():
                return folder
        return None

    @property
    def state_key(self) -> str:
        """By what the callback's part of a checkpoint is found again."""
        return (
            super().state_key if self.config.name == DEFAULT_NAME else self._generate_state_key(name=self.config.name)
        )

    def state_dict(self) -> dict[str, Any]:
        """Only the step; the rows are too large for the .ckpt and stand beside it."""
        return {"step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Note that the window is to be restored when training starts."""
        self._resumed = True


def _merge_before(ours: list[TrajMergeCallback], end: Callable[[], None]) -> None:
    """Merge once more if the last step was not due, before callbacks and module put other weights into the model.

    That is before the hooks of the end of training, in which averaging callbacks write. The trainer's last checkpoint
    is still of the live model.
    """
    for callback in ours:
        callback._merge_at_end()
    end()


def _run(ours: list[TrajMergeCallback], trainer: pl.Trainer, run: Callable[[], None]) -> None:
    """Train; where a checkpoint of the last step was resumed, there is nothing left to train but the merge at the end.

    Lightning calls no hook then while its loggers are open and the model is on its device.
    """
    run()
    for callback in ours if trainer.fit_loop.done else []:
        if callback._resumed:
            callback.on_train_start(trainer, trainer.lightning_module)
            callback._merge_at_end()


def _save_checkpoint(
    callbacks: list[TrajMergeCallback],
    save: Callable[..., None],
    checkpoint: dict[str, Any],
    filepath: Any,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Let the states be written while the trainer writes the checkpoint."""
    for callback in callbacks if "callbacks" in checkpoint else []:
        if callback.merger is not None:
            base = callback._beside(filepath)
            folder = None if base is None else base / folder_name_of_step(checkpoint["global_step"])
            # A checkpoint that is overwritten (last.ckpt) had a state of its own.
            callback.merger.save_state(folder, written=functools.partial(remove_other_states, folder))
    save(checkpoint, filepath, *args, **kwargs)


def _remove_checkpoint(callbacks: list[TrajMergeCallback], remove: Callable[..., None], filepath: Any) -> None:
    """Remove the checkpoint and the states beside it."""
    remove(filepath)
    for callback in callbacks:
        if (folder := callback._beside(filepath)) is None:
            continue
        if callback.merger is None:
            remove_tree(folder)
        else:
            callback.merger.remove_states(folder)
