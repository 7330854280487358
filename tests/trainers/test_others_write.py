"""Other people's code writes weights outside of ``optimizer.step``: rows hold the weights of their steps still."""

import time

import pytest
import torch
from conftest import AT_ONCE, same_weights, tiny_llama, train_steps
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from test_lightning import Module, fit
from test_transformers import make_trainer
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from traj_merge_callback import TrajectoryMerger
from traj_merge_callback.lightning import TrajMergeCallback as LightningCallback
from traj_merge_callback.transformers import TrajMergeCallback

OPTIONS = {"window_size": 3, "capture_every": 1, "merge_every": 4, "evaluations": 4, "heldout_batches": 2} | AT_ONCE
OPTIONS |= {"on_error": "raise", "keep_last": 0, "keep_best": False}


class ScheduleFree(torch.optim.SGD):
    """Keeps z beside the weights, which are y in train mode and x in eval mode; the way there and back rounds."""

    def __init__(self, parameters, lr, flagged):
        super().__init__(parameters, lr)
        self.mode = True
        if flagged:
            self.param_groups[0]["train_mode"] = True

    def change(self, mode, weight):
        if self.mode != mode:
            for parameter in self.param_groups[0]["params"]:
                if "z" in self.state[parameter]:
                    parameter.data.lerp_(self.state[parameter]["z"], weight)
        self.mode = mode
        if "train_mode" in self.param_groups[0]:
            self.param_groups[0]["train_mode"] = mode

    def train(self):
        self.change(True, 1 - 0.9)

    def eval(self):
        self.change(False, 1 - 1 / 0.9)

    @torch.no_grad()
    def step(self, closure=None):
        assert self.mode
        for parameter in self.param_groups[0]["params"]:
            z = self.state[parameter].setdefault("z", parameter.clone())
            z.add_(parameter.grad, alpha=-self.param_groups[0]["lr"])
            parameter.lerp_(z, 0.1)


def slow(window):
    """Let captures begin late, so that whoever writes without waiting is caught."""
    window._capture._worker.submit(time.sleep, 0.05)


class Slow(TrajMergeCallback):
    def on_step_end(self, *args, **kwargs):
        slow(self.merger.window)
        super().on_step_end(*args, **kwargs)


class EMA(TrainerCallback):
    """Swaps an average in when something is due, and back when the trainer begins the next step or ends."""

    def __init__(self):
        self.average, self.live = None, None

    def on_step_end(self, args, state, control, model, **kwargs):
        weights = [parameter.data for parameter in model.parameters()]
        self.average = [w.clone() for w in weights] if self.average is None else self.average
        torch._foreach_lerp_(self.average, weights, 0.1)
        if control.should_evaluate or control.should_save or control.should_training_stop:
            self.live = [w.clone() for w in weights]
            torch._foreach_copy_(weights, self.average)

    def on_step_begin(self, args, state, control, model, **kwargs):
        if self.live is not None:
            torch._foreach_copy_([parameter.data for parameter in model.parameters()], self.live)
            self.live = None


