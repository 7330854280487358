"""Train a small Llama on real text and watch merged snapshots beat the live model. A few minutes on two CPU cores."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from realtext import VOCABULARY, Blocks, cpp_headers, language_reference, python_source, split_blocks
from traj_merge_callback import find_snapshot
from traj_merge_callback.transformers import TrajMergeCallback

mpl.use("Agg")
import matplotlib.pyplot as plt

HEADER = (
    f"{'step':>6} {'live loss':>10} {'merged':>10} {'gain':>8} {'± stderr':>9} {'never seen: live':>17} {'merged':>8}"
)


class Table(TrainerCallback):
    """Prints a line for each merge; the numbers are those of the trainer's own log."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the head of the table."""
        print(HEADER + "\n" + "-" * len(HEADER), flush=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Print a line."""
        if "merge/loss" in logs:
            print(
                f"{logs['merge_details/step']:>6.0f} {logs['merge/live_loss']:>10.4f} {logs['merge/loss']:>10.4f} "
                f"{logs['merge/gain']:>8.4f} {logs['merge_details/gain_stderr']:>9.4f} "
                f"{logs['merge_details/live_loss/reference']:>17.4f} {logs['merge_details/loss/reference']:>8.4f}",
                flush=True,
            )


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Live and merged loss over steps, on text like the training text and on text never trained on."""
    steps = [record["step"] for record in records]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    titles = {"code": "held-out Python and C++", "reference": "English prose, never trained or searched on"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        if name == "code":
            live, merged = ([record[key] for record in records] for key in ("live_loss", "merged_loss"))
        else:
            live, merged = ([r["domains"][name][key] for r in records] for key in ("live_loss", "merged_loss"))
        axis.plot(steps, live, "o-", color="tab:gray", label="live")
        axis.plot(steps, merged, "o-", color="tab:blue", label="merged")
        axis.fill_between(steps, live, merged, color="tab:blue", alpha=0.12)
        axis.set(title=title, xlabel="optimizer step", ylabel="loss (nats per byte)")
        # The first merges are dominated by how fast everything falls; the later ones are what one would look at.
        shown = [value for step, value in zip(steps, live, strict=True) if step >= steps[-1] / 4]
        axis.set_ylim(top=max(shown) + 0.05)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train, then say what was gained and where it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--capture-every", type=int, default=20)
    parser.add_argument("--merge-every", type=int, default=100)
    parser.add_argument("--output-dir", default="runs/demo")
    args = parser.parse_args()

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    set_seed(0)
    started = time.perf_counter()
    train, heldout = split_blocks(python_source() + cpp_headers()[:1500], length=128)
    _, reference = split_blocks(language_reference(), length=128, heldout_every=2)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    trainer = Trainer(
        LlamaForCausalLM(config),
        TrainingArguments(
            output_dir=args.output_dir,
            max_steps=args.steps,
            # A constant learning rate after warm-up is where merging matters: nothing has been annealed yet.
            learning_rate=3e-3,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=args.steps // 20,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=16,
            logging_steps=20,
            save_strategy="no",
            report_to="tensorboard",
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=Blocks(train),
        eval_dataset={"code": Blocks(heldout), "reference": Blocks(reference)},
        callbacks=[Table()],
    )
    trainer.remove_callback(PrinterCallback)
    callback = TrajMergeCallback(
        capture_every=args.capture_every,
        merge_every=args.merge_every,
        report_only=["reference"],
        progress=False,
    ).attach(trainer)
    size = sum(parameter.numel() for parameter in trainer.model.parameters())
    print(f"A Llama of {size:,} parameters learns {train.numel() / 1e6:.1f} MB of Python and C++, byte by byte.\n")
    trainer.train()

    output = Path(args.output_dir)
    merged_dir = output / "merged"
    records = [json.loads(line) for line in (merged_dir / "metrics.jsonl").read_text().splitlines()]
    plot(records, output / "demo.png")
    last, best = records[-1], min(records, key=lambda record: record["merged_loss"])
    gains = [record["gain"] / record["gain_stderr"] for record in records if record["gain"] > 0]
    AutoModelForCausalLM.from_pretrained(find_snapshot(merged_dir))
    print(
        f"\nThe merged snapshot beat the live model at {len(gains)} of {len(records)} merges."
        f"\nAt step {last['step']} live has loss {last['live_loss']:.4f} (perplexity {last['live_perplexity']:.3f}), "
        f"merged {last['merged_loss']:.4f} ({last['merged_perplexity']:.3f}):"
        f"\na gain of {last['gain']:.4f} ± {last['gain_stderr']:.4f} nats per byte on held-out text that the weights "
        "were not chosen on."
        f"\nA merged snapshot was as good as live is now {last['steps_saved']} steps ago."
        f"\nThe callback took {100 * last['overhead']:.0f} % of {time.perf_counter() - started:.0f} s "
        "(on a model this small a search costs as much as many training steps)."
        f"\n\nBest snapshot: {merged_dir / 'best'} (step {best['step']}, loss {best['merged_loss']:.4f})"
        f"\n    AutoModelForCausalLM.from_pretrained({str(merged_dir / 'best')!r})"
        f"\nPlot:          {output / 'demo.png'}"
        f"\nLogs:          .venv/bin/tensorboard --logdir {output}"
    )
    assert callback.merger is not None


if __name__ == "__main__":
    main()
