"""What an object can reach: random generators, attributes, containers and file positions, saved and restored.

A collator, a dataset, a sampler or a transform is code that somebody else wrote, and training may share it. Nothing is
assumed about where it keeps its state: the walk follows attributes, slots, containers, closures, partials, bound
methods, and the classes and global names that its functions use.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import io
import itertools
import logging
import operator
import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

logger = logging.getLogger("traj_merge_callback")

Restore = Callable[[], object]

# A container with more elements than this is a dataset; of what its elements hold, so many objects are looked at.
_LARGE, _MOST_IN_LARGE = 1000, 10_000
# A bound for everything else.
_MOST = 200_000
# What holds no generator. A container that has nothing else is data, and its elements are not looked at.
_PLAIN = (int, float, complex, str, bytes, bytearray, bool, type(None), torch.Tensor, np.ndarray, np.generic, range)
_OPAQUE = (*_PLAIN, types.ModuleType, types.CodeType, torch.dtype, torch.device, torch.Size)
# Libraries whose functions and classes keep no generators of their own but those that ``preserved_rng`` covers.
_LIBRARIES = frozenset(sys.stdlib_module_names) | {
    *("torch", "numpy", "pandas", "pyarrow", "scipy", "transformers", "tokenizers", "datasets", "accelerate"),
    *("lightning", "pytorch_lightning", "torchmetrics", "_pytest", "traj_merge_callback"),
}
# Of the standard library, instances whose state belongs to other threads, to the system, or to the interpreter.
_SYSTEM = {
    *("threading", "_thread", "queue", "_queue", "multiprocessing", "_multiprocessing", "concurrent", "asyncio"),
    *("socket", "_socket", "ssl", "subprocess", "logging", "ctypes", "_ctypes", "importlib", "weakref", "inspect"),
}
GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)
# Iterators of the language itself: only they know their position.
_ITERATORS = {
    *(types.GeneratorType, map, zip, filter, enumerate, reversed),
    *map(type, (iter([]), iter(()), iter({}), iter({}.values()), iter({}.items()), iter(set()), iter(range(0)))),
    *(kind for kind in vars(itertools).values() if isinstance(kind, type)),
}
# Objects of the language that hold others, which they show to the garbage collector only.
_HOLDERS = {
    *(types.MethodType, types.BuiltinMethodType, types.MappingProxyType),
    *(functools.partial, staticmethod, classmethod, property),
}
_FILLED = (dict, list, set, deque)
_MISSING = object()


@contextmanager
def preserved(roots: list[Any], *, seed: int | None = None, name: str = "") -> Iterator[None]:
    """Inside the context everything reachable from ``roots`` may be used; afterwards it is as it was.

    Restored are the states of random generators (``torch.Generator``, ``numpy.random.Generator`` and ``RandomState``,
    ``random.Random``), attributes and slots, the elements of lists, dicts, sets and deques, variables of closures, the
    global names that functions use, and the positions of files. What was created inside is gone afterwards. Tensors,
    arrays and the state of other threads are not looked at.

    Args:
        roots: where to begin.
        seed: if given, generators are seeded with it on entering.
        name: of what is read, for the message about an iterator whose position cannot be restored.
    """
    found = _Walk()
    for root in roots:
        found.visit(root)
    found.walk()
    if found.iterators and name:
        logger.warning(
            "%s reads from %s, whose position cannot be restored: what is read here is gone for training, if it reads "
            "from the same object. Make a new one in __iter__, or give a list of batches",
            name,
            found.iterators[0],
        )
    with ExitStack() as stack:
        for restore in found.restores:
            stack.callback(restore)
        if seed is not None:
            for reseed in found.seeds:
                reseed(seed)
        yield


class _Walk:
    """Looks at every object once; at what elements of large containers hold last, and not without end."""

    def __init__(self) -> None:
        self.restores: list[Restore] = []
        self.seeds: list[Callable[[int], object]] = []
        self.iterators: list[str] = []
        self._queue: deque[Any] = deque()
        self._large: deque[Any] = deque()  # iterators over elements of large containers
        self.seen: dict[int, Any] = {}  # the objects too: an id is taken again when its object is gone

    def visit(self, value: Any) -> None:
        """Look at a value later, unless it was seen or holds nothing."""
        if not issubclass(type(value), _OPAQUE) and id(value) not in self.seen:
            self.seen[id(value)] = value
            self._queue.append(value)

    def walk(self) -> None:
        """Look at everything."""
        while self._queue and len(self.seen) < _MOST:
            self._look_at(self._queue.popleft())
        end = len(self.seen) + _MOST_IN_LARGE
        while len(self.seen) < end and (self._queue or self._large):
            if self._queue:
                self._look_at(self._queue.popleft())
            elif (value := next(self._large[0], _MISSING)) is not _MISSING:
                self.visit(value)
            else:
                self._large.popleft()

    def _look_at(self, value: Any) -> None:
        kind = type(value)  # and not isinstance, which asks proxies for their class
        if issubclass(kind, GENERATORS):
            self._generator(value)
        elif kind is types.FunctionType:
            self._function(value)
        elif issubclass(kind, type):
            self._class(value)
        elif kind is types.CellType:
            self._cell(value)
        elif issubclass(kind, io.IOBase):
            self._file(value)
        elif kind in _ITERATORS:
            self._iterator(value)
        elif kind in _HOLDERS:
            self._visit_all(gc.get_referents(value))
        elif _root(kind) not in _SYSTEM:
            self._object(value)

    def _generator(self, value: Any) -> None:
        self.restores.append(generator_state(value))
        self.seeds.append(functools.partial(_seed, value))
        self._object(value)  # of a subclass

    def _object(self, value: Any) -> None:
        """Attributes, slots and elements."""
        kind = type(value)
        if issubclass(kind, (dict, list, set, deque)):
            saved = dict(dict.items(value)) if issubclass(kind, dict) else _list(value)
            self.restores.append(functools.partial(_refill, value, saved))
        if issubclass(kind, (dict, list, set, deque, tuple, frozenset)):
            self._visit_all(dict.values(value) if issubclass(kind, dict) else value)
        with contextlib.suppress(AttributeError):
            self.visit(object.__getattribute__(value, "__dict__"))
        for slot in _slots(kind):
            held = _get(slot, value)
            self.restores.append(functools.partial(_set_slot, slot, value, held))
            self.visit(held)
        self.visit(kind)

    def _visit_all(self, values: Any) -> None:
        if all(issubclass(kind, _PLAIN) for kind in set(map(type, values))):
            return
        values = _list(values)
        if len(values) <= _LARGE:
            for value in values:
                self.visit(value)
        else:
            for value in values:
                if issubclass(type(value), GENERATORS):
                    self.visit(value)
            self._large.append(iter(values))

    def _iterator(self, value: Any) -> None:
        if type(value) is not types.GeneratorType:
            self.iterators.append(f"a {type(value).__name__} object")
            # Not its containers: it counts on their being as it left them.
            self._visit_all([held for held in gc.get_referents(value) if not isinstance(held, _FILLED)])
        elif value.gi_frame is not None:  # else it is exhausted
            self.iterators.append(f"the generator {value.__qualname__}")
            self._visit_all(value.gi_frame.f_locals.values())
            self._used(value.gi_frame.f_globals, value.gi_code)

    def _function(self, value: types.FunctionType) -> None:
        for held in (value.__closure__, value.__defaults__, value.__kwdefaults__, vars(value)):
            self.visit(held)
        if _root(value) not in _LIBRARIES:
            self._used(value.__globals__, value.__code__)

    def _used(self, scope: dict[str, Any], code: types.CodeType) -> None:
        """The global names that code uses, and those of modules that it names."""
        names = _names(code)
        self._names(scope, names)
        for name in names & scope.keys():
            module = scope[name]
            if isinstance(module, types.ModuleType) and module.__name__.partition(".")[0] not in _LIBRARIES:
                self._names(vars(module), names)

    def _names(self, scope: dict[str, Any], names: frozenset[str]) -> None:
        """What names hold, and that they hold it."""
        for name in names:
            held = scope.get(name, _MISSING)
            self.restores.append(functools.partial(_set_name, scope, name, held))
            self.visit(held)

    def _class(self, value: type) -> None:
        if _root(value) in _LIBRARIES:
            return
        held = dict(vars(value))
        self.restores.append(functools.partial(_set_class, value, held))
        for attribute in held.values():
            self.visit(attribute)
        for base in value.__bases__:
            self.visit(base)

    def _cell(self, value: types.CellType) -> None:
        with contextlib.suppress(ValueError):  # an empty cell
            held = value.cell_contents
            self.restores.append(functools.partial(setattr, value, "cell_contents", held))
            self.visit(held)

    def _file(self, value: Any) -> None:
        with contextlib.suppress(OSError, ValueError):  # closed, or without a position
            if value.seekable():
                self.restores.append(functools.partial(_seek, value, value.tell()))


def generator_state(generator: Any) -> Restore:
    """A function that gives one of ``GENERATORS`` the state that it has now."""
    if isinstance(generator, torch.Generator):
        return functools.partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.SystemRandom):
        return lambda: None
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    if isinstance(generator, np.random.RandomState):
        return functools.partial(generator.set_state, generator.get_state(legacy=False))
    bits = _bits(generator)
    return functools.partial(setattr, bits, "state", copy.deepcopy(bits.state))


def _seed(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    elif isinstance(generator, np.random.RandomState):
        generator.seed(seed % 2**32)
    else:
        bits = _bits(generator)
        bits.state = type(bits)(seed).state


def _bits(generator: np.random.Generator | np.random.BitGenerator) -> Any:
    return generator.bit_generator if isinstance(generator, np.random.Generator) else generator


class Owned:
    """Random generators and modules that a function can reach, such as the head that an ``nll`` calls.

    Args:
        function: what is called in evaluations.
    """

    def __init__(self, function: Any) -> None:
        walk = _Walk()
        walk.visit(function)
        walk.walk()
        found = list(walk.seen.values())
        self._generators = [one for one in found if issubclass(type(one), GENERATORS)]
        self._modules = [one for one in found if issubclass(type(one), torch.nn.Module)]

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Restore the states of the generators, and the gradients of the modules' parameters, on leaving."""
        parameters = {id(one): one for module in self._modules for one in module.parameters(recurse=False)}.values()
        gradients = [(parameter, parameter.grad) for parameter in parameters]
        restores = [generator_state(generator) for generator in self._generators]
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            yield
        finally:
            for restore in restores:
                restore()
            for parameter, gradient in gradients:
                parameter.grad = gradient


