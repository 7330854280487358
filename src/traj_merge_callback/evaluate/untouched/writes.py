"""Undoing what code writes into parameters: each is copied before the first write, however the write is spelled."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Undone(TorchDispatchMode):
    """A context after which tensors hold what they held before, also where they were written through ``.data``.

    Every operation passes through here, which costs about as much as starting it; memory is needed for tensors that are
    written, and no others. Not seen is memory written by other ways than torch's, such as through a numpy view.

    Args:
        tensors: what may not change, by names. They may share memory.
    """

    supports_higher_order_operators = True

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__()
        # By storage, of which tensors may share one: all parameters are views of one row when a candidate is evaluated.
        self._watched: dict[int, list[tuple[str, Tensor]]] = {}
        for name, tensor in tensors:
            if (storage := _storage(tensor)) is not None:
                self._watched.setdefault(storage, []).append((name, tensor.detach()))
        self._saved: list[tuple[Tensor, Tensor]] = []
        #: Names of the tensors that were written.
        self.written: list[str] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What is compiled stays compiled; compiled graphs write no parameters but by operations that are seen."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for place in _written(func):
            value = args[place] if isinstance(place, int) and place < len(args) else kwargs.get(place)
            for tensor in tree_iter(value):
                if isinstance(tensor, Tensor):
                    self._before_write(tensor)
        return func(*args, **kwargs)

    def _before_write(self, target: Tensor) -> None:
        watched = self._watched.get(_storage(target) or 0, [])
        for entry in [entry for entry in watched if _overlap(entry[1], target)]:
            watched[:] = [other for other in watched if other is not entry]
            self.written.append(entry[0])
            self._saved.append((entry[1], entry[1].clone()))

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        with torch.no_grad():
            for tensor, saved in self._saved:
                tensor.copy_(saved)
        self._saved = []


@functools.cache
def _written(func: Any) -> tuple[int | str, ...]:
    """Positions, and names, of the arguments that an operation writes."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return ()
    found: list[int | str] = []
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += [argument.name] if argument.kwarg_only else [index, argument.name]
    return tuple(found)


def _storage(tensor: Tensor) -> int | None:
    """Where a tensor's memory begins; None for one that has none of its own, as some subclasses have not."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):
        return None


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether the ranges of memory of two tensors of one storage have a byte in common."""
    (first, end), (other_first, other_end) = _range(one), _range(other)
    return first < other_end and other_first < end


def _range(tensor: Tensor) -> tuple[int, int]:
    if tensor.numel() == 0:
        return 0, 0
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (span + 1) * tensor.element_size()
