"""Pretrain a byte-level Llama with transformers.Trainer; TensorBoard shows the merges beside the training loss."""

import argparse

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from realtext import VOCABULARY, Blocks, cpp_headers, python_source, split_blocks
from traj_merge_callback.transformers import TrajMergeCallback


def main() -> None:
    """Train on Python source; C++ headers are a second, named held-out domain."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--capture-every", type=int, default=20)
    parser.add_argument("--merge-every", type=int, default=200)
    parser.add_argument("--output-dir", default="runs/transformers_pretrain")
    args = parser.parse_args()

    train, heldout_python = split_blocks(python_source(), length=128)
    _, heldout_cpp = split_blocks(cpp_headers(), length=128)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=4,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    trainer = Trainer(
        LlamaForCausalLM(config),
        TrainingArguments(
            output_dir=args.output_dir,
            max_steps=args.steps,
            learning_rate=3e-3,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=args.steps // 20,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=16,
            logging_steps=10,
            save_steps=args.merge_every,
            report_to="tensorboard",
            use_cpu=True,
        ),
        train_dataset=Blocks(train),
        eval_dataset={"python": Blocks(heldout_python), "cpp": Blocks(heldout_cpp)},
    )
    TrajMergeCallback(
        capture_every=args.capture_every,
        merge_every=args.merge_every,
        report_only=["cpp"],
    ).attach(trainer)
    trainer.train()

    best = AutoModelForCausalLM.from_pretrained(f"{args.output_dir}/merged/best")
    print(f"loaded {type(best).__name__} from {args.output_dir}/merged/best")


if __name__ == "__main__":
    main()
