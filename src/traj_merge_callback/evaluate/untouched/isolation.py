"""Leaving no trace in the training run: signals, random states, modules and gradients, weights.

Each context manager here restores what it covers exactly, whatever happens inside.
"""

from __future__ import annotations

import copy
import inspect
import logging
import random
import signal
import threading
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from .attention import compiled_flex_attention
from .reachable import GENERATORS, generator_state, is_plain_object
from .writes import Undone

logger = logging.getLogger("traj_merge_callback")
Watch: TypeAlias = Literal["always", "first", "never"]

#: The attributes that every module has.
MODULE_INTERNALS = frozenset(vars(nn.Module()))
_CONTAINERS = (list, dict, set, OrderedDict, defaultdict, deque)
_ATOMS = frozenset((int, float, complex, str, bytes, bool, type(None)))


class _Delay:
    """The process's own signal handlers, and the signals that have arrived while they are held back."""

    def __init__(self) -> None:
        self.depth = 0
        self.handlers: dict[int, Any] = {}
        self.pending: dict[int, FrameType | None] = {}
        self.terminations = 0

    def receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self.pending:
            # A second Ctrl-C is delivered at once: the forward pass may hang.
            self.handlers[number](number, frame)
        self.pending[number] = frame

    def deliver(self) -> None:
        while self.pending:
            number = next(iter(self.pending))
            frame = self.pending.pop(number)
            self.terminations += number == signal.SIGTERM
            self.handlers[number](number, frame)


_delay = _Delay()


@contextmanager
def delayed_signals() -> Iterator[None]:
    """Hold back signals while the block runs, and deliver them after the outermost such block.

    Their handlers may run between any two operations: they may raise inside a ``finally`` that restores live weights,
    or save a checkpoint (as on Slurm) while the model holds other ones. Only handlers written in Python are held back,
    and only in the main thread (the only one that runs handlers). A second Ctrl-C is delivered at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _delay.depth == 0:
        handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
        _delay.handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
        for number in _delay.handlers:
            signal.signal(number, _delay.receive)
    _delay.depth += 1
    try:
        yield
    finally:
        _delay.depth -= 1
        if _delay.depth == 0:
            for number, handler in _delay.handlers.items():
                signal.signal(number, handler)
            _delay.deliver()


def terminations() -> int:
    """How many SIGTERMs have been held back and delivered so far: whether this process is about to be ended."""
    return _delay.terminations


@contextmanager
def preserved_rng(seed: int | None = None) -> Iterator[None]:
    """Restore the random state of Python, numpy, torch's CPU, every CUDA device in use and MPS on leaving.

    Args:
        seed: if given, all of them are seeded with it on entering.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    cpu_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    mps_state = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            # Not torch.manual_seed: before CUDA is initialized it queues a seed that would be applied later.
            torch.default_generator.manual_seed(seed)
            if cuda_states is not None:
                torch.cuda.manual_seed_all(seed)
            if mps_state is not None:
                torch.mps.manual_seed(seed)
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)


@contextmanager
def uncached_casts() -> Iterator[None]:
    """Let autocast keep no low-precision copies of weights: it finds them by tensor, and candidates share tensors.

    A cache that training has filled, where the whole training loop runs under autocast, is neither read nor cleared.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def isolated(
    model: nn.Module,
    seed: int = 0,
    *,
    gradients: bool = False,
    watch: Watch = "always",
) -> Iterator[None]:
    """Run ``model`` inside, in eval mode and eagerly even if compiled; afterwards everything is as it was.

    On leaving, also through an exception or Ctrl-C, these are restored bit for bit: the random states; every
    submodule's train/eval flag; every gradient (the same tensor object); every parameter, whatever wrote to it; every
    buffer; and every attribute of every submodule that is a tensor, a random generator, a plain container or an object
    of a class of the user's (see :class:`_Copies`), which covers caches, meters and torchmetrics states. Inside,
    buffers and such attributes are copies. Signals are held back until the end of the block
    (:func:`delayed_signals`).

    Flags are set, and ``train`` and ``eval`` are not called: modules that override them change weights there.

    Args:
        model: the module to evaluate, with its submodules.
        seed: random seed inside, so that any randomness of the evaluation is the same for all candidates.
        gradients: whether gradients are recorded inside. The modules then hold other Parameter objects on the same
            memory as the trainable ones, so that no hook of the live parameters fires (DDP, DeepSpeed and optimizers
            that step during backward have such hooks) and no live gradient changes.
        watch: when to look for writes into parameters and undo them (:class:`Undone`): "always", where live weights are
            computed with; "first", where all parameters are a candidate's: in the first evaluation with gradients and
            the first without, and after a write in all that follow; or "never".
    """
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    parameters = [_SavedParameter(parameter) for parameter in model.parameters()]
    with delayed_signals(), ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.enter_context(preserved_rng(seed))
        # A compiled model would otherwise recompile for eval mode, which counts against training's recompile limit.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(compiled_flex_attention())
        try:
            copies = _Copies(stack)
            for module, saved in zip(modules, attributes, strict=True):
                _copy_state(module, saved, copies)
            for parameter in parameters:
                parameter.parameter.grad = None
            if gradients:
                _replace_parameters(modules)
            with _writes_undone(model, gradients, watch), _eval_mode(modules):
                yield
        finally:
            for module, saved in zip(modules, attributes, strict=True):
                vars(module).clear()
                vars(module).update(saved)
            for parameter in parameters:
                parameter.restore()


class _SavedParameter:
    """Where a parameter's values are, and what else belongs to the Parameter object."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self._data = parameter.data
        self._gradient = parameter.grad
        self._requires_grad = parameter.requires_grad

    def restore(self) -> None:
        """Restore what has changed."""
        parameter, now = self.parameter, self.parameter.data
        if type(now) is Tensor and (now.data_ptr() != self._data.data_ptr() or now.shape != self._data.shape):
            parameter.data = self._data
        if parameter.requires_grad != self._requires_grad:
            parameter.requires_grad_(self._requires_grad)
        parameter.grad = self._gradient


