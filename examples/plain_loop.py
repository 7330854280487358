"""Pretrain a byte-level Llama in a hand-written loop, merging its trajectory as it trains; resumes from checkpoints."""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from realtext import VOCABULARY, Blocks, python_source, split_blocks
from traj_merge_callback import TrajectoryMerger


def main() -> None:
    """Train, print each merge, and load the best snapshot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--capture-every", type=int, default=20)
    parser.add_argument("--merge-every", type=int, default=200)
    parser.add_argument("--output-dir", default="runs/plain_loop")
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument(
        "--resume", type=Path, help="a checkpoint of an earlier run, such as runs/plain_loop/checkpoint-200"
    )
    args = parser.parse_args()

    torch.manual_seed(0)
    train, heldout = split_blocks(python_source(), length=128)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=4,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    merger = TrajectoryMerger(
        DataLoader(Blocks(heldout), batch_size=16),
        capture_every=args.capture_every,
        merge_every=args.merge_every,
        output_dir=f"{args.output_dir}/merged",
    )
    done = 0
    if args.resume:
        saved = torch.load(args.resume / "training.pt")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]
        merger.load_state(args.resume / "merge", model, done)

    torch.manual_seed(done)
    batches = iter(DataLoader(Blocks(train), batch_size=16, shuffle=True))
    for step in range(done + 1, args.steps + 1):
        model(**next(batches)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if merge := merger.step(model, step):
            print(f"step {merge.step}: live {merge.live_loss:.4f}, merged {merge.merged_loss:.4f} nats/token")
        if step % args.save_every == 0:
            checkpoint = Path(args.output_dir) / f"checkpoint-{step}"
            checkpoint.mkdir(parents=True, exist_ok=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, checkpoint / "training.pt")
            merger.save_state(checkpoint / "merge")
    merger.finish(model)

    best = AutoModelForCausalLM.from_pretrained(merger.best_snapshot)
    print(f"loaded {type(best).__name__} from {merger.best_snapshot}")


if __name__ == "__main__":
    main()
