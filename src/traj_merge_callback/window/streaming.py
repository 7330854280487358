"""Reading stretches of rows one after the other, on the device that works on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .storage import BLOCK, Rows

Stretch = tuple[Rows, int, slice]


def stretches(wanted: Sequence[Stretch], device: torch.device) -> Iterator[Tensor]:
    """The columns of rows that are wanted, as float32 deltas to their rows' base; each is valid until the next one.

    From CPU memory to a CUDA device the next stretch is copied, on a stream of its own, while one is worked on.

    Args:
        wanted: rows, the index of one of them, and a slice of its columns.
        device: where the stretches are worked on.
    """
    longest = max((part.stop - part.start for _, _, part in wanted), default=0)
    scratch = torch.empty(longest + 2 * BLOCK, device=device)
    stored = [rows.stored(index, part) for rows, index, part in wanted]
    to_cuda = device.type == "cuda" and stored and not stored[0][0].is_cuda
    for (rows, _, part), tensors in zip(wanted, _sent(stored, device) if to_cuda else stored, strict=True):
        yield rows.decode(tuple(tensor.to(device) for tensor in tensors), part, scratch)


def _sent(stored: list[tuple[Tensor, ...]], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    copying, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    arrived: list[tuple[tuple[Tensor, ...], torch.cuda.Event]] = []

    def send(tensors: tuple[Tensor, ...]) -> None:
        # Memory that the computation has just given back may still be read by it.
        copying.wait_stream(computing)
        with torch.cuda.stream(copying):
            there = tuple(tensor.to(device, non_blocking=True) for tensor in tensors)
            arrived.append((there, copying.record_event()))

    send(stored[0])
    for index in range(len(stored)):
        there, event = arrived.pop()
        if index + 1 < len(stored):
            send(stored[index + 1])
        computing.wait_event(event)
        for tensor in there:
            tensor.record_stream(computing)
        yield there
