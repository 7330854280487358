"""Beside what else a run has: the trainers' own features and other people's callbacks, before and after ours."""

import lightning.pytorch as pl
import pytest
import torch
from conftest import same_weights, tiny_llama
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from test_lightning import Module, fit, merging
from test_others_write import EMA
from test_transformers import OPTIONS, make_trainer, own_logs
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, TrainerCallback

from traj_merge_callback import HeldOutLoss, find_snapshot, load_merged
from traj_merge_callback.transformers import TrajMergeCallback


def check_reported(record, heldout, model):
    """The snapshot of a merge has the loss that was reported for it."""
    load_merged(record.snapshot, model)
    loss = HeldOutLoss(DataLoader(heldout, batch_size=8), batches=OPTIONS["heldout_batches"])
    language_model = model.model if isinstance(model, pl.LightningModule) else model
    assert loss.evaluate(language_model, "report").loss == pytest.approx(record.merged_loss, abs=1e-5)


# transformers.Trainer


class Evaluating(TrainerCallback):
    """Evaluates in the middle of training, as people do to look at a run."""

    def __init__(self):
        self.trainer, self.losses = None, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (3, 8):
            self.losses.append(self.trainer.evaluate()["eval_loss"])


def short_of_memory(module, args, kwargs):
    if module.training and len(kwargs["input_ids"]) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def finds_its_batch_size(trainer):
    trainer.model.register_forward_pre_hook(short_of_memory, with_kwargs=True)
    trainer.train()
    assert trainer._train_batch_size == 2


def trains_twice(trainer):
    trainer.train()
    trainer.evaluate()
    trainer.train()


BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_total_limit": 1}
# By name: arguments of the trainer, other callbacks, how it trains.
TRANSFORMERS = {
    "finds its batch size": ({"auto_find_batch_size": True}, [], finds_its_batch_size),
    "loads the best model": (BEST, [], None),
    "keeps one checkpoint": ({"save_total_limit": 1, "save_steps": 1}, [], None),
    "noise in embeddings": ({"neftune_noise_alpha": 5.0}, [], None),
    "an average": ({}, [EMA], None),
    "evaluates in between": ({}, [Evaluating], None),
    "stops early": (BEST, [lambda: EarlyStoppingCallback(1, 10.0)], None),
    "trains twice": ({}, [], trains_twice),
    "clips, checkpoints activations": ({"max_grad_norm": 0.1, "gradient_checkpointing": True}, [], None),
}


# Where they stand matters only where there are other callbacks.
PLACED = [(case, "before") for case in TRANSFORMERS] + [
    (case, "after") for case in TRANSFORMERS if TRANSFORMERS[case][1]
]


@pytest.mark.parametrize(("case", "position"), PLACED)
def test_transformers(tmp_path, train, heldout, case, position):
    arguments, others, how = TRANSFORMERS[case]

    def run(name, ours):
        trainer = make_trainer(tmp_path / name, train, heldout, **arguments)
        made = [make() for make in others]
        for position_of_ours in ("before", "after"):
            if ours is not None and position_of_ours != position:
                ours.attach(trainer)
            for other in made if position_of_ours == position else []:
                other.trainer = trainer
                trainer.add_callback(other)
        (how or type(trainer).train)(trainer)
        return trainer, [getattr(other, "losses", None) for other in made]

    plain, seen = run("plain", None)
    ours = TrajMergeCallback(on_error="raise", **OPTIONS)
    trainer, seen_beside_ours = run("merging", ours)
    assert same_weights(plain.model, trainer.model)
    assert own_logs(plain) == own_logs(trainer)
    assert seen == seen_beside_ours
    last = ours.merger.records[-1]
    assert last.step == trainer.state.global_step
    check_reported(last, heldout, tiny_llama())


# Lightning


class Validating(pl.Callback):
    """Sets the module to eval mode and evaluates it between steps, by hand."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx % 3 == 0:
            pl_module.eval()
            with torch.no_grad():
                self.losses.append(float(pl_module.model(**batch).loss))
            pl_module.train()


LIGHTNING = {
    "an average": ({}, [lambda: EMAWeightAveraging(decay=0.9, update_starting_at_step=2)]),
    "stochastic weight averaging": (
        {"max_steps": -1, "max_epochs": 3, "limit_train_batches": 8},
        [lambda: StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)],
    ),
    "evaluates in between": ({}, [Validating]),
    "changes its accumulation": (
        {"accumulate_grad_batches": 1, "max_steps": -1, "max_epochs": 3, "limit_train_batches": 8},
        [lambda: GradientAccumulationScheduler({0: 1, 1: 2})],
    ),
    "stops early": ({}, [lambda: EarlyStopping("val_loss", patience=0, min_delta=10.0)]),
    "keeps one checkpoint": ({}, [lambda: ModelCheckpoint(monitor="val_loss", save_top_k=1, save_last=True)]),
}


@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("case", LIGHTNING)
def test_lightning(tmp_path, train, heldout, case, position):
    arguments, others = LIGHTNING[case]

    def run(name, *ours):
        made = [make() for make in others]
        callbacks = [*made, *ours] if position == "before" else [*ours, *made]
        trainer, module = fit(tmp_path / name, train, heldout, *callbacks, **arguments)
        kept = {
            key: value
            for key, value in trainer.callback_metrics.items()
            if not key.startswith(("merge/", "merge_details/"))
        }
        return trainer, module, kept, [getattr(other, "losses", None) for other in made]

    _, plain, logged, seen = run("plain")
    ours = merging(tmp_path)
    trainer, module, logged_beside_ours, seen_beside_ours = run("merging", ours)
    assert same_weights(plain, module)
    assert logged == logged_beside_ours
    assert seen == seen_beside_ours
    last = ours.merger.records[-1]
    assert last.step == trainer.global_step
    check_reported(last, heldout, Module())


def test_one_lightning_callback_in_two_fits_with_a_validation_between(tmp_path, train, heldout):
    def run(*ours):
        _, module = fit(tmp_path / f"{len(ours)}-first", train, heldout, *ours, max_steps=6)
        pl.Trainer(accelerator="cpu", logger=False, callbacks=list(ours), enable_progress_bar=False).validate(
            module, DataLoader(heldout, batch_size=8), verbose=False
        )
        steps = [ours[0].merger.records[-1].step] if ours else []
        _, module = fit(tmp_path / f"{len(ours)}-second", train, heldout, *ours, module=module, max_steps=8)
        return module, steps

    plain, _ = run()
    ours = merging(tmp_path)
    module, steps = run(ours)
    assert same_weights(plain, module)
    assert [*steps, ours.merger.records[-1].step] == [6, 8]
    assert find_snapshot(tmp_path / "merged", "latest").name == "step-00000008"
