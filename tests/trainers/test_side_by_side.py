"""Two callbacks in one trainer compare two searches: their numbers, folders and windows stay apart."""

import json

import lightning.pytorch as pl
import pytest
from conftest import same_weights
from lightning.pytorch.callbacks import ModelCheckpoint
from test_lightning import Module, fit, merging
from test_transformers import OPTIONS, make_trainer
from torch.utils.data import DataLoader

from traj_merge_callback import find_snapshot, read_merge
from traj_merge_callback.lightning import TrajMergeCallback as LightningCallback
from traj_merge_callback.transformers import TrajMergeCallback


def searches(folder):
    """The searches in a folder's metrics and snapshots, and the steps of its metrics."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {line["search"] for line in lines} | {read_merge(path)["search"] for path in folder.glob("step-*")}
    assert read_merge(find_snapshot(folder))["search"] in found
    return found, [line["step"] for line in lines]


@pytest.mark.parametrize("how", ["attach", "callbacks"])
def test_transformers_takes_two_callbacks_and_resumes_both(tmp_path, train, heldout, how):
    plain = make_trainer(tmp_path / "plain", train, heldout)
    plain.train()

    def merging_trainer(**arguments):
        loader = DataLoader(heldout, batch_size=8) if how == "callbacks" else None
        options = {**OPTIONS, "on_error": "raise"}
        both = [TrajMergeCallback(loader, **options), TrajMergeCallback(loader, name="ema", search="ema", **options)]
        trainer = make_trainer(tmp_path / "run", train, heldout, callbacks=both if how == "callbacks" else None)
        for callback in both if how == "attach" else []:
            callback.attach(trainer)
        trainer.train(**arguments)
        return trainer, both

    for arguments in ({}, {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-4")}):
        trainer, both = merging_trainer(**arguments)
        assert same_weights(plain.model, trainer.model)
        assert searches(tmp_path / "run" / "merged") == ({"auto"}, [4, 8, 10])
        assert searches(tmp_path / "run" / "merged-ema") == ({"ema"}, [4, 8, 10])
        logged = {log["step"]: log for log in trainer.state.log_history if "ema/loss" in log}
        assert {step: log["ema/loss"] for step, log in logged.items()}.keys() == {4, 8, 10}
        assert not any("merge/loss" in log for log in logged.values())
        last = both[1].merger.records[-1]
        assert logged[10]["ema/loss"] == last.merged_loss
    folders = {path.name for path in (tmp_path / "run" / "checkpoint-8").iterdir() if path.is_dir()}
    assert folders == {"traj_merge", "traj_merge-ema"}


def test_lightning_takes_two_callbacks_and_resumes_both(tmp_path, train, heldout):
    _, plain = fit(tmp_path / "plain", train, heldout)

    def run(ckpt_path=None):
        both = [
            merging(tmp_path, output_dir=str(tmp_path / "auto")),
            merging(tmp_path, output_dir=str(tmp_path / "ema"), name="ema", search="ema"),
        ]
        checkpoints = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=4, save_top_k=2, monitor="ema/loss")
        trainer, module = fit(tmp_path / "run", train, heldout, *both, checkpoints, ckpt_path=ckpt_path)
        assert ckpt_path is not None or same_weights(plain, module)
        assert searches(tmp_path / "auto") == ({"auto"}, [4, 8, 10])
        assert searches(tmp_path / "ema") == ({"ema"}, [4, 8, 10])
        for callback, name in zip(both, ("merge", "ema"), strict=True):
            assert float(trainer.callback_metrics[f"{name}/loss"]) == pytest.approx(
                callback.merger.records[-1].merged_loss
            )
        return sorted((tmp_path / "ckpt").glob("*.ckpt")), both

    checkpoints, _ = run()
    for checkpoint in checkpoints:
        for suffix in ("merge", "merge-ema"):
            (state,) = checkpoint.with_name(f"{checkpoint.name}.{suffix}").iterdir()
            assert (state / "state.json").is_file()
    _, both = run(str(checkpoints[0]))
    assert all([record.step for record in callback.merger.records] == [8, 10] for callback in both)


def test_two_callbacks_with_one_name_or_folder_are_refused_before_training(tmp_path, train, heldout):
    loader = DataLoader(heldout, batch_size=8)
    with pytest.raises(ValueError, match=r"two callbacks of this trainer have name='merge': give each a name"):
        make_trainer(tmp_path, train, heldout, callbacks=[TrajMergeCallback(loader), TrajMergeCallback(loader)])
    trainer = make_trainer(tmp_path, train, heldout)
    TrajMergeCallback(name="a").attach(trainer)
    with pytest.raises(ValueError, match=r"two callbacks of this trainer have name='A'"):
        TrajMergeCallback(name="A").attach(trainer)
    trainer.add_callback(TrajMergeCallback(loader, name="b"))
    trainer.add_callback(TrajMergeCallback(loader, name="b"))
    with pytest.raises(ValueError, match=r"two callbacks of this trainer have name='b'"):
        trainer.train()
    same = {"output_dir": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=r"two callbacks of this trainer have output_dir='.*out'"):
        make_trainer(
            tmp_path,
            train,
            heldout,
            callbacks=[TrajMergeCallback(loader, name="a", **same), TrajMergeCallback(loader, name="b", **same)],
        )
    with pytest.raises(RuntimeError, match="more than one stateful callback"):  # by Lightning itself
        pl.Trainer(callbacks=[LightningCallback(), LightningCallback()], logger=False)
    with pytest.raises(ValueError, match=r"two callbacks of this trainer have output_dir='.*out'"):
        fit(tmp_path, train, heldout, LightningCallback(name="a", **same), LightningCallback(**same), module=Module())


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".a", "a b", None, 3, "x" * 65])
def test_a_name_is_a_folder_name(name):
    with pytest.raises(ValueError, match=r"name=.*: must be up to 64 letters"):
        TrajMergeCallback(name=name)