@contextmanager
def _eval_mode(modules: list[nn.Module]) -> Iterator[None]:
    flags = [module.training for module in modules]
    try:
        for module in modules:
            _set_training(module, False)
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            if module.training != flag:
                _set_training(module, flag)


def _set_training(module: nn.Module, training: bool) -> None:
    """Set a module's flag without calling its ``train``."""
    descriptor = inspect.getattr_static(type(module), "training", None)
    if "training" in vars(module) and not hasattr(descriptor, "__set__"):
        vars(module)["training"] = training
    else:
        # A property, or a flag that is kept elsewhere, as by TorchScript.
        module.training = training


# For each model the kinds of evaluations (with gradients or without) that have written to no parameter so far.
_clean: weakref.WeakKeyDictionary[nn.Module, dict[bool, bool]] = weakref.WeakKeyDictionary()


@contextmanager
def _writes_undone(model: nn.Module, gradients: bool, watch: str) -> Iterator[None]:
    """Undo writes into parameters; say once which were written."""
    clean = _clean.setdefault(model, {})
    if watch == "never" or (watch == "first" and clean.get(gradients, False)):
        yield
        return
    undone = Undone((name, parameter) for name, parameter in model.named_parameters(remove_duplicate=False))
    try:
        with undone:
            yield
        clean.setdefault(gradients, True)
    finally:
        if undone.written and all(clean.values()):
            logger.warning(
                "evaluating the model writes into its parameters %s, of %s: they have been put back, and will be after "
                "every evaluation",
                undone.written[:3],
                sorted({_owner(model, name) for name in undone.written})[:3],
            )
        if undone.written:
            clean[gradients] = False


def _owner(model: nn.Module, name: str) -> str:
    """The module of a parameter, for a message."""
    path = name.rpartition(".")[0]
    return f"{path or 'the model'} ({type(model.get_submodule(path)).__name__})"


class _Copies:
    """Copies of what modules hold; what two of them share they share in the copies too.

    Containers and objects of users' own classes (meters, helpers) are copied with everything in them. Random generators
    and parameters stay themselves: the states of the first, and the gradients of the second, are restored.

    Args:
        stack: what restores them.
    """

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        # The originals too: an id is taken again when its object is gone.
        self._made: dict[int, tuple[Any, Any]] = {}

    def of(self, value: Any) -> Any:
        """A copy of a tensor, a plain container, or an object of a class without state elsewhere; else itself."""
        if type(value) in _ATOMS:
            return value
        if id(value) not in self._made:
            self._made[id(value)] = value, value  # for what holds itself
            self._made[id(value)] = value, self._copy(value)
        return self._made[id(value)][1]

    def _copy(self, value: Any) -> Any:
        if isinstance(value, nn.Parameter):
            self._stack.callback(setattr, value, "grad", value.grad)
            value.grad = None
        elif isinstance(value, Tensor):
            return value.detach().clone()
        elif isinstance(value, GENERATORS):
            self._stack.callback(generator_state(value))
        elif type(value) in _CONTAINERS:
            return self._container(value)
        elif is_plain_object(value):
            copied = object.__new__(type(value))
            self._made[id(value)] = value, copied
            vars(copied).update({name: self.of(held) for name, held in vars(value).items()})
            return copied
        return value

    def _container(self, value: Any) -> Any:
        copied = copy.copy(value)
        self._made[id(value)] = value, copied
        if isinstance(copied, dict):
            for key, item in value.items():
                copied[key] = self.of(item)
        elif not isinstance(copied, set):
            for index, item in enumerate(value):
                copied[index] = self.of(item)
        return copied


def _copy_state(module: nn.Module, saved: dict[str, Any], copies: _Copies) -> None:
    """Let a module hold copies of its buffers and of its attributes that are tensors or plain containers."""
    attributes = vars(module)
    for name, value in saved.items():
        if name == "_buffers":
            attributes[name] = {key: copies.of(buffer) for key, buffer in value.items()}
        elif name not in MODULE_INTERNALS:
            attributes[name] = copies.of(value)
        elif isinstance(value, dict):
            attributes[name] = value.copy()


def _replace_parameters(modules: list[nn.Module]) -> None:
    """Let modules hold other Parameter objects on the same memory; tied parameters stay tied."""
    others: dict[int, nn.Parameter] = {}

    def other(parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or not parameter.requires_grad:
            return parameter
        return others.setdefault(id(parameter), nn.Parameter(parameter.data))

    for module in modules:
        vars(module)["_parameters"] = {name: other(parameter) for name, parameter in module._parameters.items()}
