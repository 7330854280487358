"""A model's weights as files: written by ``save_pretrained`` where a model has it, as a plain state dict elsewhere."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..window.devices import side_stream
from ..window.layout import ParameterLayout, persistent_buffers
from ..window.names import clean_name, unwrap
from ..window.sharding import has_fsdp
from .checksums import check_document, check_files
from .snapshots import read_merge, snapshot_folder
from .untrusted import damage_of, safetensors_in, shards_in, texts

STATE_DICT, TRANSFORMERS, PEFT = "state_dict", "transformers", "peft"
# Bytes of a weights file at most; a model of more is sharded, as Hugging Face does.
SHARD_BYTES = 5_000_000_000
#: Of a safetensors file, without which transformers reads none.
METADATA = {"format": "pt"}
# How often a link is followed that a run moves on while it is read.
_TRIES = 10


def weights_format(model: nn.Module) -> str:
    """How a snapshot of ``model`` is written: "transformers", "peft" or "state_dict"."""
    model = _under_fsdp(model)
    if hasattr(model, "peft_config") and hasattr(model, "save_pretrained"):
        return PEFT
    if hasattr(model, "save_pretrained") and hasattr(model, "config"):
        return TRANSFORMERS
    return STATE_DICT


def class_name(model: nn.Module) -> str:
    """The name of the class that the user wrote."""
    # fully_shard gives a module a class of its own.
    return type(_under_fsdp(model)).__name__.removeprefix("FSDP")


def _under_fsdp(model: nn.Module) -> nn.Module:
    """The model under wrappers, FSDP's first version included: it knows how the model is saved."""
    model = unwrap(model)
    return getattr(model, "_fsdp_wrapped_module", model)


