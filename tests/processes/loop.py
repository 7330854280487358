"""Run in several processes by test_distributed: plain loops under DDP or FSDP, one after the other.

Arguments: the folder for results, and a JSON list of runs, each a mapping with a "name" and options of :func:`run`.
"""

import functools
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import AT_ONCE, LENGTH, tiny_llama
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

import realtext
from traj_merge_callback import TrajectoryMerger
from traj_merge_callback.evaluate.language_model import language_model_nll

several = "WORLD_SIZE" in os.environ
if several:
    dist.init_process_group("gloo")
rank, size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
logging.basicConfig(level=logging.INFO, format=f"[{rank}] %(message)s")
text = realtext.split_blocks(realtext.python_source()[:60], LENGTH)
train, heldout = text[0][:2000], realtext.Blocks(text[1][:28])


def wrapped(model, strategy):
    if strategy == "ddp":
        return DistributedDataParallel(model)
    if strategy.startswith("fsdp2"):
        meshes = {"fsdp2": ((size,), ("shard",)), "fsdp2-hybrid": ((2, size // 2), ("replicate", "shard"))}
        shape, names = meshes.get(strategy, meshes["fsdp2"])
        options = {"mesh": init_device_mesh("cpu", shape, mesh_dim_names=names)}
        if strategy == "fsdp2-bf16":
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        if strategy == "fsdp2-columns":
            # Matrices are sharded by columns where that is even, and the last norm is not sharded at all.
            options["shard_placement_fn"] = lambda p: Shard(1) if p.dim() == 2 and p.shape[1] % size == 0 else None
            options["ignored_params"] = {model.model.norm.weight}
        for layer in model.model.layers:
            fully_shard(layer, **options)
        return fully_shard(model, **options)
    if strategy == "fsdp1":
        policy = ModuleWrapPolicy({LlamaDecoderLayer})
        device = torch.device("cpu")
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)
    return model


def checkpointed(model, how):
    """Checkpoint the activations of every block, or of parts of it: when, and how."""
    if how.startswith("inside"):
        for layer in model.model.layers:
            for module in (layer.mlp, layer.self_attn.o_proj):
                module.forward = functools.partial(checkpoint, module.forward, use_reentrant=how == "inside-reentrant")
        return
    parts = LlamaMLP if how == "mlp" else LlamaDecoderLayer
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, parts))


def full_state(model):
    if not several:
        return model.state_dict()
    if isinstance(model, FullyShardedDataParallel):  # whose state_dict crashes on the CPU
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {name: value.clone() for name, value in model.module.state_dict().items()}
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def eventful(what, at):
    """A loss with which something happens in the last process, in the middle of some forward passes."""
    calls = 0
    if what == "termination":
        signal.signal(signal.SIGTERM, lambda *_: print("NOTED", flush=True))

    def something_happens(*_):
        if what == "failure":
            raise ValueError("a fault in this process")
        if what == "short":
            raise MemoryError("no memory left in this process")
        if what == "misfit":
            raise KeyError("targets")
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "termination":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            time.sleep(6)

    def nll(model, batch):
        nonlocal calls
        calls += 1
        if rank < size - 1 or calls not in at:
            return language_model_nll(model, batch)
        handle = model.get_submodule("model.layers.1.mlp").register_forward_hook(something_happens)
        try:
            return language_model_nll(model, batch)
        finally:
            handle.remove()

    return nll


def kill_while_writing(folder):
    """Kill the last process as soon as a snapshot after the first is being written."""

    def watch():
        while not list(folder.glob("step-*")) or not list(folder.glob(".tmp-step-*")):
            time.sleep(0.0002)
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == size - 1:
        threading.Thread(target=watch, daemon=True).start()


