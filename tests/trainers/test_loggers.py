"""Merges in the loggers that people use: each is run for real, offline, and what it wrote is read back."""

import json
import struct

import pytest
from test_lightning import fit, merging
from test_transformers import OPTIONS, make_trainer

from traj_merge_callback.transformers import TrajMergeCallback

NAMES = {f"merge/{name}" for name in ("loss", "live_loss", "gain", "steps_saved", "overhead", "spike")}
DETAILS = {"merge_details/gain_stderr", "merge_details/weight/0", "merge_details/step"}


def rows_of_wandb(folder):
    """What was logged in an offline run: its file is a LevelDB log of protocol buffers, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.rglob("*.wandb")
    data, at, whole, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({one.key or ".".join(one.nested_key): json.loads(one.value_json) for one in items})
    return rows


def rows_of_trackio(folder):
    """What was logged in the only run of the project."""
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs("merging")
    return SQLiteStorage.get_logs("merging", run)


def rows_of_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (path,) = folder.rglob("events*")
    board, rows = EventAccumulator(str(path)).Reload(), {}
    for tag in board.Tags()["scalars"]:
        for event in board.Scalars(tag):
            rows.setdefault(event.step, {"train/global_step": event.step})[tag] = event.value
    return list(rows.values())


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Loggers write into the test's folder, and reach no network."""
    folder = tmp_path / "logs"
    folder.mkdir()
    settings = {"WANDB_MODE": "offline", "WANDB_DIR": folder, "WANDB_SILENT": "true", "TRACKIO_DIR": folder}
    for name, value in {**settings, "TENSORBOARD_LOGGING_DIR": folder}.items():
        monkeypatch.setenv(name, str(value))
    return folder


@pytest.mark.parametrize("details", [True, False])
@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_the_loggers_of_transformers_hold_the_merges(tmp_path, train, heldout, offline, name, details):
    pytest.importorskip(name)
    trainer = make_trainer(tmp_path / "out", train, heldout, report_to=name, project="merging", run_name="one")
    callback = TrajMergeCallback(on_error="raise", log_details=details, **OPTIONS).attach(trainer)
    trainer.train()
    if name == "wandb":
        import wandb

        wandb.finish()
        wandb.teardown()
    rows = {"wandb": rows_of_wandb, "trackio": rows_of_trackio, "tensorboard": rows_of_tensorboard}[name](offline)
    merges = {row["train/global_step"]: row for row in rows if "train/merge/loss" in row}
    expected = {record.step: pytest.approx(record.merged_loss, rel=1e-5) for record in callback.merger.records}
    assert {step: row["train/merge/loss"] for step, row in merges.items()} == expected
    for row in merges.values():
        found = {key.removeprefix("train/") for key in row if "merge" in key}
        assert found >= NAMES | DETAILS if details else found == NAMES
    assert any("train/loss" in row for row in rows)


def test_a_wandb_logger_of_lightning_holds_the_merges_at_their_steps(tmp_path, train, heldout, offline):
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    callback = merging(tmp_path)
    fit(tmp_path, train, heldout, callback, logger=WandbLogger(save_dir=str(offline), offline=True))
    wandb.finish()
    wandb.teardown()
    merges = {row["trainer/global_step"]: row for row in rows_of_wandb(offline) if "merge/loss" in row}
    expected = {record.step: pytest.approx(record.merged_loss, rel=1e-5) for record in callback.merger.records}
    assert {step: row["merge/loss"] for step, row in merges.items()} == expected
    assert all(row.keys() >= NAMES | DETAILS for row in merges.values())
