"""Optimizers whose weights have a mode for training and another for evaluation, such as schedule-free ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def has_modes(optimizer: Any) -> bool:
    """Whether an optimizer has ``train()`` and ``eval()``; not a wrapper, whose optimizer is seen by itself."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval")) and not hasattr(
        optimizer, "optimizer"
    )


@contextmanager
@torch.no_grad()
def evaluated(optimizers: Iterable[Any], tensors: Iterable[Tensor]) -> Iterator[bool]:
    """Within the context tensors hold what a trainer evaluates: the weights of their optimizers' eval mode.

    Going to that mode and back rounds, so what tensors held is copied before and put back bit for bit.

    Args:
        optimizers: with ``train()`` and ``eval()``; those that are in eval mode already are left there.
        tensors: the parameters that are to be read.

    Yields:
        Whether any weights were written, and will be at the end: reading has to end within the context.
    """
    wanted = {id(tensor) for tensor in tensors}
    switched: list[tuple[Any, list[tuple[Tensor, Tensor]]]] = []
    try:
        for optimizer in optimizers:
            groups = optimizer.param_groups
            held = [p for group in groups for p in group["params"]]
            # The optimizers of the package schedulefree say in which mode they are.
            if not any(group.get("train_mode", True) for group in groups) or wanted.isdisjoint(map(id, held)):
                continue
            saved = [(parameter, parameter.detach().clone()) for parameter in held]
            switched.append((optimizer, saved))
            optimizer.eval()
            if _hold(saved):
                switched.pop()
                optimizer.train()
                if not _hold(saved):  # it was in eval mode
                    optimizer.eval()
                    _put_back(saved)
        yield bool(switched)
    finally:
        for optimizer, saved in switched:
            optimizer.train()
            _put_back(saved)


def _hold(saved: list[tuple[Tensor, Tensor]]) -> bool:
    return all(torch.equal(parameter, value) for parameter, value in saved)


def _put_back(saved: list[tuple[Tensor, Tensor]]) -> None:
    for parameter, value in saved:
        parameter.data.copy_(value)
