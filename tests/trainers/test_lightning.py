"""The Lightning callback in whole training runs."""

import csv
import time

import lightning.pytorch as pl
import pytest
import torch
from conftest import AT_ONCE, overflow_at, same_weights, tiny_llama, warnings_of
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from traj_merge_callback import find_snapshot, load_merged
from traj_merge_callback.evaluate.language_model import language_model_nll
from traj_merge_callback.lightning import TrajMergeCallback

OPTIONS = {"window_size": 4, "capture_every": 2, "merge_every": 4, "evaluations": 5, "heldout_batches": 4} | AT_ONCE


class Module(pl.LightningModule):
    """A language model whose validation leaves as many traces as validation steps do."""

    def __init__(self, dropout: float = 0.1, returns: str = "loss") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = tiny_llama(dropout=dropout)
        self.metric = MeanMetric()
        self.seen: list[float] = []

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.metric(loss)
        self.seen.append(float(loss))
        self.log("val_loss", loss)
        self.log("val_metric", self.metric, on_epoch=True)
        if self.logger is not None and isinstance(self.logger, TensorBoardLogger):
            self.logger.experiment.add_scalar("by_hand", float(loss), self.global_step)
        return {"loss": loss, "dict": {"loss": loss}, "logged": None}[self.hparams.returns]

    def on_validation_epoch_end(self):
        self.log("val_seen", float(len(self.seen)))
        self.seen.clear()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def fit(tmp_path, train, heldout, *callbacks, module=None, ckpt_path=None, logger=None, shuffle=True, **options):
    pl.seed_everything(0, verbose=False)
    defaults = {
        "max_steps": 10,
        "accelerator": "cpu",
        "accumulate_grad_batches": 2,
        "val_check_interval": 6,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 2,
        "log_every_n_steps": 3,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    }
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        logger=CSVLogger(tmp_path, name="logs") if logger is None else logger,
        callbacks=list(callbacks),
        **{**defaults, **options},
    )
    module = module or Module()
    val = None if heldout is None else DataLoader(heldout, batch_size=8, shuffle=shuffle)
    trainer.fit(module, DataLoader(train, batch_size=4, shuffle=shuffle), val, ckpt_path=ckpt_path)
    return trainer, module


def merging(tmp_path, **options):
    return TrajMergeCallback(**{**OPTIONS, "on_error": "raise", "output_dir": str(tmp_path / "merged"), **options})


def rows(tmp_path, merges):
    """Rows of the CSV log: the trainer's own, or those of merges."""
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as file:
        found = [{k: v for k, v in row.items() if v != ""} for row in csv.DictReader(file)]
    return [row for row in found if ("merge/loss" in row) is merges]


@pytest.mark.filterwarnings("ignore:.*shuffle.*")
@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.5}])
@pytest.mark.parametrize("returns", ["loss", "dict", "logged"])
@pytest.mark.parametrize("merge", [{}, {"row": "mean", "samples_per_row": 2, "groups": "blocks", "evaluations": 14}])
def test_the_run_is_untouched_and_its_own_logs_are_complete(caplog, tmp_path, train, heldout, options, returns, merge):
    _, plain = fit(tmp_path / "plain", train, heldout, module=Module(returns=returns), **options)
    callback = merging(tmp_path, **merge)
    _, module = fit(tmp_path / "merging", train, heldout, callback, module=Module(returns=returns), **options)
    assert same_weights(plain, module)
    # Training loss, validation loss, a torchmetrics object and a list on the module: the same values as without.
    assert rows(tmp_path / "plain", merges=False) == rows(tmp_path / "merging", merges=False)
    # Gradient accumulation: steps are optimizer steps. The last step is merged although it was not due.
    assert [record.step for record in callback.merger.records] == [4, 8, 10]
    assert [int(row["step"]) for row in rows(tmp_path / "merging", merges=True)] == [4, 8, 10]
    # The search took gradients through the module's own validation_step.
    # A forward pass costs 1, one with a gradient 3. Later merges may race rows first, each on a part of the split.
    first = callback.merger.records[0]
    assert first.forward_equivalents > first.evaluations
    assert "could not search with gradients" not in caplog.text


