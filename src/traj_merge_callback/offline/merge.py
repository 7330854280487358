"""Merging checkpoints with given weights, without a model and without evaluating anything, as fast as the disk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..disk.checkpoints import ADAPTER
from ..disk.model_files import PEFT, SHARD_BYTES, STATE_DICT, TRANSFORMERS
from ..disk.output import new_folder
from ..disk.streamed import Described, write_model_folder
from ..search import resolve_search
from ..search.objective import Objective
from ..search.problem import Problem
from .checkpoints import Checkpoint, find_checkpoints
from .models import check_alike
from .progress import bar

# Numbers that one operation works on.
_CHUNK = 1 << 19


def merge(
    checkpoints: str | Path | Sequence[str | Path],
    *,
    output: str | Path,
    weights: Sequence[float] | None = None,
    recipe: str | None = None,
    recipe_options: Mapping[str, Any] | None = None,
    last: int | None = None,
    every: int | None = None,
    steps: tuple[int | None, int | None] | None = None,
    allow_pickle: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Path:
    """Write the merge of some checkpoints: sums in float32, written in the dtype of the newest checkpoint's tensors.

    Tensors that hold no floating-point numbers, configuration and tokenizer are the newest checkpoint's.

    Args:
        checkpoints, last, every, steps, allow_pickle: see :func:`find_checkpoints`.
        output: new folder.
        weights: of the checkpoints, oldest first; they must sum to 1.
        recipe: name of a closed-form recipe instead, such as "lawa" or "ema".
        recipe_options: its options.
        shard_bytes: of a weights file at most.
        progress: show a bar if it takes longer than a second.

    Returns:
        The folder.

    Raises:
        ValueError: weights that do not fit, or checkpoints that hold different tensors; the message names one.
        OSError: a file is missing, or there is too little space; nothing half-written is left.

    Example::

        merge("runs/out", last=4, recipe="lawa", output="averaged")
    """
    if (weights is None) == (recipe is None):
        raise ValueError(f"weights={weights}, recipe={recipe!r}: give one of them")
    with new_folder(output) as place:
        if recipe is not None:  # before anything is downloaded
            _check_recipe(recipe, recipe_options)
        found = find_checkpoints(checkpoints, last=last, every=every, steps=steps, allow_pickle=allow_pickle)
        values = _given(weights, found) if recipe is None else _of_recipe(recipe, recipe_options, found)
        check_alike(found)
        tensors = _tensors(found)
        newest = found[-1].tensors
        described = {name: Described(tuple(one.shape), one.dtype) for name, one in newest.items()}
        folder = found[-1].path if found[-1].path.is_dir() else None
        document = {
            "step": found[-1].step,
            "checkpoint_steps": [one.step for one in found],
            "weights": values.tolist(),
            "source": "merge",
            "search": recipe,
            "search_options": dict(recipe_options or {}),
            "weights_format": _format(folder),
            "merged_tensors": [name for name, one in newest.items() if one.is_floating_point()],
            "checkpoints": [one.name for one in found],
        }
        with bar("merging", sum(one.nbytes for one in described.values()), show=progress) as shown:

            def pieces(name: str) -> Iterator[Tensor]:
                for piece in merged(tensors[name], values) if name in tensors else [newest[name].contiguous()]:
                    if name in tensors and not _is_finite(piece):
                        _blame(name, found)
                        raise ValueError(
                            f"the merge is not finite in {name!r}: one of the checkpoints is not; leave it out"
                        )
                    yield piece
                    shown.advance(piece.nbytes)

            write_model_folder(place, folder, described, pieces, document, shard_bytes)
        return place


def merged(tensors: Sequence[Tensor], weights: np.ndarray) -> Iterator[Tensor]:
    """The weighted sum of tensors of one shape, in the last one's dtype, in flat pieces in order."""
    used = [(tensor.reshape(-1), float(weight)) for tensor, weight in zip(tensors, weights, strict=True) if weight]
    dtype, sums = tensors[-1].dtype, torch.float64 if tensors[-1].dtype is torch.float64 else torch.float32
    for start in range(0, tensors[-1].numel(), _CHUNK):
        parts = [(tensor[start : start + _CHUNK], weight) for tensor, weight in used]
        total = parts[0][0].to(sums, copy=True).mul_(parts[0][1])
        for part, weight in parts[1:]:
            # There is no arithmetic between float8 and other dtypes.
            total.add_(part if part.itemsize > 1 else part.to(sums), alpha=weight)
        yield total.to(dtype)


