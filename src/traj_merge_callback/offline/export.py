"""A snapshot's merge as a recipe for another tool."""

from __future__ import annotations

import json
from pathlib import Path

from ..disk.checkpoints import weights_of
from ..disk.snapshots import read_merge, snapshot_folder
from ..disk.untrusted import damage_of, numbers, texts
from ..search.checks import choice

FORMATS = ("mergekit",)


def export(folder: str | Path, *, format: str = "mergekit") -> str:
    """The YAML with which mergekit makes the same merge of the same checkpoints.

    Args:
        folder: a snapshot made of checkpoints on the disk or the Hub.
        format: "mergekit".

    Raises:
        ValueError: the snapshot was made of rows that are no checkpoints, or with weights for each parameter group or
            parameter.
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
    if merge.get("weighing", "rows") != "rows":
        raise ValueError(
            f"{folder} was merged with search={merge.get('search')!r}, which makes no weighted mean of "
            "checkpoints: mergekit's linear merge does"
        )
    lines = ["merge_method: linear", "models:"]
    with damage_of(folder / "merge.json"):
        names, weights = texts(names), numbers(weights)
        if len(names) != len(weights):
            raise TypeError(f"{len(weights)} weights of {len(names)} checkpoints")
        for name, weight in zip(names, weights, strict=True):
            lines += [f"  - model: {json.dumps(name)}", "    parameters:", f"      weight: {float(weight)!r}"]
    lines += ["parameters:", "  normalize: false", "dtype: float32", f"out_dtype: {_dtype(folder)}"]
    return "\n".join(lines) + "\n"


def _dtype(folder: Path) -> str:
    """The dtype of most tensors of a model folder."""
    kinds = [str(one.dtype).removeprefix("torch.") for one in weights_of(folder).values()]
    return max(set(kinds), key=kinds.count)
