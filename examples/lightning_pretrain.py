"""Pretrain a byte-level Llama with lightning.pytorch.Trainer; TensorBoard shows the merges beside the training loss."""

import argparse
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from realtext import VOCABULARY, Blocks, python_source, split_blocks
from traj_merge_callback import find_snapshot, load_merged
from traj_merge_callback.lightning import TrajMergeCallback


class LanguageModel(pl.LightningModule):
    """A Llama with its own training and validation step; the callback takes its loss from the latter."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.save_hyperparameters()
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=4,
            num_attention_heads=4,
            tie_word_embeddings=True,
        )
        self.model = LlamaForCausalLM(config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The mean loss of a batch."""
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The mean held-out loss of a batch."""
        loss = self.model(**batch).loss
        self.log("val_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW at a constant learning rate: merging takes the place of the decay."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    """Train, keeping the trainer's checkpoint of the step with the best merged loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--capture-every", type=int, default=20)
    parser.add_argument("--merge-every", type=int, default=200)
    parser.add_argument("--output-dir", default="runs/lightning_pretrain")
    args = parser.parse_args()

    pl.seed_everything(0)
    train, heldout = split_blocks(python_source(), length=128)
    trainer = pl.Trainer(
        max_steps=args.steps,
        accelerator="cpu",
        val_check_interval=args.merge_every,
        limit_val_batches=8,
        log_every_n_steps=10,
        default_root_dir=args.output_dir,
        logger=TensorBoardLogger(args.output_dir, name="logs"),
        callbacks=[
            TrajMergeCallback(
                capture_every=args.capture_every,
                merge_every=args.merge_every,
                output_dir=f"{args.output_dir}/merged",
            ),
            ModelCheckpoint(monitor="merge/loss", every_n_train_steps=args.merge_every),
        ],
    )
    model = LanguageModel(args.width)
    trainer.fit(
        model,
        DataLoader(Blocks(train), batch_size=16, shuffle=True),
        DataLoader(Blocks(heldout), batch_size=16),
    )
    best = find_snapshot(f"{args.output_dir}/merged")
    load_merged(best, model)
    print(f"loaded the best snapshot, {best}, into the model")


if __name__ == "__main__":
    main()
