"""The model card of a snapshot for Hugging Face: what was merged, what it is worth, how it is loaded."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..metrics import with_error
from .checksums import README
from .snapshots import package_versions

_TAGS = ["checkpoint-merging", "weight-averaging", "traj-merge-callback"]


def write_card(folder: Path, merge: dict[str, Any], base_model: str = "") -> None:
    """Write the card of a Hugging Face model into its folder; what PEFT has written there keeps its metadata.

    Args:
        folder: of the snapshot.
        merge: its merge.json.
        base_model: what the run began with: a name on the Hub, or anything else, which is left out.
    """
    try:
        from huggingface_hub import ModelCard, ModelCardData
    except ImportError:  # a model of another library that is saved in the same way
        return
    path = folder / README
    data = ModelCard.load(path).data if path.is_file() else ModelCardData(library_name="transformers")
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base_model) and not os.path.exists(base_model):  # noqa: PTH110
        data.base_model = base_model
    data.tags = sorted({*(data.tags or []), *_TAGS})
    path.write_text(f"---\n{data.to_yaml()}\n---\n\n{_text(merge)}", encoding="utf-8")


def _text(merge: dict[str, Any]) -> str:
    report, step = merge["report_split"], merge["step"]
    kept = merge["source"] == "live"
    what = "The live weights, as no merge was better on the search split" if kept else "A merge of recent checkpoints"
    lines = [
        f"# Step {step}, {'live' if kept else 'merged'}",
        "",
        f"{what} of one training run at optimizer step {step}, published by traj-merge-callback.",
        "",
        "| held-out loss, nats per token | live | this model | gain |",
        "|---|---|---|---|",
        _row("all", report),
        *(_row(name, losses) for name, losses in report["domains"].items()),
        "",
        "Measured on held-out sequences that the merge weights were not chosen on; ± is one standard error of paired "
        "differences.",
        "",
        "```python",
        *_loading(merge),
        "```",
        "",
        "## Recipe",
        "",
        f"Search `{merge['search']}`, rows `{merge['row']}`. `merge.json` holds all of it. Run `{merge['run']}`.",
        "",
        "| steps | checkpoints | weight |",
        "|---|---|---|",
    ]
    for (first, last, samples), weight in zip(merge["row_spans"], merge["weights"], strict=True):
        lines.append(f"| {last if first == last else f'{first} to {last}'} | {samples} | {weight:.4f} |")
    if merge["group_weights"]:
        lines += ["", f"Each of the groups {', '.join(merge['group_weights'])} has weights of its own, near these."]
    if merge["weighing"] != "rows":
        lines += ["", f"The merge is no weighted mean of them: `{merge['weighing']}` makes it of them."]
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    return "\n".join([*lines, "", f"Made with {versions}.", ""])


def _row(name: str, losses: dict[str, Any]) -> str:
    gain = with_error(losses["gain"], losses["gain_stderr"])
    return f"| {name} | {losses['live_loss']:.4f} | {losses['merged_loss']:.4f} | {gain} |"


def _loading(merge: dict[str, Any]) -> list[str]:
    kind = "CausalLM" if merge["model_class"].endswith("ForCausalLM") else None
    if merge["sharded"]:
        whole = "# if this folder holds weights.rank-*.safetensors, make a model folder of it first:"
        return [whole, "# traj-merge consolidate <this folder> model"]
    if merge["weights_format"] == "peft":
        name = "AutoPeftModelForCausalLM" if kind else "AutoPeftModel"
        return [f"from peft import {name}", "", f'model = {name}.from_pretrained("<this folder or repository>")']
    name = "AutoModelForCausalLM" if kind else "AutoModel"
    return [f"from transformers import {name}", "", f'model = {name}.from_pretrained("<this folder or repository>")']
