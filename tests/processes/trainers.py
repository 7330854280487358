"""Run in several processes by test_distributed: trainers under DDP or FSDP, one after the other.

Arguments: the folder for results, and a JSON list of runs, each a mapping with a "name" and options of :func:`run`.
"""

import itertools
import json
import os
import resource
import sys
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from conftest import AT_ONCE, LENGTH, tiny_llama
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import realtext
from traj_merge_callback.evaluate.language_model import language_model_nll
from traj_merge_callback.lightning import TrajMergeCallback as LightningCallback
from traj_merge_callback.transformers import TrajMergeCallback as TransformersCallback

text = realtext.split_blocks(realtext.python_source()[:60], LENGTH)
train, heldout = realtext.Blocks(text[0][:400]), realtext.Blocks(text[1][:28])
OPTIONS = {"window_size": 4, "capture_every": 2, "merge_every": 6, "heldout_batches": 12, "evaluations": 5}
OPTIONS |= {"progress": False, "on_error": "raise", **AT_ONCE}


class Module(pl.LightningModule):
    """A Llama whose layers, and then the whole, are sharded by ModelParallelStrategy."""

    def __init__(self, sharded):
        super().__init__()
        self.sharded = sharded
        self.model = tiny_llama(tie_word_embeddings=False)

    def configure_model(self):
        if self.sharded:
            mesh = self.device_mesh["data_parallel"]
            for layer in self.model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def training_step(self, batch):
        loss = self.model(**batch).loss
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch):
        self.log("val/loss", self.model(**batch).loss, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class OnCPU(FSDPStrategy):
    """Lightning's strategy, which itself can only shard on a GPU."""

    def _setup_model(self, model):
        device = torch.device("cpu")
        return FullyShardedDataParallel(
            model, sharding_strategy=self.sharding_strategy, device_id=device, **self.kwargs
        )


def lightning_strategy(strategy):
    if strategy == "fsdp1":
        policy = ModuleWrapPolicy({LlamaDecoderLayer})
        return OnCPU(auto_wrap_policy=policy, use_orig_params=True, state_dict_type="sharded")
    if strategy == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=int(os.environ["WORLD_SIZE"]), tensor_parallel_size=1)
    return strategy


def zero(stage):
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
    }


def full_state(model):

    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {name: value.clone() for name, value in model.module.state_dict().items()}
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def with_lightning(folder, strategy, merging, steps, resume, options):
    """Train with Lightning; the model and the records."""
    pl.seed_everything(1)
    callback = LightningCallback(**options)
    checkpoint = pl.callbacks.ModelCheckpoint(folder / "ckpt", every_n_train_steps=4, save_top_k=-1)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=lightning_strategy(strategy),
        callbacks=[*([callback] if merging else []), checkpoint],
        default_root_dir=folder,
        logger=pl.loggers.CSVLogger(folder),
        log_every_n_steps=1,
        val_check_interval=5,
        check_val_every_n_epoch=None,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module(strategy == "fsdp2")
    loaders = DataLoader(train, batch_size=4, shuffle=True), DataLoader(heldout, batch_size=4)
    trainer.fit(module, *loaders, ckpt_path=resume and folder.parent / resume / "ckpt" / "epoch=0-step=8.ckpt")
    if merging:
        assert trainer.callback_metrics["merge/loss"] == callback.merger.records[-1].merged_loss
    return trainer.strategy.model if strategy == "fsdp1" else module, callback.merger


def with_transformers(folder, strategy, merging, steps, resume, options):
    """Train with Hugging Face's trainer; the model and the records."""
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        use_cpu=True,
        report_to="none",
        save_steps=4,
        eval_steps=5,
        eval_strategy="steps",
        logging_steps=1,
        seed=1,
        deepspeed=zero(int(strategy[-1])) if strategy.startswith("zero") else None,
        bf16=strategy.startswith("zero"),
    )
    trainer = Trainer(tiny_llama(), arguments, train_dataset=train, eval_dataset=heldout)
    if strategy.startswith("fsdp"):
        from accelerate import FullyShardedDataParallelPlugin
        from accelerate.utils import DistributedType

        # Accelerate turns FSDP on for GPUs; everything behind this switch runs on any device.
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=int(strategy[-1]),
            use_orig_params=True if strategy == "fsdp1" else None,
            state_dict_type="SHARDED_STATE_DICT",  # the other one crashes on the CPU
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )
        trainer.accelerator.state.distributed_type = DistributedType.FSDP
        trainer.accelerator.state.fsdp_plugin = plugin
        trainer.accelerator.state.device = torch.device("cpu")
        trainer.is_fsdp_enabled = True
    callback = TransformersCallback(**options)
    if merging:
        callback.attach(trainer)
    trainer.train(resume_from_checkpoint=resume and str(folder.parent / resume / "checkpoint-8"))
    return trainer.model, callback.merger


class PanicException(BaseException):
    """As extensions written in Rust raise it: no Exception."""


def panicking(at):
    """A loss that panics in the last process, once."""
    calls = itertools.count(1)

    def nll(model, batch):
        if next(calls) == at and dist.get_rank() == dist.get_world_size() - 1:
            raise PanicException("called `Option::unwrap()` on a `None` value")
        return language_model_nll(model.model if isinstance(model, Module) else model, batch)

    return nll


@contextmanager
def short_of_space(limit):
    """Within the context the last process can write no file longer than this, as if its disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def damaged(folder, how):
    """Damage the merging state of step 8."""
    (state,) = [
        path.parent for path in folder.rglob("state.json") if json.loads(path.read_text())["run"]["last_step"] == 8
    ]
    if how == "torn":
        os.truncate(state / "state.json", 300)
    if how == "missing":
        (state / "row-00.rank-00000.safetensors").unlink()
    if how == "cut":
        os.truncate(state / "row-01.rank-00001.safetensors", 1000)


def run(folder, trainer, strategy, merging=True, steps=12, resume=None, damage=None, panic=None, limit=None, **options):
    """Train, and keep the weights and the records.

    Args:
        damage: how to damage the state of step 8 afterwards.
        panic: the held-out forward pass in which the last process panics.
        limit: bytes that the last process can write into a file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train_with = with_lightning if trainer == "lightning" else with_transformers
    options = {**OPTIONS, "output_dir": str(folder / "merged"), **options}
    if panic:
        options["nll"] = panicking(panic)
    with short_of_space(limit):
        model, merger = train_with(folder, strategy, merging, steps, resume, options)
    state = full_state(model)
    if damage and dist.get_rank() == 0:
        damaged(folder, damage)
    if dist.get_rank() == 0:
        torch.save(state, folder / "weights.pt")
    records = [json.loads(record.to_json()) for record in merger.records] if merging else []
    (folder / f"found-{dist.get_rank()}.json").write_text(json.dumps({"records": records}))
    dist.barrier()


for options in json.loads(sys.argv[2]):
    run(Path(sys.argv[1]) / options.pop("name"), **options)
dist.destroy_process_group()