def collect_weights(
    model: nn.Module, layout: ParameterLayout, *, changed: Set[str] = frozenset(), at_once: bool = False
) -> Callable[[Path], None]:
    """Collect the weights that ``model`` holds now; the function returned writes them into an existing folder, later.

    Until then the merged row must stay as it is, unless it is copied to the CPU ``at_once``. Of what is not merged,
    buffers are copied, because training goes on, and frozen parameters are not. A plain module's file holds the merged
    tensors and every other buffer of the state dict; frozen parameters are left out, but for those that ``changed``.
    """
    model = unwrap(model)
    merged = {slot.name for slot in layout.slots}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    frozen = {name for name, value in parameters.items() if not value.requires_grad and clean_name(name) not in merged}
    state = {name: value.detach() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    for name in state.keys() - parameters.keys():
        state[name] = state[name].clone()
    devices = {state[name].device for name in state.keys() - frozen}
    ready = {device: torch.cuda.current_stream(device).record_event() for device in devices if device.type == "cuda"}

    def copied(devices: Iterable[torch.device]) -> dict[str, Tensor]:
        return state | _on_cpu({name: state[name] for name in state.keys() - frozen}, devices, ready)

    now = copied(devices) if at_once else None

    def write(folder: Path) -> None:
        kept = copied(ready) if now is None else now
        if weights_format(model) == STATE_DICT:
            names = {clean_name(name) for name in parameters}
            kept = {clean_name(name): value for name, value in kept.items()}
            kept = {name: value for name, value in kept.items() if name in merged | changed or name not in names}
        _write(folder, model, kept)

    return write


def collect_gathered(
    model: nn.Module, layout: ParameterLayout, gathered: dict[int, Tensor], row: Tensor
) -> Callable[[Path], None]:
    """:func:`collect_weights` for a model sharded by FSDP.

    Args:
        model: the model, with its own weights.
        layout: of this rank's columns.
        gathered: whole merged tensors on the CPU, by the ``id`` of the live parameter.
        row: this rank's columns of the merge, for what is not gathered.
    """
    model = unwrap(model)
    views = layout.views(row)
    values = {}
    for slot, tensor in zip(layout.slots, layout.tensors(model), strict=True):
        view = views[slot.name]
        values[id(tensor)] = gathered[id(tensor)] if id(tensor) in gathered else view.to("cpu", slot.dtype, copy=True)
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named |= {name: places[0].tensor for name, places in persistent_buffers(model).items()}
    state = {
        clean_name(n): values[id(t)] if id(t) in values else t.detach().to("cpu", copy=True) for n, t in named.items()
    }
    model = _under_fsdp(model)
    return lambda folder: _write(folder, model, state)


def collect_description(model: nn.Module) -> Callable[[Path], None]:
    """Collect what a Hugging Face model's folder holds beside weights; the function returned writes it, later."""
    model = _under_fsdp(model)
    if weights_format(model) != TRANSFORMERS:
        return lambda folder: None
    config, generation = copy.deepcopy(model.config), copy.deepcopy(getattr(model, "generation_config", None))
    config.architectures = [class_name(model)]  # type: ignore[union-attr]

    def write(folder: Path) -> None:
        config.save_pretrained(folder)  # type: ignore[operator, union-attr]
        if generation is not None:
            generation.save_pretrained(folder)

    return write


def _write(folder: Path, model: nn.Module, state: dict[str, Tensor]) -> None:
    if weights_format(model) == STATE_DICT:
        _write_shards(folder, {name: value.contiguous() for name, value in state.items()}, SHARD_BYTES)
        return
    with _quiet_transformers():
        model.save_pretrained(folder, state_dict=state)  # type: ignore[operator]


def _on_cpu(
    state: dict[str, Tensor], devices: Iterable[torch.device], ready: dict[torch.device, torch.cuda.Event]
) -> dict[str, Tensor]:
    """Copies of the tensors on some devices, made beside what a GPU does otherwise; those that share memory still do.

    Args:
        state: tensors by name.
        devices: whose tensors are copied.
        ready: for each GPU, the event after which its tensors may be read.
    """
    moved: dict[tuple[int, torch.Size], Tensor] = {}
    for device in devices:
        with torch.cuda.stream(side_stream(device, "snapshot")) if device in ready else nullcontext():
            if device in ready:
                torch.cuda.current_stream(device).wait_event(ready[device])
            for tensor in state.values():
                if tensor.device == device:
                    moved[tensor.data_ptr(), tensor.shape] = tensor.to("cpu", copy=True)
    return {name: moved.get((tensor.data_ptr(), tensor.shape), tensor) for name, tensor in state.items()}


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Writing a snapshot must not draw over the trainer's progress bar."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _write_shards(folder: Path, state: dict[str, Tensor], shard_bytes: int) -> None:
    def write(path: Path, names: list[str]) -> None:
        save_file({name: state[name] for name in names}, path, metadata=METADATA)

    write_shards(folder, {name: tensor.nbytes for name, tensor in state.items()}, write, shard_bytes)


def write_shards(
    folder: Path, sizes: dict[str, int], write: Callable[[Path, list[str]], None], shard_bytes: int = SHARD_BYTES
) -> None:
    """One ``model.safetensors``, or several with ``model.safetensors.index.json`` like Hugging Face's.

    Args:
        folder: where to.
        sizes: bytes of each tensor.
        write: writes a safetensors file of the tensors with these names, with ``METADATA``.
        shard_bytes: of a shard at most, unless it is one tensor.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, nbytes in sizes.items():
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    if len(shards) == 1:
        write(folder / "model.safetensors", shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write(folder / file_name, names)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _read_shards(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if not os.path.lexists(index):
        return safetensors_in(folder / "model.safetensors")
    state: dict[str, Tensor] = {}
    for name in shards_in(index):
        state |= safetensors_in(folder / name)
    return state


@torch.no_grad()
def load_merged(folder: str | Path, model: nn.Module, *, verify: bool = False) -> dict[str, Any]:
    """Put a merged snapshot's weights into ``model``, in place.

    Args:
        folder: a snapshot's folder, or the ``best`` or ``latest`` link beside it.
        model: a model of the same architecture; wrappers (compile, DDP) are looked through.
        verify: check that every file is what was written, by the checksums in merge.json: about a second per GB.

    Returns:
        The snapshot's merge.json.

    Raises:
        FileNotFoundError: ``folder`` is no snapshot.
        ValueError: the snapshot is damaged, or does not fit the model; the message names the tensors, and the model is
            unchanged.

    Example::

        load_merged("merged/best", model)
    """
    for _ in range(_TRIES):
        place = snapshot_folder(folder)
        try:
            return _load(place, unwrap(model), verify=verify)
        except FileNotFoundError:
            if snapshot_folder(folder) == place:
                raise  # the link still leads there; otherwise a run that goes on has removed it meanwhile
    raise FileNotFoundError(f"{folder} leads to another snapshot each time it is read: name one of them")


def _load(folder: Path, model: nn.Module, *, verify: bool) -> dict[str, Any]:
    merge = read_merge(folder)
    if has_fsdp(model):
        raise ValueError("load_merged needs a whole model: load the snapshot before FSDP is applied")
    check_whole(folder, merge)
    weights_format = merge.get("weights_format")
    with damage_of(folder / "merge.json"):
        merged = set(texts(merge["merged_tensors"]))
    if verify:
        verify_snapshot(folder, merge)
    if weights_format == PEFT:
        _load_adapter(folder, model)
        return merge
    if weights_format not in (STATE_DICT, TRANSFORMERS):
        raise ValueError(f"{folder / 'merge.json'} is damaged: weights_format={weights_format!r}")
    state = _read_shards(folder)
    targets = {clean_name(name): value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    if weights_format == TRANSFORMERS and not state.keys() <= targets.keys():
        # save_pretrained stores some architectures under other names than the module's; only transformers knows them.
        # It is given the tensors, not the folder, in which it might find anything.
        with damage_of(folder), _quiet_transformers():
            whole = type(model).from_pretrained(None, config=model.config, state_dict=state)  # type: ignore[attr-defined]
        state = whole.state_dict()
    wrong = [f"{name} is not in the model" for name in state.keys() - targets.keys()]
    wrong += _misfits(state, targets, merged)
    wrong += [f"{name} is not in the snapshot" for name in merged - _names_of(state, targets)]
    _raise_misfits(wrong, folder, model)
    for name, value in state.items():
        targets[name].copy_(value)
    return merge


def check_whole(folder: Path, merge: dict[str, Any]) -> None:
    """Raise a ValueError if a snapshot with this merge.json is in parts."""
    if merge.get("sharded"):
        raise ValueError(f"snapshot {folder} is in parts: make a model folder of it first, with traj-merge consolidate")


def verify_snapshot(folder: Path, merge: dict[str, Any]) -> None:
    """Check that every file of a snapshot is what was written, but for its model card.

    Args:
        folder: its own folder.
        merge: its merge.json.

    Raises:
        FileNotFoundError, ValueError: one is missing, was changed, or was not written with it.
    """
    check_document(folder / "merge.json", merge)
    check_files(folder, merge)
    strangers = {path.name for path in folder.iterdir() if ".safetensors" in path.suffixes} - merge["checksums"].keys()
    if strangers:
        raise ValueError(f"{folder} is damaged: {min(strangers)} was not written with it")


def _load_adapter(folder: Path, model: nn.Module) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    state = safetensors_in(folder / "adapter_model.safetensors")
    if not hasattr(model, "peft_config"):
        raise ValueError(f"snapshot {folder} is an adapter, and {type(model).__name__} is not a PEFT model")
    targets = get_peft_model_state_dict(model, save_embedding_layers=False)
    wrong = [f"{name} is not in the snapshot" for name in targets.keys() - state.keys()]
    _raise_misfits([*wrong, *_misfits(state, targets, state.keys())], folder, model)
    set_peft_model_state_dict(model, state)


def _misfits(state: dict[str, Tensor], targets: dict[str, Tensor], merged: Set[str]) -> Iterator[str]:
    """What keeps the tensors of a snapshot from being copied into those of a model, one sentence for each.

    Those that are merged must be finite; buffers that are not may hold anything.
    """
    for name, value in state.items():
        if (target := targets.get(name)) is None:
            continue
        if value.shape != target.shape:
            yield f"{name} is {tuple(value.shape)} in the snapshot, {tuple(target.shape)} in the model"
        elif value.is_floating_point() != target.is_floating_point():
            yield f"{name} is {value.dtype} in the snapshot, {target.dtype} in the model"
        elif name in merged and not value.to(target.dtype).isfinite().all():
            yield f"{name} holds numbers that are not finite in {target.dtype}"


def _raise_misfits(wrong: list[str], folder: Path, model: nn.Module) -> None:
    if wrong:
        raise ValueError(f"snapshot {folder} does not fit {type(model).__name__}: {'; '.join(sorted(wrong)[:5])}")


def _names_of(state: dict[str, Tensor], targets: dict[str, Tensor]) -> set[str]:
    """Every name of the model whose storage a tensor of ``state`` fills, tied names included."""
    filled = {targets[name].data_ptr() for name in state if name in targets}
    return {name for name, target in targets.items() if target.data_ptr() in filled}


def collect_checkpoint(name: str, checkpoint: dict[str, Any], model: nn.Module) -> Callable[[Path], None]:
    """The function that writes a trainer's checkpoint of the weights that ``model`` holds now, later."""
    buffers = {buffer for buffer, _ in model.named_buffers(remove_duplicate=False)}
    for key, value in checkpoint["state_dict"].items():
        # Training goes on to write buffers, and a GPU's memory may be needed.
        checkpoint["state_dict"][key] = value.clone() if key in buffers else value.cpu()
    return lambda folder: torch.save(checkpoint, folder / name)


def collect_pretrained(owner: Any) -> Callable[[Path], None]:
    """The function that writes a tokenizer, or whatever else has ``save_pretrained``, into a folder."""

    def write(folder: Path) -> None:
        if hasattr(owner, "save_pretrained"):
            owner.save_pretrained(folder)

    return write
