"""Run by test_ddp in two processes: train a model under DDP, with or without merging, and save its weights."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from conftest import LENGTH, tiny_llama
from test_lightning import OPTIONS, Module
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import realtext
from traj_merge_callback.lightning import TrajMergeCallback as LightningCallback
from traj_merge_callback.transformers import TrajMergeCallback as TransformersCallback

kind, merging, folder = sys.argv[1], sys.argv[2] == "merging", Path(sys.argv[3])
train, heldout = (realtext.Blocks(b[:400]) for b in realtext.split_blocks(realtext.python_source()[:60], LENGTH))
options = {**OPTIONS, "output_dir": str(folder / "merged"), "on_error": "raise"}

if kind == "transformers":
    arguments = TrainingArguments(
        str(folder), max_steps=8, per_device_train_batch_size=4, use_cpu=True, report_to="none", save_steps=4, seed=1
    )
    trainer = Trainer(tiny_llama(), arguments, train_dataset=train, eval_dataset=heldout)
    if merging:
        TransformersCallback(**options).attach(trainer)
    trainer.train()
    model = trainer.model
else:
    pl.seed_everything(1)
    trainer = pl.Trainer(
        max_steps=8,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        callbacks=[LightningCallback(**options)] if merging else [],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    model = Module()
    trainer.fit(model, DataLoader(train, batch_size=4, shuffle=True), DataLoader(heldout, batch_size=8))
torch.save(model.state_dict(), folder / f"weights-{torch.distributed.get_rank()}.pt")
