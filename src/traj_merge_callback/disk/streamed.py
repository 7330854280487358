"""Weights files and model folders written piece by piece, so that no tensor of them has to be in memory."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from .atomic import check_space, whole_folder
from .checksums import check_document, check_files, checksums_of
from .model_files import METADATA, PEFT, SHARD_BYTES, write_shards
from .output import new_folder
from .parts import PartsIndex, check_parts, read_tensors, tensor_sizes
from .snapshots import FORMAT_VERSION, read_merge, snapshot_folder, write_document
from .untrusted import own_file

#: The dtypes of the format, by the names that it has for them.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
# What a model folder holds beside weights: configurations, tokenizers, code.
_SMALL = (".json", ".model", ".txt", ".jinja", ".py", ".tiktoken", ".spm")
_NOT_COPIED = re.compile(r"trainer_state\.json|merge\.json|\w*_results\.json|.*\.index\.json")


class Described(NamedTuple):
    """Shape and dtype of a tensor that is yet to come."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_streamed(
    path: Path,
    tensors: Mapping[str, Described],
    pieces: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str],
) -> str:
    """Write a safetensors file (https://github.com/huggingface/safetensors: eight bytes that give the length of a JSON
    header, the header, the tensors' bytes one after another).

    Args:
        path: the new file.
        tensors: what it will hold, by name.
        pieces: gives the numbers of a tensor in order, as contiguous CPU tensors of its dtype.
        metadata: of the file.

    Returns:
        Its SHA-256, taken of each piece while it is written.

    Raises:
        OSError: it cannot be written.
        ValueError: a dtype that the format does not have, or pieces that are not as long as the tensor.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    # Large numbers first, as the format's own writer does: then every tensor begins where its dtype may.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    for name, one in tensors.items():
        if one.dtype not in DTYPES:
            raise ValueError(f"tensor {name!r} is {one.dtype}, which safetensors files do not hold")
        header[name] = {"dtype": DTYPES[one.dtype], "shape": [*one.shape], "data_offsets": [end, end + one.nbytes]}
        end += one.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as beside:

        def write(data: memoryview) -> None:
            hashed = beside.submit(digest.update, data)
            rest = data
            while rest:
                rest = rest[file.write(rest) :]
            hashed.result()

        write(memoryview(len(text).to_bytes(8, "little") + text))
        for name, one in tensors.items():
            written = 0
            for piece in pieces(name):
                data = memoryview(piece.reshape(-1).view(torch.uint8).numpy().data)
                write(data)
                written += len(data)
            if written != one.nbytes:
                raise ValueError(f"tensor {name!r} came as {written} bytes, and should have {one.nbytes}")
    return digest.hexdigest()


def write_model_folder(
    output: Path,
    beside: Path | None,
    tensors: Mapping[str, Described],
    pieces: Callable[[str], Iterable[Tensor]],
    document: Mapping[str, Any],
    shard_bytes: int,
) -> None:
    """Write a folder with weights, a merge.json, and the small files of another model folder; whole or not at all.

    Args:
        output: a path where nothing is.
        beside: whose configuration and tokenizer are copied; None: nobody's.
        tensors, pieces: see :func:`write_streamed`.
        document: of merge.json.
        shard_bytes: of a weights file at most.

    Raises:
        OSError: there is too little space, or it cannot be written to.
        ValueError: a small file is a link to somewhere else.
    """
    sizes = {name: one.nbytes for name, one in tensors.items()}
    check_space(output, sum(sizes.values()))
    is_adapter = document.get("weights_format") == PEFT
    checksums: dict[str, str] = {}

    def write(path: Path, names: list[str]) -> None:
        if is_adapter:
            path = path.with_name("adapter_model.safetensors")
        checksums[path.name] = write_streamed(path, {name: tensors[name] for name in names}, pieces, METADATA)

    small = [
        own_file(path)
        for path in (sorted(beside.iterdir()) if beside is not None else [])
        if path.is_file() and path.suffix in _SMALL and not _NOT_COPIED.fullmatch(path.name)
    ]
    with whole_folder(output) as temporary:
        # Adapters are read from one file.
        write_shards(temporary, sizes, write, sum(sizes.values()) if is_adapter else shard_bytes)
        for path in small:
            shutil.copyfile(path, temporary / path.name)
        write_document(temporary, {"version": FORMAT_VERSION, **document}, checksums_of(temporary, known=checksums))


def consolidate_snapshot(folder: str | Path, output: str | Path, *, shard_bytes: int = SHARD_BYTES) -> Path:
    """Make a whole snapshot, which ``from_pretrained`` and ``load_merged`` read, of a sharded one.

    One safetensors file of the output is in memory at a time.

    Args:
        folder: the snapshot.
        output: the new folder, which exists whole or not at all.
        shard_bytes: bytes of a safetensors file at most.

    Returns:
        The new folder.

    Raises:
        FileNotFoundError: ``folder`` is no snapshot, or a part of it is missing.
        FileExistsError: ``output`` is there and is not an empty folder.
        ValueError: it is not in parts, is damaged, or its parts are of another format version.
    """
    folder = snapshot_folder(folder)
    merge = read_merge(folder)
    if not merge.get("sharded"):
        raise ValueError(f"{folder} is not a snapshot in parts: it can be loaded as it is")
    if not isinstance(merge["sharded"], dict) or "parts" not in merge["sharded"]:
        raise ValueError(
            f"{folder} was written in parts by an earlier version of traj-merge-callback, in files of "
            "torch.distributed.checkpoint, which this version does not read: consolidate it with that version"
        )
    index = PartsIndex.from_json(merge["sharded"])
    check_parts(folder, index)
    if "checksum" in merge:
        check_document(folder / "merge.json", merge)
        check_files(folder, merge)
    with new_folder(output) as place, whole_folder(place) as temporary:

        def write(path: Path, names: list[str]) -> None:
            save_file(read_tensors(folder, index, names), path, metadata=METADATA)

        write_shards(temporary, tensor_sizes(index), write, shard_bytes)
        for path in folder.iterdir():
            # Weights are those of the parts, whatever other weights there may be.
            if path.is_file() and ".safetensors" not in path.suffixes and path.name != "merge.json":
                shutil.copy2(own_file(path), temporary / path.name)
        described = {key: value for key, value in merge.items() if key not in ("checksum", "checksums")}
        write_document(temporary, {**described, "sharded": None}, checksums_of(temporary))
    return place