def test_metrics_reach_every_logger_and_the_callbacks_that_monitor_them(tmp_path, train, heldout):
    loggers = [TensorBoardLogger(tmp_path, name="board"), CSVLogger(tmp_path, name="csv")]
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", monitor="merge/loss", every_n_train_steps=2, save_top_k=2)
    stopping = EarlyStopping(monitor="merge/gain", mode="max", patience=50)
    callback = merging(tmp_path)
    trainer, _ = fit(tmp_path, train, heldout, callback, checkpoint, stopping, logger=loggers)
    (events,) = (tmp_path / "board").rglob("events*")
    board = EventAccumulator(str(events)).Reload()
    assert {"merge/loss", "merge_details/gain_stderr", "merge_details/weight/0", "train_loss"} <= set(
        board.Tags()["scalars"]
    )
    expected = {record.step: pytest.approx(record.merged_loss, rel=1e-6) for record in callback.merger.records}
    assert {event.step: event.value for event in board.Scalars("merge/loss")} == expected
    assert [int(row["step"]) for row in rows(tmp_path / "csv", merges=True)] == [4, 8, 10]
    last = callback.merger.records[-1]
    assert float(trainer.callback_metrics["merge/loss"]) == pytest.approx(last.merged_loss)
    assert trainer.progress_bar_metrics["merge/gain"] == pytest.approx(last.gain)
    # Before the first merge no checkpoint is ranked; afterwards each by the last merge.
    scores = {
        int(path.split("step=")[1].split(".")[0]): float(score) for path, score in checkpoint.best_k_models.items()
    }
    assert set(scores) <= {8, 10}
    assert scores[8] == pytest.approx(next(r for r in callback.merger.records if r.step == 8).merged_loss)
    # What a validation_step writes to its logger by hand is not written while we evaluate.
    by_hand = [event.step for event in board.Scalars("by_hand")]
    assert len(by_hand) == 2 + 2 * (20 // 6)


def test_named_domains_and_an_nll_of_ones_own(tmp_path, train, heldout):
    def nll(module, batch):
        return language_model_nll(module.model, batch)

    domains = {"code": DataLoader(heldout, batch_size=8), "seen": DataLoader(train, batch_size=8)}
    callback = merging(tmp_path, heldout=domains, nll=nll, report_only=["seen"])
    fit(tmp_path, train, None, callback, limit_val_batches=0, val_check_interval=None)
    record = callback.merger.records[-1]
    assert record.domains.keys() == {"code", "seen"}
    assert record.merged_loss == record.domains["code"]["merged_loss"]


class TwoLoaders(Module):
    def val_dataloader(self):
        return [DataLoader(blocks, batch_size=8) for blocks in self.heldout]

    def validation_step(self, batch, batch_idx, dataloader_idx):
        return self.model(**batch).loss


def test_several_validation_loaders_are_named_by_their_index(tmp_path, train, heldout):
    module = TwoLoaders()
    module.heldout = (heldout, train)
    callback = merging(tmp_path)
    fit(tmp_path, train, None, callback, module=module)
    assert callback.merger.records[-1].domains.keys() == {"0", "1"}


def test_a_snapshot_loads_into_the_module_and_as_a_lightning_checkpoint(tmp_path, train, heldout):
    callback = merging(tmp_path, save_ckpt=True, load_merged_at_end=True)
    _, trained = fit(tmp_path, train, heldout, callback, module=Module(dropout=0.05))
    best = find_snapshot(tmp_path / "merged")
    module = Module()
    load_merged(best, module)
    assert same_weights(module, trained)
    from_ckpt = Module.load_from_checkpoint(best / "merged.ckpt")
    assert same_weights(module, from_ckpt)
    assert from_ckpt.hparams.dropout == 0.05
    best_record = min(callback.merger.records, key=lambda record: record.merged_loss)
    assert best_record.snapshot == str(best)
    # The loss of the reloaded module on the split that was reported on.
    found = callback.merger.heldout.evaluate(trained, "report")
    assert found.loss == pytest.approx(best_record.merged_loss, abs=1e-6)


@pytest.mark.parametrize("link", [True, "link"])
def test_resuming_gives_the_merges_of_an_uninterrupted_run(tmp_path, train, heldout, link):
    def run(folder, ckpt_path=None, max_steps=12):
        callback = merging(folder)
        checkpoint = ModelCheckpoint(folder / "ckpt", every_n_train_steps=6, save_top_k=-1, save_last=link)
        short = torch.utils.data.Subset(train, range(48))  # 12 batches, 6 optimizer steps an epoch
        _, module = fit(
            folder,
            short,
            heldout,
            callback,
            checkpoint,
            module=Module(dropout=0.0),
            ckpt_path=ckpt_path,
            shuffle=False,
            max_steps=max_steps,
        )
        return module, callback.merger.records

    whole, records = run(tmp_path / "a")
    run(tmp_path / "b", max_steps=6)
    rows_on_disk = sorted((tmp_path / "b" / "ckpt").rglob("row-*"))
    assert rows_on_disk
    (ckpt,) = (path for path in (tmp_path / "b" / "ckpt").glob("*step=6.ckpt"))
    assert "rows" not in str(torch.load(ckpt, weights_only=False)["callbacks"])
    resumed, rest = run(tmp_path / "b", ckpt_path=tmp_path / "b" / "ckpt" / "last.ckpt")
    assert same_weights(whole, resumed)
    assert [record.step for record in records] == [4, 8, 12]
    assert [record.step for record in rest] == [8, 12]
    for one, other in zip(records[1:], rest, strict=True):
        for name in ("checkpoint_steps", "weights", "live_loss", "merged_loss", "evaluations"):
            assert getattr(one, name) == getattr(other, name)


def test_the_trainers_last_checkpoint_is_of_the_live_model_and_has_its_window(tmp_path, train, heldout):
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=100, save_last=True)  # saves when training ends
    callback = merging(tmp_path, load_merged_at_end=True)
    _, module = fit(tmp_path, train, heldout, callback, checkpoint)
    _, plain = fit(tmp_path / "plain", train, heldout)
    live = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=False)["state_dict"]
    assert all(torch.equal(value, live[name]) for name, value in plain.state_dict().items())
    assert (tmp_path / "ckpt" / "last.ckpt.merge" / "step-00000010" / "state.json").exists()
    best = Module()
    load_merged(callback.merger.best_snapshot, best)
    assert same_weights(best, module)


