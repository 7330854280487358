"""Rows in files that are mapped into memory (``window_storage="disk"``)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..window.storage import Allocate


def on_disk(folder: Path) -> Allocate:
    """Tensors that are safetensors files in ``folder``, mapped into memory: the system keeps in RAM what fits."""

    def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        folder.mkdir(parents=True, exist_ok=True)
        size = math.prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        kind = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8"}[dtype]
        header = json.dumps({name: {"dtype": kind, "shape": shape, "data_offsets": [0, size]}}).encode()
        header += b" " * (-len(header) % 64 + 56)  # with its length in front, data begin at a multiple of 64
        path = folder / f"{name}.safetensors"
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)
        mapped = np.memmap(path, dtype=np.uint8, mode="r+", offset=8 + len(header), shape=(size,))
        return torch.from_numpy(mapped).view(dtype).view(shape)

    return allocate
