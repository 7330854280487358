"""Folders of checkpoints as trainers write them."""

import json

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from offline.folders import Module, blocks, documents, llama


@pytest.fixture(scope="session")
def heldout(tmp_path_factory):
    """A file of JSON lines with held-out documents."""
    path = tmp_path_factory.mktemp("heldout") / "heldout.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(60, seed=1)))
    return path


@pytest.fixture(scope="session")
def trainer_run(tmp_path_factory):
    """The output folder of transformers.Trainer: checkpoint-20 to checkpoint-120, and the final model beside them."""
    folder = tmp_path_factory.mktemp("trainer")
    train = [{"input_ids": row, "labels": row} for row in blocks(seed=0)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=120,
        save_steps=20,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(llama(), arguments, train_dataset=train)
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture(scope="session")
def lightning_run(tmp_path_factory):
    """The output folder of Lightning's Trainer."""
    folder = tmp_path_factory.mktemp("lightning")
    saving = pl.callbacks.ModelCheckpoint(every_n_train_steps=10, save_top_k=-1)
    trainer = pl.Trainer(
        max_steps=40,
        callbacks=[saving],
        default_root_dir=folder,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(blocks(seed=0), batch_size=8))
    return folder / "lightning_logs"
