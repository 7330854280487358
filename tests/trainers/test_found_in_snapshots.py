"""What ``on_publish`` finds in snapshots, in the logs of both trainers."""

import pytest
from conftest import same_weights
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_lightning import fit, merging
from test_transformers import OPTIONS, make_trainer

from traj_merge_callback.transformers import TrajMergeCallback


def count_bytes(snapshot):
    return {"bytes": (snapshot / "model.safetensors").stat().st_size}


def board_of(folder):
    (events,) = folder.rglob("events*")
    return EventAccumulator(str(events)).Reload()


def test_lightning_logs_it_at_the_step_of_the_merge(tmp_path, train, heldout):
    _, module = fit(tmp_path / "plain", train, heldout)
    callback = merging(tmp_path, on_publish=count_bytes)
    logger = TensorBoardLogger(tmp_path, name="board")
    trainer, found = fit(tmp_path, train, heldout, callback, logger=logger)
    assert same_weights(module, found)
    records = [record for record in callback.merger.records if record.eval]
    # The last one was waited for, while the loggers were open; one in between may have been left out.
    assert records[-1].step == 10
    events = board_of(tmp_path / "board").Scalars("merge/eval/bytes")
    assert {event.step: event.value for event in events} == {one.step: one.eval["bytes"] for one in records}
    assert trainer.callback_metrics["merge/eval/step"] == 10


def test_transformers_logs_it_with_the_step_of_the_merge(tmp_path, train, heldout, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    plain = make_trainer(tmp_path / "plain", train, heldout)
    plain.train()
    trainer = make_trainer(tmp_path, train, heldout, report_to="tensorboard")
    callback = TrajMergeCallback(on_error="raise", on_publish=count_bytes, **OPTIONS).attach(trainer)
    trainer.train()
    assert same_weights(plain.model, trainer.model)
    records = [record for record in callback.merger.records if record.eval]
    assert records[-1].step == 10
    logged = [log for log in trainer.state.log_history if "merge/eval/bytes" in log]
    assert {log["merge/eval/step"]: log["merge/eval/bytes"] for log in logged} == {
        one.step: one.eval["bytes"] for one in records
    }
    found = board_of(tmp_path / "board").Scalars("train/merge/eval/bytes")
    assert found[-1].value == pytest.approx(records[-1].eval["bytes"])
