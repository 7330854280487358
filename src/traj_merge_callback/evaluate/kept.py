"""What a merge takes from the live model beside merged tensors, as it was at the step of the merge.

A merge is evaluated and published while training goes on, which writes counters, masks and caches. Its numbers would be
those of weights of one step with buffers of another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..window.names import clean_name, unwrap
from .untouched.isolation import MODULE_INTERNALS, delayed_signals

# Larger tensors are kept only if they have been seen to change: frozen weights can be as large as the model.
_ALWAYS_KEPT = 2**16
# How many of its numbers tell that a tensor has changed where it was written through ``.data``.
_LOOKED_AT = 64
_PLAIN = (bool, int, float, str)


class _Place(NamedTuple):
    """Where a module holds a tensor or a number: its name in the model, the dict that has it, the key there."""

    name: str
    holder: dict[str, Any]
    key: str


class Kept:
    """What a model held at one step.

    Args:
        held: buffers, merged or not, and the tensors, numbers and strings that are attributes of modules.
        frozen: parameters that no row holds, and copies of them.
        changed: names of those among them that have changed since the window was made.
    """

    def __init__(
        self,
        held: Sequence[tuple[_Place, Any]] = (),
        frozen: Sequence[tuple[nn.Parameter, Tensor]] = (),
        changed: Set[str] = frozenset(),
    ) -> None:
        self._held = held
        self._frozen = frozen
        #: Names of frozen parameters that a snapshot is not complete without.
        self.changed = changed
        self._named: Mapping[str, Any] = {place.name: value for place, value in held}

    def buffer(self, name: str, live: Tensor) -> Tensor:
        """A buffer of the ``state_dict`` as it was; ``live``, as it is, where it was not kept."""
        found = self._named.get(name, live)
        assert isinstance(found, Tensor)
        return found

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within the context the model holds what it held then; an evaluation must write to copies of it."""
        held: list[tuple[_Place, Any]] = []
        frozen: list[tuple[nn.Parameter, Tensor]] = []
        moved: dict[tuple[int, torch.device], Tensor] = {}
        with delayed_signals():
            try:
                for place, value in self._held:
                    now = place.holder.get(place.key)
                    # What was removed since, or has become something else, stays so.
                    if isinstance(value, Tensor) and isinstance(now, Tensor):
                        one = id(value), now.device
                        held.append((place, now))
                        place.holder[place.key] = moved.setdefault(one, value.to(now.device))
                    elif type(value) is type(now) and not isinstance(value, Tensor):
                        held.append((place, now))
                        place.holder[place.key] = value
                for parameter, copy in self._frozen:
                    frozen.append((parameter, parameter.data))
                    parameter.data = copy.to(parameter.device)
                yield
            finally:
                for place, now in held:
                    place.holder[place.key] = now
                for parameter, data in frozen:
                    parameter.data = data


class Keeper:
    """Keeps what no row of a window holds.

    Small tensors are copied each time, on their device. Of larger ones, such as the frozen weights under an adapter,
    those are copied, to the CPU, that have been seen to change since the window was made.

    Args:
        model: the model being trained; wrappers (compile, DDP) are looked through.
        merged: names of the parameters that rows hold.
    """

    def __init__(self, model: nn.Module, merged: Set[str]) -> None:
        self._merged = merged
        self._looks: dict[str, _Look] = {}
        self._changing: set[str] = set()
        self.keep(model)

    @torch.no_grad()
    def keep(self, model: nn.Module) -> Kept:
        """What the model holds now."""
        model = unwrap(model)
        copies: dict[int, Tensor] = {}
        held: list[tuple[_Place, Any]] = []
        for place in _places(model):
            value = place.holder[place.key]
            if not isinstance(value, Tensor):
                held.append((place, value))
            elif id(value) in copies or self._is_kept(place.name, value):
                # What modules share, they share in the copies too.
                if id(value) not in copies:
                    copies[id(value)] = _copy(value)
                held.append((place, copies[id(value)]))
        frozen = [
            (parameter, _copy(parameter))
            for name, parameter in model.named_parameters()
            # Quantized weights are of classes of their own.
            if type(parameter) is nn.Parameter
            and clean_name(name) not in self._merged
            and self._is_kept(clean_name(name), parameter)
        ]
        return Kept(held, frozen, frozenset(self._changing))

    def _is_kept(self, name: str, tensor: Tensor) -> bool:
        small = tensor.numel() <= _ALWAYS_KEPT
        if not small or isinstance(tensor, nn.Parameter):
            look = _Look(tensor)
            if not look.is_like(self._looks.setdefault(name, look)):
                self._changing.add(name)
        return small or name in self._changing


class _Look:
    """What tells whether a tensor has changed: its version, and some of its numbers."""

    def __init__(self, tensor: Tensor) -> None:
        self._about = tuple(tensor.shape), tensor.dtype, 0 if tensor.is_inference() else tensor._version
        self._numbers: Tensor | None = None
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta:
            places = torch.linspace(0, tensor.numel() - 1, _LOOKED_AT, dtype=torch.float64, device=tensor.device)
            # As bytes, so that NaN is like NaN.
            whole = tensor.detach().view(torch.uint8) if tensor.itemsize == 1 else tensor.detach()
            self._numbers = whole.take(places.long()).view(torch.uint8)

    def is_like(self, other: _Look) -> bool:
        """Whether nothing tells one from the other."""
        if self._about != other._about or self._numbers is None or other._numbers is None:
            return self._about == other._about
        return torch.equal(self._numbers.to(other._numbers.device), other._numbers)


def _places(model: nn.Module) -> Iterator[_Place]:
    """Every place of a buffer, and of a tensor, number or string that is a plain attribute of a module."""
    for prefix, module in model.named_modules():
        path = clean_name(prefix + ".") if prefix else ""
        attributes = vars(module)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                yield _Place(path + key, module._buffers, key)
        for key, value in attributes.items():
            tensor = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
            if key not in MODULE_INTERNALS and (tensor or type(value) in _PLAIN):
                yield _Place(path + key, attributes, key)


def _copy(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.clone() if tensor.numel() <= _ALWAYS_KEPT else tensor.to("cpu", copy=True)