def run(
    folder,
    strategy,
    merging=True,
    steps=12,
    tied=True,
    frozen=False,
    checkpointing=None,
    shares=False,
    node_local=False,
    save_at=None,
    resume=None,
    happens=None,
    at=(),
    spikes_at=None,
    **options,
):
    """Train, and keep the weights and the records.

    Args:
        folder: for results.
        strategy: how the model is wrapped.
        merging: whether there is a merger.
        steps: optimizer steps.
        tied: whether the model's embeddings are.
        frozen: whether its first layer is.
        checkpointing: how activations are checkpointed, see :func:`checkpointed`; "after" the model is wrapped.
        shares: whether each process's held-out loader reads a share of its own.
        node_local: whether processes see different output folders.
        save_at: save weights and merging state at this step.
        resume: from the folder where another run saved them.
        happens: something in the last process, in the held-out forward passes counted by ``at``.
        spikes_at: at this step the weights are three times as large.
        options: of the merger.
    """
    # Sizes that four processes cannot share equally; of nine rows the last one gets none.
    model = tiny_llama(dropout=0.0, hidden_size=36, intermediate_size=9, tie_word_embeddings=tied)
    model.model.layers[0].requires_grad_(not frozen)
    if checkpointing not in (None, "after"):
        checkpointed(model, checkpointing)
    model = wrapped(model, strategy)
    if checkpointing == "after":
        checkpointed(model, checkpointing)
    # Without a state of its own, so that a resumed run needs none.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    merger = None
    if merging:
        output = folder / "merged"
        if node_local:  # the same path is another folder on each
            (folder / f"node-{rank}").mkdir()
            os.chdir(folder / f"node-{rank}")
            output = Path("disk")
        sampler = DistributedSampler(heldout, size, rank, shuffle=False) if shares else None
        defaults = {"window_size": 4, "capture_every": 2, "merge_every": 6, "heldout_batches": 12, "evaluations": 6}
        defaults |= {"output_dir": str(output), "progress": False, "on_error": "raise", **AT_ONCE}
        merger = TrajectoryMerger(
            DataLoader(heldout, batch_size=4, sampler=sampler),
            nll=eventful(happens, at) if happens else None,
            log=lambda record: print(f"\nLOGGED {rank} {record.step}", flush=True),
            optimizer=optimizer,
            **{**defaults, **options},
        )
        if happens == "kill while writing":
            kill_while_writing(output)
    first = 0
    if resume:
        first, weights = torch.load(folder.parent / resume / "saved.pt")
        if not several:
            model.load_state_dict(weights)
        elif strategy == "fsdp1":
            with FullyShardedDataParallel.summon_full_params(model):
                model.module.load_state_dict(weights)
        else:
            set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
        merger.load_state(folder.parent / resume / "state", model, first)
    for step in range(first + 1, steps + 1):
        generator = torch.Generator().manual_seed(step)
        batch = train[torch.randint(len(train), (8,), generator=generator)][rank::size]
        model(input_ids=batch, labels=batch).loss.backward()
        if strategy == "fsdp2-columns":
            gradient = model.model.norm.weight.grad
            dist.all_reduce(gradient)
            gradient /= size
        optimizer.step()
        optimizer.zero_grad()
        if step == spikes_at:
            merger.settle()
            for parameter in model.parameters():
                getattr(parameter, "to_local", lambda one=parameter: one)().detach().mul_(3.0)
        if merger:
            merger.step(model, step)
        if step == save_at:
            merger.save_state(folder / "state")
            merger.wait()
            weights = full_state(model)
            if rank == 0:
                torch.save((step, weights), folder / "saved.pt")
    found = {}
    if merger:
        found["columns"] = merger.window.layout.numel if merger.window else None
        found["bytes"] = merger.window.nbytes if merger.window else None
        merger.finish(model)
        found["records"] = [json.loads(record.to_json()) for record in merger.records]
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    weights = full_state(model)
    if rank == 0:
        torch.save(weights, folder / "weights.pt")


for options in json.loads(sys.argv[2]):
    where = Path(sys.argv[1]) / options.pop("name")
    where.mkdir(parents=True, exist_ok=True)
    run(where, **options)
    if several:
        dist.barrier()
if several:
    dist.destroy_process_group()
