"""The weights of checkpoints that somebody else has written: tensors by name, mapped into memory, nothing copied.

Read are model folders as Hugging Face writes them (sharded or not, adapters too), single safetensors files, Lightning's
``.ckpt`` and other files of ``torch.save``, and folders of ``torch.distributed.checkpoint``. What can only be read by
unpickling more than tensors is not read unless that is allowed.
"""

from __future__ import annotations

import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .mapped import unnamed
from .untrusted import damage_of, own_file, resolved, shards_in

#: Files of ``torch.save``.
PICKLED = (".ckpt", ".pt", ".pth", ".bin")
_INDEX, _WHOLE, ADAPTER = "model.safetensors.index.json", "model.safetensors", "adapter_model.safetensors"
_PICKLED_INDEX, _PICKLED_WHOLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
# The second is transformers' with FSDP.
_DISTRIBUTED = (".metadata", "pytorch_model_fsdp_0/.metadata")
_IN_FOLDERS = (_INDEX, _WHOLE, ADAPTER, _PICKLED_INDEX, _PICKLED_WHOLE, *_DISTRIBUTED)
# Where trainers keep a model's tensors in a file that holds more.
_STATES = ("state_dict", "model", "model_state_dict")
# What begins like this in a folder of torch.distributed.checkpoint is not of a model.
_NOT_MODEL = re.compile(
    r"(^|\.)(optim\w*|opt_\w*|(lr_)?scheduler\w*|rng\w*|dataloader\w*|loops|train_state|callbacks|chained_\d+)(\.|$)"
)


def is_checkpoint(path: Path) -> bool:
    """Whether there are weights at a path that :func:`weights_of` may read."""
    if path.is_dir():
        return any(os.path.lexists(path / name) for name in _IN_FOLDERS)
    return path.is_file() and path.suffix in (*PICKLED, ".safetensors")


def weights_of(path: Path, *, allow_pickle: bool = False) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint by the names that it stores them under, on the CPU, to be read only.

    Args:
        path: a folder or a file.
        allow_pickle: read ``pytorch_model.bin`` and torch.distributed.checkpoint, which are pickles. Of the first, as
            of ``.ckpt`` files always, nothing but tensors and plain values is unpickled; the metadata of the second is
            unpickled whole, and may run whatever whoever wrote it wants.

    Raises:
        FileNotFoundError: there are no weights, or files are missing.
        ValueError: a file is damaged, or can only be unpickled and may not be.
    """
    if path.is_file():
        return _pickled(path) if path.suffix in PICKLED else _mapped(path)
    # Of a whole file and an index transformers reads the file: the index may be left of an earlier save.
    for name in (_WHOLE, ADAPTER):
        if os.path.lexists(path / name):
            return _mapped(path / name)
    if os.path.lexists(index := path / _INDEX):
        return _all_of(index, _mapped)
    found = next((name for name in _IN_FOLDERS[3:] if os.path.lexists(path / name)), None)
    if found is None:
        raise _no_weights(path)
    if not allow_pickle:
        raise ValueError(
            f"{path / found} is a pickle, which can run code when it is read: pass allow_pickle=True "
            "(--allow-pickle) if you trust whoever wrote it"
        )
    if found == _PICKLED_INDEX:
        return _all_of(path / found, _pickled)
    return _pickled(path / found) if found == _PICKLED_WHOLE else _Distributed((path / found).parent)


def _no_weights(path: Path) -> Exception:
    if any(path.glob("*.rank-*.safetensors")):
        return ValueError(
            f"{path} is a snapshot in parts: make a model folder of it first, with traj-merge consolidate"
        )
    return FileNotFoundError(f"{path} holds no weights: none of {', '.join(_IN_FOLDERS)}")


def _all_of(index: Path, read: Any) -> dict[str, Tensor]:
    """The tensors of all files that an index names."""
    names = shards_in(resolved(index), (".safetensors", ".bin"))
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise FileNotFoundError(f"{index.parent}: {', '.join(missing)} of {len(names)} shards are missing")
    found: dict[str, Tensor] = {}
    for name in names:
        found |= read(index.parent / name)
    return found


def _mapped(path: Path) -> dict[str, Tensor]:
    own_file(resolved(path))  # the user named the folder: its links are followed
    with damage_of(path), safe_open(path, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def _pickled(path: Path) -> dict[str, Tensor]:
    found = _load(path)
    state = next((found[key] for key in _STATES if isinstance(found, dict) and isinstance(found.get(key), dict)), found)
    tensors = {str(name): value for name, value in state.items()} if isinstance(state, dict) else {}
    tensors = {name: value.detach() for name, value in tensors.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no state dict: looked for tensors by name, also under {', '.join(_STATES)}")
    return tensors


def _load(path: Path) -> Any:
    """A file of ``torch.save`` with nothing in it but tensors and plain values."""
    own_file(resolved(path))
    try:
        with damage_of(path):
            # Files from before torch 1.6 cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        global_name = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"{global_name[1]}, which" if global_name else "what is no tensor or plain value, and"
        raise ValueError(f"{path} is damaged, or holds {what} is not unpickled") from error
    except EOFError as error:
        raise ValueError(f"{path} is damaged: it ends too early") from error


def step_in(path: Path) -> int | None:
    """The optimizer step that Lightning has written into a checkpoint."""
    found = _load(path)
    step = found.get("global_step") if isinstance(found, dict) else None
    return step if isinstance(step, int) else None


class _Distributed(Mapping[str, Tensor]):
    """The model's tensors in a folder of torch.distributed.checkpoint.

    Each is read when it is first asked for, into a file without a name that is mapped into memory.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        from torch.distributed.checkpoint import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self._folder = folder
        try:
            with damage_of(folder / ".metadata"):
                found = FileSystemReader(folder).read_metadata().state_dict_metadata
        except (pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"{folder / '.metadata'} is damaged ({error})") from error
        self._tensors: dict[str, Any] = {
            name: one
            for name, one in found.items()
            if isinstance(one, TensorStorageMetadata) and not _NOT_MODEL.search(name)
        }
        self._read: dict[str, Tensor] = {}
        if not self._tensors:
            raise ValueError(f"{folder} holds no tensors of a model")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._read:
            described = self._tensors[name]
            self._read[name] = unnamed(Path(tempfile.gettempdir()), tuple(described.size), described.properties.dtype)
            self._fill(name)
        return self._read[name]

    def _fill(self, name: str) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            with damage_of(self._folder):
                dcp.load({name: self._read[name]}, checkpoint_id=self._folder, no_dist=True)
        except CheckpointException as error:  # no Exception
            cause = next(iter(error.failures.values()))[0]
            raise ValueError(f"{self._folder} is damaged: {name!r} cannot be read ({cause})") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
