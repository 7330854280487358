"""Real runs of a tiny Llama in every way people train, which can be killed and started again."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from traj_merge_callback import TrajectoryMerger
from traj_merge_callback.lightning import TrajMergeCallback as LightningCallback
from traj_merge_callback.transformers import TrajMergeCallback as TransformersCallback

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import realtext

STEPS, SAVE_EVERY = 25, 5
LENGTH = 32
#: How many ranks train, where it is more than one.
RANKS = {"ddp": 2, "fsdp2": 2}
STRATEGIES = ("loop", "transformers", "lightning", *RANKS)
_TEXT = realtext.split_blocks(realtext.python_source()[:60], LENGTH)
TRAIN, HELDOUT = _TEXT[0][:800], realtext.Blocks(_TEXT[1][:24])


def llama() -> LlamaForCausalLM:
    """About 25 thousand parameters, always the same."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=realtext.VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def heldout_loader() -> DataLoader[Any]:
    """The held-out data of every run."""
    return DataLoader(HELDOUT, batch_size=4)


def loop(folder: Path, strategy: str, options: dict[str, Any] | None) -> nn.Module:
    """A plain loop, alone or of two ranks; checkpoints as a careful user writes them, the newest two kept."""
    model: nn.Module = llama()
    rank, size = (dist.get_rank(), dist.get_world_size()) if strategy in RANKS else (0, 1)
    if strategy == "ddp":
        model = DistributedDataParallel(model)
    if strategy == "fsdp2":
        mesh = init_device_mesh("cpu", (size,))
        for layer in model.get_submodule("model.layers").children():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    merger = None
    if options is not None:
        merger = TrajectoryMerger(heldout_loader(), output_dir=str(folder / "merged"), **options)
    newest = max((path for path in folder.glob("checkpoint-*") if path.suffix != ".new"), key=step_of, default=None)
    first = step_of(newest) if newest else 0
    if newest:
        set_model_state_dict(model, torch.load(newest / "weights.pt"), options=whole)
        if merger:
            merger.resume_from(lambda: state if (state := newest / "merging").is_dir() else None, model, first)
    for step in range(first + 1, STEPS + 1):
        at = torch.randint(len(TRAIN), (8,), generator=torch.Generator().manual_seed(step))[rank::size]
        model(input_ids=TRAIN[at], labels=TRAIN[at]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if merger:
            merger.step(model, step)
        if step % SAVE_EVERY == 0:
            weights, target = get_model_state_dict(model, options=whole), folder / f"checkpoint-{step}"
            if rank == 0:
                shutil.rmtree(target.with_suffix(".new"), ignore_errors=True)
                target.with_suffix(".new").mkdir()
                torch.save(weights, target.with_suffix(".new") / "weights.pt")
                target.with_suffix(".new").rename(target)
                for old in sorted(folder.glob("checkpoint-*"), key=step_of)[:-2]:
                    shutil.rmtree(old, ignore_errors=True)
            if merger:
                merger.save_state(target / "merging")
    if merger:
        merger.finish(model)
    return model


def with_transformers(folder: Path, options: dict[str, Any] | None) -> nn.Module:
    """Hugging Face's trainer. A checkpoint that a kill has left half-written is removed, as its user has to do."""
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        learning_rate=3e-3,
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to="none",
        save_steps=SAVE_EVERY,
        save_total_limit=2,
        logging_steps=1000,
        disable_tqdm=True,
    )
    trainer = Trainer(llama(), arguments, train_dataset=realtext.Blocks(TRAIN), eval_dataset=HELDOUT)
    if options is not None:
        TransformersCallback(output_dir=str(folder / "merged"), **options).attach(trainer)
    newest = max(folder.glob("checkpoint-*"), key=step_of, default=None)
    trainer.train(resume_from_checkpoint=newest and str(newest))
    return trainer.model


class Module(pl.LightningModule):
    """A Llama in Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama()

    def training_step(self, batch: Any) -> Any:
        """The loss of a batch."""
        return self.model(**batch).loss

    def validation_step(self, batch: Any) -> None:
        """Log the loss of a batch."""
        self.log("val/loss", self.model(**batch).loss)

    def configure_optimizers(self) -> Any:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def with_lightning(folder: Path, options: dict[str, Any] | None) -> nn.Module:
    """Lightning. A checkpoint that a kill has left half-written is removed, as its user has to do."""
    for checkpoint in folder.glob("*.ckpt"):
        try:
            torch.load(checkpoint, weights_only=False)
        except Exception:
            checkpoint.unlink()
    saving_every = pl.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=SAVE_EVERY, save_top_k=-1)
    merging = [] if options is None else [LightningCallback(output_dir=str(folder / "merged"), **options)]
    pl.seed_everything(1, verbose=False)
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=1,
        callbacks=[*merging, saving_every],
        default_root_dir=folder,
        logger=False,
        limit_val_batches=2,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    # An epoch from one checkpoint to the next: Lightning begins an epoch again when it resumes in the middle of it.
    train = DataLoader(realtext.Blocks(TRAIN[: 8 * SAVE_EVERY]), batch_size=8)
    newest = max(folder.glob("*.ckpt"), key=step_of, default=None)
    trainer.fit(module, train, heldout_loader(), ckpt_path=newest and str(newest))
    return module.model


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(path.name.replace("=", "-").split("-")[-1].split(".")[0])


def run(folder: Path, strategy: str, options: dict[str, Any] | None) -> dict[str, torch.Tensor]:
    """Train one run to its end, from its newest checkpoint if there is one.

    Args:
        folder: of its files; merges go to "merged" in it.
        strategy: one of ``STRATEGIES``; of several ranks every one calls this, in its own process group.
        options: of the merger; None: none.

    Returns:
        The trained weights, on every rank.
    """
    trainers = {"transformers": with_transformers, "lightning": with_lightning}
    model = trainers[strategy](folder, options) if strategy in trainers else loop(folder, strategy, options)
    if strategy not in RANKS:
        return model.state_dict()
    weights: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return weights
