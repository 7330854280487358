"""The training runs that ``pretrain.py`` measures: their text, their model, and a step of them."""

from __future__ import annotations

import sys
import tempfile
import zlib
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from realtext import cpp_headers, python_source
from traj_merge_callback import TrajectoryMerger


def text_of_this_machine() -> tuple[bytes, bytes]:
    """Source files to train on, and every tenth one to hold out."""
    texts = python_source() + cpp_headers()
    held_out = [text for index, text in enumerate(texts) if index % 10 == 0]
    return b"\n".join(text for index, text in enumerate(texts) if index % 10), b"\n".join(held_out)


def blocks(text: bytes, length: int) -> Tensor:
    """Cut a text into shuffled blocks."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    data = data[: len(data) // length * length].view(-1, length)
    return data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))]


def packed(train: bytes, heldout: bytes) -> bytes:
    """Both texts as one, compressed."""
    return zlib.compress(len(train).to_bytes(8, "little") + train + heldout, 9)


def unpacked(data: bytes) -> tuple[bytes, bytes]:
    """The texts that :func:`packed` made one."""
    found = zlib.decompress(data)
    size = int.from_bytes(found[:8], "little")
    return found[8 : 8 + size], found[8 + size :]


class Bench:
    """What all parts share: the text, the model's size, and how a step is taken."""

    def __init__(self, device: torch.device, train: bytes, heldout: bytes, rehearse: bool) -> None:
        self.device = device
        self.length, self.sequences = (64, 2) if rehearse else (1024, 24)
        self.layers, self.width = (2, 32) if rehearse else (12, 768)
        self.train, self.heldout = blocks(train, self.length), blocks(heldout, self.length)

    def build(self) -> nn.Module:
        """The model, always with the same weights."""
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=256,
            n_positions=self.length,
            n_embd=self.width,
            n_layer=self.layers,
            n_head=self.width // 16 if self.width < 64 else self.width // 64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
        return GPT2LMHeadModel(config).to(self.device)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW at a constant rate."""
        return torch.optim.AdamW(model.parameters(), lr=6e-4, weight_decay=0.1, fused=self.device.type == "cuda")

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast to bfloat16 on a GPU."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def backward(self, model: nn.Module, step: int) -> None:
        """Forward and backward on the batch of a step."""
        generator = torch.Generator().manual_seed(step)
        batch = self.train[torch.randint(len(self.train), (self.sequences,), generator=generator)]
        batch = batch.to(self.device, non_blocking=True).long()
        with self.precision():
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()

    def batches(self, count: int) -> list[dict[str, Tensor]]:
        """Held-out batches."""
        chosen = self.heldout[: count * self.sequences].long().split(self.sequences)
        return [{"input_ids": batch, "labels": batch} for batch in chosen]

    def merger(self, **options: Any) -> TrajectoryMerger:
        """The engine, with its defaults but for the options."""
        defaults: dict[str, Any] = {"output_dir": tempfile.mkdtemp(), "merge_at_end": False}
        return TrajectoryMerger(self.batches(16), precision=self.precision, **{**defaults, **options})

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
