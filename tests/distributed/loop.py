"""Run in several processes by test_distributed: a plain loop under DDP or FSDP, with or without merging.

Arguments: the strategy, the folder for results, and options as JSON.
"""

import json
import logging
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import AT_ONCE, LENGTH, tiny_llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import realtext
from traj_merge_callback import TrajectoryMerger

strategy, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
logging.basicConfig(level=logging.INFO, format="%(message)s")
several = strategy != "single"
if several:
    dist.init_process_group("gloo")
rank, size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
steps, resume, fail_at = options.pop("steps", 12), options.pop("resume", None), options.pop("fail_at", None)
merging = options.pop("merging", True)
share_data = options.pop("share_data", False)
node_local = options.pop("node_local", False)
save_at = options.pop("save_at", None)

text = realtext.split_blocks(realtext.python_source()[:60], LENGTH)
train, heldout = text[0][:2000], realtext.Blocks(text[1][:44])


def make():
    # A hidden size that four processes cannot share equally.
    return tiny_llama(dropout=0.0, hidden_size=36, intermediate_size=50, tie_word_embeddings=options.pop("tied", True))


def wrapped(model):
    if strategy == "ddp":
        return DistributedDataParallel(model)
    if strategy in ("fsdp2", "hsdp"):
        shape = (2, size // 2) if strategy == "hsdp" else (size,)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if strategy == "fsdp1":
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}),
            sharding_strategy=ShardingStrategy.FULL_SHARD,
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
    return model


calls = 0


def failing_nll(model, batch):
    """Fail in one process only, in the middle of a forward pass."""
    global calls
    calls += 1
    from traj_merge_callback.losses import language_model_nll

    if rank == size - 1 and calls in fail_at:

        def fail(*_):
            raise MemoryError("no memory left in this process")

        handle = model.get_submodule("model.layers.1.mlp").register_forward_hook(fail)
        try:
            return language_model_nll(model, batch)
        finally:
            handle.remove()
    return language_model_nll(model, batch)


model = wrapped(make())
# Without a state of its own, so that a resumed run needs none.
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
sampler = DistributedSampler(heldout, size, rank, shuffle=False) if share_data else None
where = folder / f"node-{rank}" if node_local else folder
merger = None
if merging:
    merger = TrajectoryMerger(
        DataLoader(heldout, batch_size=4, sampler=sampler),
        nll=failing_nll if fail_at else None,
        log=lambda record: print("LOGGED", rank, record.step),
        **{
            "window_size": 4,
            "capture_every": 2,
            "merge_every": 6,
            "heldout_batches": 12,
            "output_dir": str(where / "merged"),
            "on_error": "raise",
            "progress": False,
            **AT_ONCE,
            **options,
        },
    )
first = 0
if resume:
    first = resume["step"]
    state = torch.load(Path(resume["from"]) / "model.pt")
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
    merger.load_state(Path(resume["from"]) / "state", model, first)


def full_state():
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if strategy == "fsdp1":  # whose state_dict crashes on the CPU
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {name: value.clone() for name, value in model.module.state_dict().items()}
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


for step in range(first + 1, steps + 1):
    generator = torch.Generator().manual_seed(step)
    batch = train[torch.randint(len(train), (8,), generator=generator)][rank::size]
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if merger:
        merger.step(model, step)
    if step == save_at:
        merger.save_state(folder / "state")
        merger.wait()
        state = full_state()
        if rank == 0:
            torch.save(state, folder / "model.pt")
if merger:
    if merger.window is not None:
        print("WINDOW", rank, merger.window.layout.numel, merger.window.nbytes)
    merger.finish(model)
state = full_state()
if rank == 0:
    torch.save(state, folder / "weights.pt")
    if merger:
        (folder / "records.json").write_text(json.dumps([json.loads(r.to_json()) for r in merger.records]))
if several:
    dist.barrier()
    dist.destroy_process_group()
