"""The trainer's checkpoints and the windows that are written beside them, on a slow disk and while they are removed."""

import os
import shutil
import threading

import pytest
import torch
from conftest import tiny_llama, train_steps
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from test_lightning import Module, fit, merging
from test_transformers import OPTIONS, make_trainer
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from traj_merge_callback import TrajectoryMerger
from traj_merge_callback.transformers import TrajMergeCallback

# Merges wait for their snapshots; here only windows are written.
NO_SNAPSHOTS = {"keep_last": 0, "keep_best": False, "schedule": "interleaved", "merge_every": 1000}


class SlowDisk:
    """Nothing of ours gets onto the disk until :meth:`release`; ``in_time``: whether that came while we waited."""

    def __init__(self, monkeypatch):
        self._event, self.in_time, fsync = threading.Event(), [], os.fsync
        self.begun = threading.Event()

        def slow(descriptor):
            if threading.current_thread().name.startswith("traj-merge-writer"):  # trainers flush files of their own
                self.begun.set()
                self.in_time.append(self._event.wait(20))
                self.release()
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", slow)

    def release(self):
        self._event.set()


def restored(folder, model, step, loader):
    """The steps in the window that is saved in a folder, and its live weights, once it is restored."""
    options = {**OPTIONS, **NO_SNAPSHOTS, "output_dir": str(folder.parent / "restored")}
    with TrajectoryMerger(loader, nll=lambda model, batch: (0.0, 1), **options) as merger:
        merger.load_state(folder, model, step)
        return merger.window.steps, merger.window.combine(None).clone()


def test_lightning_does_not_wait_for_the_disk_and_every_checkpoint_has_its_window(
    tmp_path, train, heldout, loader, monkeypatch
):
    disk = SlowDisk(monkeypatch)

    class Release(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 8:
                disk.release()

    checkpoints = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=4, save_top_k=-1, save_last=True)
    fit(tmp_path, train, heldout, merging(tmp_path, **NO_SNAPSHOTS), checkpoints, Release(), max_steps=8)
    assert disk.in_time
    assert all(disk.in_time)
    found = sorted(path.relative_to(tmp_path / "ckpt").as_posix() for path in (tmp_path / "ckpt").glob("*.merge/*"))
    assert found == [
        "epoch=0-step=4.ckpt.merge/step-00000004",
        "epoch=0-step=8.ckpt.merge/step-00000008",
        "last.ckpt.merge/step-00000008",
    ]
    # The rows were on their way, so nothing was captured after step 4; all states hold these rows, in the same files.
    states = [restored(tmp_path / "ckpt" / name, Module(), 8, loader) for name in found]
    assert {steps for steps, _ in states} == {(2, 4, 4)}
    assert all(torch.equal(live, states[0][1]) for _, live in states)
    rows = [tmp_path / "ckpt" / name / "row-00.rank-00000.safetensors" for name in found]
    assert len({row.stat().st_ino for row in rows}) == 1


