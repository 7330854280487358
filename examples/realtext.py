"""Real text that is on every machine with Python and torch, as blocks of bytes: the vocabulary is 0 to 255."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256


def python_source() -> list[bytes]:
    """Every module of Python's standard library, tests and third-party packages left out."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idlelib", "site-packages", "pydoc_data", "lib2to3", "__pycache__"}
    paths = sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))
    return [path.read_bytes() for path in paths]


def cpp_headers() -> list[bytes]:
    """The C++ headers that torch installs."""
    root = Path(torch.__file__).parent / "include"
    return [path.read_bytes() for path in sorted(root.rglob("*.h"))]


def language_reference() -> list[bytes]:
    """The topics of Python's language reference, English prose."""
    from pydoc_data.topics import topics

    return [topics[name].encode() for name in sorted(topics)]


def split_blocks(files: list[bytes], length: int, heldout_every: int = 10) -> tuple[Tensor, Tensor]:
    """Cut files into blocks of ``length`` bytes and hold every tenth file out.

    Returns:
        Training blocks and held-out blocks, int64 of shape ``(blocks, length)``, each in a fixed shuffled order. No
        file is in both.
    """
    parts = [[f for i, f in enumerate(files) if (i % heldout_every == 0) is heldout] for heldout in (False, True)]
    train, heldout = (_blocks(b"\n".join(part), length) for part in parts)
    return train, heldout


def _blocks(text: bytes, length: int) -> Tensor:
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    blocks = data[: len(data) // length * length].view(-1, length)
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))]


class Blocks(torch.utils.data.Dataset):
    """Blocks as a dataset of ``{"input_ids", "labels"}``, what Hugging Face's causal language models take."""

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}
