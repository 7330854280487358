"""A safetensors file written piece by piece, so that no tensor of it has to be in memory."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

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
) -> None:
    """Write a safetensors file (https://github.com/huggingface/safetensors: eight bytes that give the length of a JSON
    header, the header, the tensors' bytes one after another).

    Args:
        path: the new file.
        tensors: what it will hold, by name.
        pieces: gives the numbers of a tensor in order, as contiguous CPU tensors of its dtype.
        metadata: of the file.

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
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little"))
        _write_all(file, memoryview(text))
        for name, one in tensors.items():
            written = 0
            for piece in pieces(name):
                data = memoryview(piece.reshape(-1).view(torch.uint8).numpy())
                _write_all(file, data)
                written += len(data)
            if written != one.nbytes:
                raise ValueError(f"tensor {name!r} came as {written} bytes, and should have {one.nbytes}")


def _write_all(file: io.FileIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]