def test_transformers_does_not_wait_for_the_disk(tmp_path, train, heldout, loader, monkeypatch, caplog):
    disk = SlowDisk(monkeypatch)

    class Release(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 9:
                disk.release()

    trainer = make_trainer(tmp_path, train, heldout, save_steps=1, eval_strategy="no")
    TrajMergeCallback(on_error="raise", **{**OPTIONS, **NO_SNAPSHOTS}).attach(trainer)
    trainer.add_callback(Release())
    trainer.train()
    assert all(disk.in_time)
    states = sorted(int(path.parent.name.removeprefix("checkpoint-")) for path in tmp_path.glob("*/traj_merge"))
    # Step 1 was being written, four more wait, of the newest checkpoints; which ones have none is said.
    assert states[:1] == [1]
    assert states[-1] == 10
    missing = set(range(1, 11)) - set(states)
    messages = [record.getMessage() for record in caplog.records if "no window is saved" in record.getMessage()]
    assert {int(message.partition("checkpoint-")[2].partition("/")[0]) for message in messages} == missing
    assert missing


@pytest.mark.parametrize("company", [True, False])
def test_a_state_goes_with_its_checkpoint(tmp_path, train, loader, monkeypatch, company):
    model = tiny_llama()
    options = {**OPTIONS, **NO_SNAPSHOTS, "output_dir": str(tmp_path / "merged"), "on_error": "raise"}
    with TrajectoryMerger(loader, **options) as merger:
        train_steps(model, train, 4, lambda step: merger.step(model, step))
        disk = SlowDisk(monkeypatch)
        folder = tmp_path / "checkpoint-4"
        folder.mkdir()
        if company:
            (folder / "model.pt").write_bytes(b"model")
        merger.save_state(folder / "window")
        assert disk.begun.wait(20)
        if company:
            # Nothing half-written is in the checkpoint; it can be removed as if there was no window.
            assert [path.name for path in folder.iterdir()] == ["model.pt"]
            shutil.rmtree(folder)
        disk.release()
        train_steps(model, train, 2, lambda step: merger.step(model, step), start=4)
        merger.wait()
        merger.save_state(tmp_path / "checkpoint-6" / "window")
    assert (tmp_path / "checkpoint-6" / "window" / "state.json").is_file()
    assert folder.exists() is not company
    assert (folder / "window" / "state.json").is_file() is not company
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_window_that_gets_into_a_checkpoint_while_that_is_removed_goes_too(tmp_path, train, loader, monkeypatch):
    model = tiny_llama()
    options = {**OPTIONS, **NO_SNAPSHOTS, "output_dir": str(tmp_path / "merged"), "on_error": "raise"}
    with TrajectoryMerger(loader, **options) as merger:
        train_steps(model, train, 4, lambda step: merger.step(model, step))
        for name in ("checkpoint-2", "checkpoint-4"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "model.pt").write_bytes(b"model")
        merger.save_state(tmp_path / "checkpoint-2" / "window")
        merger.wait()
        (tmp_path / "checkpoint-2" / "model.pt").unlink()  # as rmtree does that has listed the folder before
        merger.save_state(tmp_path / "checkpoint-4" / "window")
        assert get_last_checkpoint(tmp_path).endswith("checkpoint-4")
        assert not (tmp_path / "checkpoint-2").exists()
        merger.wait()
        (tmp_path / "checkpoint-4" / "model.pt").unlink()
    assert get_last_checkpoint(tmp_path) is None


def test_lightning_started_again_at_the_last_step_makes_the_merge_at_the_end(tmp_path, train, heldout):
    """As after a kill in that merge: nothing is left to train, and Lightning calls no hook of training."""
    checkpoints = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=5)
    first = merging(tmp_path, merge_at_end=False)
    fit(tmp_path, train, heldout, first, checkpoints, max_steps=10)
    (last,) = (tmp_path / "ckpt").glob("*.ckpt")
    assert [record.step for record in first.merger.records] == [4, 8]
    (left,) = (tmp_path / "ckpt").glob("*.merge")
    half_written = left / f".tmp-step-00000010-{'0' * 32}"
    half_written.mkdir()
    again = merging(tmp_path)
    trainer, _ = fit(tmp_path, train, heldout, again, max_steps=10, ckpt_path=last)
    assert [record.step for record in again.merger.records] == [10]
    assert trainer.callback_metrics["merge/loss"] == again.merger.records[-1].merged_loss
    assert not half_written.exists()


def test_rotated_checkpoints_leave_nothing_behind(tmp_path, train, heldout, monkeypatch):
    """Each checkpoint is removed at the next save, while its window is still on its way."""
    fsync = os.fsync
    disk = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda descriptor: (disk.wait(0.05), fsync(descriptor)))
    trainer = make_trainer(tmp_path, train, heldout, save_steps=1, eval_strategy="no", save_total_limit=1)
    TrajMergeCallback(on_error="raise", **{**OPTIONS, **NO_SNAPSHOTS}).attach(trainer)
    trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-10"]
    assert (tmp_path / "checkpoint-10" / "traj_merge" / "state.json").is_file()
    assert not list(tmp_path.rglob(".tmp-*"))
    again = make_trainer(tmp_path, train, heldout, save_steps=1, eval_strategy="no", save_total_limit=1, max_steps=12)
    callback = TrajMergeCallback(on_error="raise", **{**OPTIONS, **NO_SNAPSHOTS}).attach(again)
    again.train(resume_from_checkpoint=True)
    assert callback.merger._state.last_step == 12


def test_lightnings_top_k_removes_windows_on_their_way(tmp_path, train, heldout, monkeypatch):
    disk = SlowDisk(monkeypatch)

    class Release(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 8:
                disk.release()

    checkpoints = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=2, save_top_k=1, monitor=None)
    fit(tmp_path, train, heldout, merging(tmp_path, **NO_SNAPSHOTS), checkpoints, Release(), max_steps=8)
    assert all(disk.in_time)
    (kept,) = (tmp_path / "ckpt").glob("*.ckpt")
    assert [path.name for path in (tmp_path / "ckpt").glob("*.merge")] == [f"{kept.name}.merge"]