def is_plain_object(value: Any) -> bool:
    """Whether an object is its attributes and nothing else, and of no library's class: a copy of it is another one."""
    kind = type(value)
    return (
        _root(kind) not in _LIBRARIES
        and not issubclass(kind, (torch.nn.Module, type, BaseException))
        and kind.__new__ is object.__new__
        and kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and not hasattr(kind, "__setstate__")
        and not hasattr(kind, "__del__")
        and not _slots(kind)
        and hasattr(value, "__dict__")
    )


def _root(value: Any) -> str:
    """The name of the top package that a class or a function is from."""
    return str(getattr(value, "__module__", None) or "builtins").partition(".")[0]


def _list(values: Any) -> list[Any]:
    return list(values) if not isinstance(values, list) else list.copy(values)


@functools.cache
def _names(code: types.CodeType) -> frozenset[str]:
    """The global names and attributes that a function's code, and that of the functions inside it, uses."""
    inside = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return frozenset(code.co_names).union(*inside)


def _slots(kind: type) -> list[types.MemberDescriptorType]:
    """The descriptors of a class's ``__slots__``."""
    members = [slot for base in kind.__mro__ if "__slots__" in vars(base) for slot in vars(base).values()]
    return [slot for slot in members if isinstance(slot, types.MemberDescriptorType)]


