"""Pretrain a byte-level GPT-2 in an Accelerate loop, with gradient accumulation and bf16 autocast."""

import argparse

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from realtext import VOCABULARY, Blocks, cpp_headers, split_blocks
from traj_merge_callback import TrajectoryMerger


def main() -> None:
    """Train, and let TensorBoard show the merges beside the training loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--capture-every", type=int, default=20)
    parser.add_argument("--merge-every", type=int, default=100)
    parser.add_argument("--output-dir", default="runs/accelerate_loop")
    args = parser.parse_args()

    accelerator = Accelerator(
        gradient_accumulation_steps=2, mixed_precision="bf16", log_with="tensorboard", project_dir=args.output_dir
    )
    accelerator.init_trackers("merging")
    torch.manual_seed(0)
    train, heldout = split_blocks(cpp_headers(), length=128)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=128,
        n_embd=args.width,
        n_layer=4,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(Blocks(train), batch_size=8, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    merger = TrajectoryMerger(
        DataLoader(Blocks(heldout), batch_size=16),
        precision=accelerator.autocast,
        capture_every=args.capture_every,
        merge_every=args.merge_every,
        output_dir=f"{args.output_dir}/merged",
        log=lambda merge: accelerator.log(merge.scalars(), step=merge.step),
    )
    step = 0
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
            step += 1
            accelerator.log({"train/loss": loss.item()}, step=step)
            if merge := merger.step(model, step):
                accelerator.print(f"step {merge.step}: live {merge.live_loss:.4f}, merged {merge.merged_loss:.4f}")
        if step == args.steps:
            break
    merger.finish(model)
    accelerator.end_training()
    accelerator.print(f"best snapshot: {merger.best_snapshot}")


if __name__ == "__main__":
    main()