def test_the_window_goes_with_its_checkpoint(tmp_path, train, heldout):
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=2, save_top_k=1, save_last=True)
    trainer, _ = fit(tmp_path, train, heldout, merging(tmp_path), checkpoint)
    ckpts = {path.name for path in (tmp_path / "ckpt").glob("*.ckpt")}
    windows = {path.name.removesuffix(".merge") for path in (tmp_path / "ckpt").glob("*.merge")}
    assert ckpts == windows
    assert len(ckpts) == 2
    assert [path.name for path in (tmp_path / "ckpt" / "last.ckpt.merge").iterdir()] == ["step-00000010"]
    assert type(trainer.strategy.checkpoint_io).__name__ == "TorchCheckpointIO"
    size = {path.name: path.stat().st_size for path in (tmp_path / "ckpt").glob("*.ckpt")}
    _, _ = fit(tmp_path / "plain", train, heldout, ModelCheckpoint(tmp_path / "plain", save_last=True))
    assert size["last.ckpt"] < 1.2 * (tmp_path / "plain" / "last.ckpt").stat().st_size


def test_a_missing_window_is_said_once_and_training_resumes(tmp_path, train, heldout, caplog):
    fit(tmp_path, train, heldout, ModelCheckpoint(tmp_path, filename="x", every_n_train_steps=4), max_steps=4)
    callback = merging(tmp_path, on_error="warn")
    fit(tmp_path, train, heldout, callback, ckpt_path=tmp_path / "x.ckpt")
    assert [record.step for record in callback.merger.records] == [8, 10]


def test_steps_that_amp_skips_are_not_captured(tmp_path, train, heldout):
    module = Module(dropout=0.0)
    overflow_at(module.model, {1, 2, 4, 6})
    callback = merging(tmp_path, row="last")
    fit(
        tmp_path,
        train,
        heldout,
        callback,
        module=module,
        plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0))],
        accumulate_grad_batches=1,
        max_steps=8,
    )
    # Captures were due at 2, 4, 6 and 8, merges at 4 and 8: what fell on a skipped step was done at the next real one.
    assert callback.merger.records[-1].checkpoint_steps == [3, 5, 7, 8]
    assert [record.step for record in callback.merger.records] == [5, 8]