def _blame(name: str, found: Sequence[Checkpoint]) -> None:
    """Raise a ValueError that names the checkpoint whose tensor is not finite."""
    for one in found:
        if not bool(one.tensors[name].isfinite().all()):
            raise ValueError(f"{one.name} has numbers in {name!r} that are not finite: leave it out")


def _is_finite(piece: Tensor) -> bool:
    if piece.itemsize == 1:  # float8, which has no sums
        piece = piece.float()
    # A sum is made faster than numbers are looked at one by one, and shows that one is not finite.
    return math.isfinite(float(piece.sum())) or bool(piece.isfinite().all())


def _format(folder: Path | None) -> str:
    if folder is None or not ((folder / "config.json").is_file() or (folder / ADAPTER).is_file()):
        return STATE_DICT
    return PEFT if (folder / ADAPTER).is_file() else TRANSFORMERS


def _given(weights: Sequence[float] | None, found: Sequence[Checkpoint]) -> np.ndarray:
    values = np.asarray(weights, dtype=np.float64)
    if values.shape != (len(found),):
        steps = ", ".join(str(one.step) for one in found)
        raise ValueError(f"weights={weights}: there are {len(found)} checkpoints, of steps {steps}: give one for each")
    if not np.isfinite(values).all() or not math.isclose(values.sum(), 1.0, abs_tol=1e-6):
        raise ValueError(f"weights={weights}: must be numbers that sum to 1; these sum to {values.sum():.6g}")
    return values


def _check_recipe(recipe: str, options: Mapping[str, Any] | None) -> None:
    search = resolve_search(recipe, dict(options or {}))
    if not search.closed_form or search.average_rate is not None:
        raise ValueError(
            f"recipe={recipe!r} needs held-out losses or more than checkpoints: use search (traj-merge search --search "
            f"{recipe})"
        )


def _of_recipe(recipe: str, options: Mapping[str, Any] | None, found: Sequence[Checkpoint]) -> np.ndarray:
    nothing = np.zeros(1)  # what a closed form does not look at
    objective = Objective((frozenset({"heldout"}),), np.ones(1), nothing, np.ones(1))
    problem = Problem(tuple(one.step for one in found), 1, objective)
    search: Any = resolve_search(recipe)
    weights: np.ndarray = search(problem, **(options or {})).ask()
    return weights


def _tensors(found: Sequence[Checkpoint]) -> dict[str, list[Tensor]]:
    """For each floating-point tensor of the newest checkpoint those of all checkpoints, oldest first."""
    newest = found[-1]
    for one in found[:-1]:
        if differ := one.tensors.keys() ^ newest.tensors.keys():
            name = min(differ)
            has, lacks = (one, newest) if name in one.tensors else (newest, one)
            raise ValueError(
                f"{has.name} has {name!r} and {lacks.name} has not: these are not checkpoints of one model"
            )
        for name, tensor in newest.tensors.items():
            other = one.tensors[name]
            if other.shape != tensor.shape:
                raise ValueError(
                    f"{name!r} is {tuple(other.shape)} in {one.name}, and {tuple(tensor.shape)} in {newest.name}: "
                    "these are not checkpoints of one model"
                )
            if other.is_floating_point() != tensor.is_floating_point():
                raise ValueError(f"{name!r} is {other.dtype} in {one.name}, and {tensor.dtype} in {newest.name}")
    _check_not_quantized(newest)
    # What is the same in all, such as a mask with -inf in it, is not summed up.
    names = [
        name
        for name, tensor in newest.tensors.items()
        if tensor.is_floating_point() and (_is_finite(tensor) or not _are_equal(name, found))
    ]
    return {name: [one.tensors[name] for one in found] for name in names}


def _are_equal(name: str, found: Sequence[Checkpoint]) -> bool:
    return all(torch.equal(one.tensors[name], found[-1].tensors[name]) for one in found[:-1])


def _check_not_quantized(checkpoint: Checkpoint) -> None:
    tensors = checkpoint.tensors
    for name, tensor in tensors.items():
        is_matrix = name.endswith("weight") and tensor.dim() > 1 and not tensor.is_floating_point()
        if is_matrix or any(f"{name}{suffix}" in tensors for suffix in ("_scale", "_scale_inv")):
            raise ValueError(
                f"{checkpoint.name} has {name!r} as {tensor.dtype}: quantized weights are not merged; merge the "
                "checkpoints that they were made of"
            )