class Clipping(TrainerCallback):
    """Writes weights at every step, long before the next optimizer step."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        for parameter in model.parameters():
            parameter.data.clamp_(-0.05, 0.05)


def losses(records):
    return [(record.step, record.live_loss, record.merged_loss, record.weights) for record in records]


@pytest.mark.parametrize("position", ["before", "after"])
def test_an_average_swapped_in_by_a_callback_is_in_no_row(tmp_path, train, heldout, position):
    def run(callback):
        trainer = make_trainer(tmp_path, train, heldout, max_steps=6, save_strategy="no", gradient_accumulation_steps=1)
        others = [] if callback is None else [callback]
        if position == "before":
            for other in others:
                trainer.add_callback(other)
        ours = Slow(**OPTIONS).attach(trainer)
        if position == "after":
            for other in others:
                trainer.add_callback(other)
        trainer.train()
        return losses(ours.merger.records)

    assert run(None) == run(EMA())


def test_a_callback_that_writes_at_every_step_gets_into_no_capture(tmp_path, train, heldout):
    rows = {}

    class Noting(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model, **kwargs):
            rows[state.global_step + 1] = [p.detach().clone().flatten() for p in model.parameters()]

    trainer = make_trainer(tmp_path, train, heldout, max_steps=4, eval_strategy="no", save_strategy="no")
    trainer.add_callback(Clipping())
    trainer.add_callback(Noting())
    held = []

    class Keeping(Slow):
        def on_train_end(self, *args, **kwargs):
            window = self.merger.window
            held.extend((step, window.combine(row.numpy())) for step, row in zip(window.steps, torch.eye(3)))
            super().on_train_end(*args, **kwargs)

    Keeping(**OPTIONS).attach(trainer)
    trainer.train()
    for step, row in held:
        assert torch.equal(row, torch.cat(rows[step]))


@pytest.mark.parametrize("flagged", [True, False])
def test_schedule_free_optimizers_are_captured_as_they_are_evaluated(tmp_path, train, heldout, flagged):
    def run(merging):
        model = tiny_llama(dropout=0.0)
        trainer = make_trainer(
            tmp_path,
            train,
            heldout,
            model,
            max_steps=6,
            eval_steps=3,
            save_strategy="no",
            gradient_accumulation_steps=1,
        )
        trainer.optimizer = ScheduleFree(model.parameters(), 0.5, flagged)
        callback = Slow(**{**OPTIONS, "merge_every": 3}).attach(trainer) if merging else None
        trainer.train()
        return trainer, callback

    plain, _ = run(False)
    trainer, callback = run(True)
    assert same_weights(plain.model, trainer.model)
    # The trainer evaluates x at these steps: so do merges. Its loss is a mean over other sequences.
    trainer.model.eval()
    trainer.optimizer.eval()
    (last,) = callback.merger.records[-1:]
    live = callback.merger.heldout.evaluate(trainer.model, "report").loss
    assert last.step == 6
    assert live == pytest.approx(last.live_loss, abs=1e-6)


@pytest.mark.parametrize("flagged", [True, False])
def test_schedule_free_optimizers_in_a_plain_loop(tmp_path, train, heldout, flagged):
    def run(merging):
        model = tiny_llama(dropout=0.0)
        optimizer = ScheduleFree(model.parameters(), 0.5, flagged)
        merger = TrajectoryMerger(DataLoader(heldout, batch_size=8), output_dir=str(tmp_path), **OPTIONS)
        found = []

        def each(step):
            if merging and (record := merger.step(model, step)):
                weights = [parameter.detach().clone() for parameter in model.parameters()]
                optimizer.eval()
                found.append((merger.heldout.evaluate(model, "report").loss, record.live_loss))
                optimizer.train()
                torch._foreach_copy_([parameter.data for parameter in model.parameters()], weights)

        torch.manual_seed(0)
        train_steps(model, train, 8, each, optimizer=optimizer)
        merger.finish(model)
        return model, found

    (plain, _), (model, found) = run(False), run(True)
    assert same_weights(plain, model)
    assert len(found) == 2
    for expected, live in found:
        assert live == pytest.approx(expected, abs=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", [True, False])
def test_an_average_that_lightning_puts_in_at_the_end_is_not_merged_as_live(tmp_path, train, heldout, first):
    def run(*others):
        ours = LightningCallback(**{**OPTIONS, "capture_every": 2, "output_dir": str(tmp_path / "merged")})
        callbacks = [*others, ours] if first else [ours, *others]
        fit(tmp_path, train, heldout, *callbacks, module=Module(dropout=0.0), max_steps=5, accumulate_grad_batches=1)
        return losses(ours.merger.records)

    plain = run()
    assert plain[-1][0] == 5  # a step that was not captured when it was taken
    assert plain == run(EMAWeightAveraging(decay=0.5))


@pytest.mark.filterwarnings("ignore")
def test_hooks_of_the_module_that_write_get_into_no_capture(tmp_path, train, heldout):
    rows, held = {}, []

    class Writing(Module):
        def on_train_batch_start(self, batch, batch_idx):
            for parameter in self.parameters():
                parameter.data.clamp_(-0.05, 0.05)

    class Keeping(LightningCallback):
        def on_train_batch_end(self, trainer, module, *args):
            slow(self.merger.window)
            rows[trainer.global_step] = [p.detach().clone().flatten() for p in module.parameters()]
            super().on_train_batch_end(trainer, module, *args)

        def on_fit_end(self, *args):
            window = self.merger.window
            held.extend((step, window.combine(row.numpy())) for step, row in zip(window.steps, torch.eye(3)))
            super().on_fit_end(*args)

    callback = Keeping(**{**OPTIONS, "output_dir": str(tmp_path / "merged")})
    fit(tmp_path, train, heldout, callback, module=Writing(), max_steps=4, accumulate_grad_batches=1)
    assert len(held) == 3
    for step, row in held:
        assert torch.equal(row, torch.cat(rows[step]))


@pytest.mark.filterwarnings("ignore")
def test_monitors_of_merges_wait_for_merges(tmp_path, train, heldout):
    stopping = EarlyStopping(monitor="merge/loss", patience=1)
    checkpoint = ModelCheckpoint(
        tmp_path / "ckpt", monitor="merge/loss", every_n_train_steps=1, save_top_k=-1, save_last=True
    )
    ours = LightningCallback(**{**OPTIONS, "merge_every": 6, "output_dir": str(tmp_path / "merged")})
    options = {"max_steps": 14, "val_check_interval": 1, "accumulate_grad_batches": 1, "limit_val_batches": 1}
    trainer, _ = fit(tmp_path, train, heldout, ours, stopping, checkpoint, **options)
    # Validated 5 times before the first merge, and 5 times between two: neither counts against patience.
    assert trainer.global_step == 14
    assert [record.step for record in ours.merger.records] == [6, 12, 14]
    steps = [int(path.split("step=")[1].split(".")[0].split("-")[0]) for path in checkpoint.best_k_models]
    assert min(steps) >= 6
    scores = {round(float(score), 4) for score in checkpoint.best_k_models.values()}
    assert scores <= {round(record.merged_loss, 4) for record in ours.merger.records}
    assert (tmp_path / "ckpt" / "last.ckpt").exists()