class NoValidation(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = tiny_llama()

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


def test_nothing_to_measure_is_an_error_before_training(tmp_path, train, heldout):
    bare = {"limit_val_batches": 0, "val_check_interval": None}
    with pytest.raises(ValueError, match="no held-out data: pass heldout="):
        fit(tmp_path, train, None, merging(tmp_path), **bare)
    with pytest.raises(ValueError, match="NoValidation has no validation_step; define one, or pass nll="):
        fit(tmp_path, train, None, merging(tmp_path, heldout=[{}]), module=NoValidation(), **bare)
    with pytest.raises(ValueError, match="yields no batches"):
        fit(tmp_path, train, None, merging(tmp_path, heldout=[]), **bare)


def test_it_can_be_built_from_yaml(tmp_path):
    (tmp_path / "config.yaml").write_text(
        f"""
trainer:
  logger: false
  default_root_dir: {tmp_path}
  callbacks:
    - class_path: traj_merge_callback.lightning.TrajMergeCallback
      init_args:
        capture_every: 5
        merge_every: 20
        search: ema
        search_options: {{decay: 0.9}}
        report_only: [law]
        save_ckpt: true
"""
    )
    cli = LightningCLI(
        Module,
        run=False,
        save_config_callback=None,
        args=["--config", str(tmp_path / "config.yaml")],
        seed_everything_default=0,
    )
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, TrajMergeCallback))
    assert (callback.config.capture_every, callback.config.search_options) == (5, {"decay": 0.9})
    assert callback.config.report_only == ["law"]


@pytest.mark.filterwarnings("ignore:.*shuffle.*")
@pytest.mark.parametrize("merge", [{}, {"row": "mean", "samples_per_row": 2, "groups": "blocks", "evaluations": 14}])
def test_merges_spread_over_steps_leave_the_run_untouched(tmp_path, train, heldout, merge):
    _, plain = fit(tmp_path / "plain", train, heldout, module=Module(), max_steps=40)
    callback = merging(tmp_path, schedule="interleaved", max_pause=1e-6, **merge)
    _, module = fit(tmp_path / "merging", train, heldout, callback, module=Module(), max_steps=40)
    assert same_weights(plain, module)
    assert rows(tmp_path / "plain", merges=False) == rows(tmp_path / "merging", merges=False)
    records = callback.merger.records
    assert records[0].step <= 6  # as soon as it is known what pieces take
    assert records[-1].step == 40
    assert any(record.finished_step > record.step for record in records)
    # Loggers show a merge at the step of its checkpoint.
    assert [int(row["step"]) for row in rows(tmp_path / "merging", merges=True)] == [record.step for record in records]


def test_an_interrupted_run_leaves_no_thread_and_no_half_written_file(tmp_path, train, heldout, our_threads):
    class Interrupt(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 6:
                raise KeyboardInterrupt

    callback = merging(tmp_path, schedule="interleaved", max_pause=1e-6)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, train, heldout, callback, Interrupt())
    assert our_threads() == []
    assert not list((tmp_path / "merged").glob(".*"))


@pytest.mark.filterwarnings("ignore:.*shuffle.*")
def test_weights_swapped_in_for_validation_do_not_get_into_a_capture(tmp_path, train, heldout):
    class Slow(TrajMergeCallback):
        def on_train_batch_end(self, *args):
            if self.merger.window is not None:
                self.merger.window._capture._worker.submit(time.sleep, 0.05)
            super().on_train_batch_end(*args)

    class Patient(Module):
        def on_validation_epoch_start(self):
            time.sleep(0.4)  # with the averaged weights in place

    found = []
    for name, others in (("plain", []), ("averaging", [EMAWeightAveraging(decay=0.5)])):
        options = {**OPTIONS, "merge_every": 8, "on_error": "raise", "output_dir": str(tmp_path / name / "merged")}
        callback = Slow(**options)
        fit(tmp_path / name, train, heldout, callback, *others, module=Patient(), val_check_interval=4)
        found.append([(r.step, r.weights, r.live_loss, r.merged_loss) for r in callback.merger.records])
    assert found[0] == found[1]


class BlowsUp(pl.Callback):
    """Before some batch the weights are no longer what training made of them."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 50:
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.mul_(3.0)


def test_a_spike_is_rolled_back_where_that_is_asked_for(tmp_path, train, heldout, caplog):
    options = {**OPTIONS, "on_spike": "rollback", "merge_every": 8}
    callback = TrajMergeCallback(**options)
    trainer, _ = fit(tmp_path, train, heldout, callback, BlowsUp(), max_steps=40, limit_val_batches=4)
    (said,) = [message for message in warnings_of(caplog) if "rolled back" in message]
    assert "merge of step 24" in said
    records = callback.merger.records
    assert [record.rollbacks for record in records] == [0, 0, 0, 1, 1]
    assert records[-1].live_loss < records[1].live_loss
    assert trainer.logged_metrics["merge_details/rollbacks"] == 1
