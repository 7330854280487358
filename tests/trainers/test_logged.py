"""What a merge shows: one line on the console, all numbers in the loggers, and a heat map of the weights."""

import contextlib
import io
import logging
import re
import sys

import lightning.pytorch as pl
import pytest
import torch
from conftest import AT_ONCE, same_weights, tiny_llama, train_steps
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments

import traj_merge_callback.lightning
import traj_merge_callback.transformers
from traj_merge_callback import TrajectoryMerger
from traj_merge_callback.offline.report import image

OPTIONS = {"window_size": 4, "capture_every": 2, "merge_every": 4, "evaluations": 5, "heldout_batches": 4} | AT_ONCE
LINE = re.compile(
    r"merge at step (\d+): (live \d\.\d{4} → merged \d\.\d{4}, gain -?\d\.\d{4} ± \d\.\d{4}|"
    r"live \d\.\d{4}, no merge is better); \S+ s, longest pause \S+ s"
)


def hf_trainer(tmp_path, train, heldout, **arguments):
    options = {"max_steps": 8, "learning_rate": 3e-3, "per_device_train_batch_size": 4, "logging_steps": 2}
    options |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "seed": 3}
    arguments = TrainingArguments(str(tmp_path), **{**options, **arguments})
    return Trainer(tiny_llama(), arguments, train_dataset=train, eval_dataset=heldout)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = tiny_llama()

    def training_step(self, batch):
        return self.model(**batch).loss

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def fit(tmp_path, train, heldout, callbacks, **options):
    pl.seed_everything(0)
    module = Module()
    quiet = {"enable_model_summary": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options = {"max_steps": 8, "accelerator": "cpu", "logger": False, **quiet, **options}
    trainer = pl.Trainer(default_root_dir=tmp_path, callbacks=callbacks, **options)
    loaders = DataLoader(train, batch_size=4, shuffle=True), DataLoader(heldout, batch_size=8)
    trainer.fit(module, *loaders)
    return module


def images_in(folder, name):
    """The images of a name in TensorBoard's files, by step."""
    (file,) = folder.rglob("events*")
    events = EventAccumulator(str(file)).Reload()
    return {event.step: Image.open(io.BytesIO(event.encoded_image_string)) for event in events.Images(name)}, events


def colors(image):
    return {pixel for _, pixel in image.convert("RGB").getcolors(1 << 20)}


@pytest.mark.parametrize("how", ["attach", "callbacks"])
@pytest.mark.parametrize("bar", [False, True])
def test_with_transformers_the_console_has_a_line_and_the_history_all_numbers(
    tmp_path, train, heldout, capfd, how, bar
):
    trainer = hf_trainer(tmp_path, train, heldout, disable_tqdm=not bar)
    callback = traj_merge_callback.transformers.TrajMergeCallback(
        DataLoader(heldout, batch_size=8), on_error="raise", **OPTIONS
    )
    callback.attach(trainer) if how == "attach" else trainer.add_callback(callback)
    trainer.train()
    told = "".join(capfd.readouterr())
    assert [int(found[1]) for found in LINE.finditer(told)] == [4, 8]
    assert "merge/" not in told
    assert told.count("'grad_norm'") == 4  # what the trainer logs itself is printed as ever
    logged = [log for log in trainer.state.log_history if "merge/loss" in log]
    scalars = callback.merger.records[-1].scalars()
    assert len(scalars) > 15
    assert {name: logged[-1][name] for name in scalars} == scalars


def test_callbacks_that_print_logs_in_their_own_way_get_all_of_them(tmp_path, train, heldout):
    class Own(PrinterCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    seen = []
    trainer = hf_trainer(tmp_path, train, heldout)
    trainer.add_callback(Own)
    traj_merge_callback.transformers.TrajMergeCallback(on_error="raise", **OPTIONS).attach(trainer)
    trainer.train()
    assert [logs["merge_details/step"] for logs in seen if "merge/gain" in logs] == [4, 8]


def test_a_trainer_that_prints_nothing_stays_silent(tmp_path, train, heldout, capfd):
    trainer = hf_trainer(tmp_path, train, heldout, disable_tqdm=True)
    trainer.remove_callback(PrinterCallback)
    traj_merge_callback.transformers.TrajMergeCallback(on_error="raise", **OPTIONS).attach(trainer)
    trainer.train()
    assert "merge" not in capfd.readouterr().out


@pytest.mark.parametrize("bar", [False, True])
def test_with_lightning_the_console_has_a_line(tmp_path, train, heldout, capfd, bar):
    callback = traj_merge_callback.lightning.TrajMergeCallback(on_error="raise", **OPTIONS)
    fit(tmp_path, train, heldout, [callback], enable_progress_bar=bar)
    assert [int(found[1]) for found in LINE.finditer("".join(capfd.readouterr()))] == [4, 8]


def test_in_a_loop_of_ones_own_the_log_has_a_line(tmp_path, train, loader, caplog):
    model, seen = tiny_llama(), []
    options = {**OPTIONS, "output_dir": str(tmp_path / "merged"), "on_error": "raise", "name": "late"}
    with caplog.at_level(logging.INFO, "traj_merge_callback"):
        merger = TrajectoryMerger(loader, log=seen.append, **options)
        train_steps(model, train, 8, lambda step: merger.step(model, step))
        merger.finish(model)
    lines = [one.getMessage() for one in caplog.records if one.getMessage().startswith("late at step")]
    assert lines == [record.line() for record in seen]
    assert len(lines) == 2
    assert LINE.fullmatch(lines[0].replace("late", "merge"))


def test_a_console_without_the_signs_of_the_line_is_no_failure(tmp_path, train, heldout):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stdout(console):
        callback = traj_merge_callback.lightning.TrajMergeCallback(on_error="raise", **OPTIONS)
        fit(tmp_path, train, heldout, [callback])
    console.flush()
    assert console.buffer.getvalue().decode().count("merge at step") == 2


def test_tensorboard_has_the_weights_as_an_image_with_transformers(tmp_path, train, heldout, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    plain = hf_trainer(tmp_path, train, heldout)
    plain.train()
    trainer = hf_trainer(tmp_path, train, heldout, report_to="tensorboard")
    callback = traj_merge_callback.transformers.TrajMergeCallback(on_error="raise", **OPTIONS).attach(trainer)
    trainer.train()
    assert same_weights(plain.model, trainer.model)
    images, events = images_in(tmp_path / "board", "train/merge/weights")
    assert images.keys() == {4, 8}
    assert len(colors(images[8])) > 10
    expected = image.weights_image(callback.merger.records)
    assert images[8].size == (expected.shape[1], expected.shape[0])
    assert {f"train/{name}" for name in callback.merger.records[-1].scalars()} <= set(events.Tags()["scalars"])


def test_tensorboard_has_the_weights_as_an_image_with_lightning(tmp_path, train, heldout):
    plain = fit(tmp_path, train, heldout, [])
    callback = traj_merge_callback.lightning.TrajMergeCallback(on_error="raise", **OPTIONS)
    module = fit(tmp_path, train, heldout, [callback], logger=TensorBoardLogger(tmp_path / "board"))
    assert same_weights(plain, module)
    images, events = images_in(tmp_path / "board", "merge/weights")
    assert images.keys() == {4, 8}
    assert len(colors(images[8])) > 10
    assert set(callback.merger.records[-1].scalars()) <= set(events.Tags()["scalars"])


def test_without_matplotlib_there_is_no_image_and_one_line_says_so(tmp_path, train, heldout, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    image.can_draw.cache_clear()
    callback = traj_merge_callback.lightning.TrajMergeCallback(on_error="raise", **OPTIONS)
    with caplog.at_level(logging.INFO, "traj_merge_callback"):
        fit(tmp_path, train, heldout, [callback], logger=TensorBoardLogger(tmp_path / "board"))
    image.can_draw.cache_clear()
    (file,) = (tmp_path / "board").rglob("events*")
    tags = EventAccumulator(str(file)).Reload().Tags()
    assert not tags["images"]
    assert "merge/loss" in tags["scalars"]
    assert sum("no image of the merge weights" in one.getMessage() for one in caplog.records) == 1


def test_wandb_and_trackio_have_the_image(tmp_path, train, heldout, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which is read when it is imported
    wandb = pytest.importorskip("wandb")
    pytest.importorskip("trackio")
    trainer = hf_trainer(tmp_path, train, heldout, report_to=["wandb", "trackio"])
    traj_merge_callback.transformers.TrajMergeCallback(on_error="raise", **OPTIONS).attach(trainer)
    trainer.train()
    for kept in ("wandb", "trackio"):
        found = [path for path in (tmp_path / kept).rglob("*.png") if len(colors(Image.open(path))) > 10]
        assert len(found) == 2, kept
    wandb.finish()
    callback = traj_merge_callback.lightning.TrajMergeCallback(on_error="raise", **OPTIONS)
    fit(tmp_path, train, heldout, [callback], logger=WandbLogger(save_dir=tmp_path / "lightning", offline=True))
    found = [path for path in (tmp_path / "lightning").rglob("*.png") if len(colors(Image.open(path))) > 10]
    assert len(found) == 2
