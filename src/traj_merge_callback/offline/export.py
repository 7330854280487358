"""A snapshot's merge as a recipe for another tool."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

from ..disk.snapshots import read_merge, snapshot_folder
from ..search.checks import choice

FORMATS = ("mergekit",)
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def export(folder: str | Path, *, format: str = "mergekit") -> str:
    """The YAML with which mergekit makes the same merge of the same checkpoints.

    Args:
        folder: a snapshot made of checkpoints on the disk or the Hub.
        format: "mergekit".

    Raises:
        ValueError: the snapshot was made of rows that are no checkpoints, or with weights for each parameter group.
    """
    choice("format", format, FORMATS)
    folder = snapshot_folder(folder)
    merge = read_merge(folder)
    names, weights = merge.get("checkpoints"), merge.get("weights")
    if not names:
        raise ValueError(
            f"{folder} was merged while its run went on, of rows that are no files: mergekit cannot make it"
        )
    if merge.get("group_weights"):
        raise ValueError(f"{folder} has merge weights for each parameter group, which mergekit's linear merge has not")
    lines = ["merge_method: linear", "models:"]
    for name, weight in zip(names, weights or [], strict=True):
        path = Path(name)
        lines += [f"  - model: {json.dumps(str(path.resolve()) if path.exists() else name)}", "    parameters:"]
        lines.append(f"      weight: {weight!r}")
    lines += ["parameters:", "  normalize: false", "dtype: float32", f"out_dtype: {_dtype(folder)}"]
    return "\n".join(lines) + "\n"


def _dtype(folder: Path) -> str:
    """The dtype of most tensors of a model folder."""
    found = sorted(folder.glob("*.safetensors"))
    with safe_open(found[0], framework="pt") as opened:
        kinds = [opened.get_slice(name).get_dtype() for name in opened.keys()]  # noqa: SIM118
    return _DTYPES.get(max(set(kinds), key=kinds.count), "float32")
