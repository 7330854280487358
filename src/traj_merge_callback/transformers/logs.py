"""Logging through a trainer without changing what it does next, or logs itself."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerControl, TrainerState

from ..config import MergeConfig
from ..metrics import MergeRecord, for_console
from .images import log_image

_FLAGS = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")


def log_merge(
    trainer: Trainer | None,
    state: TrainerState,
    control: TrainerControl,
    records: Sequence[MergeRecord],
    config: MergeConfig,
) -> None:
    """Log the last of a run's merges: its numbers, a line, and an image of the weights of all.

    Args:
        trainer: None: it is not known; numbers then go to ``trainer_state.json`` only.
        state, control: of the training.
        records: of the run's merges.
        config: the options.
    """
    record = records[-1]
    _log(trainer, state, control, record.scalars(details=config.log_details), record.line())
    if trainer is not None:
        log_image(trainer, records)


def log_eval(trainer: Trainer | None, state: TrainerState, control: TrainerControl, record: MergeRecord) -> None:
    """Log what ``on_publish`` found in the snapshot of a merge; see :func:`log_merge`."""
    _log(trainer, state, control, record.eval_scalars(), record.eval_line())


def _log(
    trainer: Trainer | None, state: TrainerState, control: TrainerControl, scalars: dict[str, float], line: str
) -> None:
    if trainer is not None:
        with preserved_flags(control), preserved_averages(trainer), one_line(trainer, line):
            trainer.log(scalars)
        return
    state.log_history.append({**scalars, "epoch": state.epoch, "step": state.global_step})
    if state.is_world_process_zero:
        tqdm.write(for_console(line))


@contextmanager
def preserved_flags(control: TrainerControl) -> Iterator[None]:
    """Logging clears ``should_log``; what the trainer has still to do at this step must stay to be done."""
    flags = {name: getattr(control, name) for name in _FLAGS}
    try:
        yield
    finally:
        for name, value in flags.items():
            setattr(control, name, value or getattr(control, name))


@contextmanager
def preserved_averages(trainer: Trainer) -> Iterator[None]:
    """TRL's trainers add running averages since the last log to each log and clear them; ours is not their turn."""
    averages = getattr(trainer, "_metrics", None)
    if not isinstance(averages, dict):
        yield
        return
    trainer._metrics = {mode: {} for mode in averages}
    try:
        yield
    finally:
        trainer._metrics = averages


@contextmanager
def one_line(trainer: Trainer, line: str) -> Iterator[None]:
    """What transformers' own callbacks print of a log is this line, and not the dictionary of all that is logged.

    Callbacks that show logs in another way show them as always; where nothing prints, nothing is printed.
    """
    printing = (PrinterCallback.on_log, ProgressCallback.on_log)
    callbacks = [one for one in trainer.callback_handler.callbacks if type(one).on_log in printing]
    for callback in callbacks:
        vars(callback).setdefault("on_log", functools.partial(_print, callback, for_console(line)))
    try:
        yield
    finally:
        for callback in callbacks:
            if getattr(vars(callback).get("on_log"), "func", None) is _print:
                del callback.on_log


def _print(callback: Any, line: str, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
    """Where and on which ranks the callback itself prints."""
    if isinstance(callback, PrinterCallback):
        if state.is_local_process_zero:
            print(line)
    elif state.is_world_process_zero and callback.training_bar is not None:
        callback.training_bar.write(line)