def _get(slot: types.MemberDescriptorType, value: Any) -> Any:
    try:
        return slot.__get__(value)
    except AttributeError:
        return _MISSING


# Restoring writes only what has changed: an object that was left alone is not touched.


def _set_slot(slot: types.MemberDescriptorType, value: Any, held: Any) -> None:
    if _get(slot, value) is held:
        return
    if held is _MISSING:
        slot.__delete__(value)
    else:
        slot.__set__(value, held)


def _set_name(scope: dict[str, Any], name: str, held: Any) -> None:
    if scope.get(name, _MISSING) is held:
        return
    if held is _MISSING:
        del scope[name]
    else:
        scope[name] = held


def _set_class(kind: type, held: dict[str, Any]) -> None:
    now = dict(vars(kind))
    for name in now.keys() | held.keys():
        before = held.get(name, _MISSING)
        if now.get(name, _MISSING) is before or name.startswith("__"):
            continue
        if before is _MISSING:
            type.__delattr__(kind, name)
        else:
            type.__setattr__(kind, name, before)


def _refill(container: Any, saved: Any) -> None:
    """Put the same elements back, in their order."""
    kind: Any = next(base for base in (OrderedDict, dict, list, set, deque) if isinstance(container, base))
    if _same(container, saved) and (not isinstance(saved, dict) or _same(dict.values(container), saved.values())):
        return
    kind.clear(container)
    getattr(kind, "extend" if kind in (list, deque) else "update")(container, saved)


def _same(one: Any, other: Any) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _seek(file: Any, position: int) -> None:
    with contextlib.suppress(OSError, ValueError):  # it was closed meanwhile
        file.seek(position)  # and no tell, which a text file refuses while it is iterated over
