"""Leaving no trace in the training run: signals, random states, modules and gradients, weights.

Each context manager here restores what it covers exactly, whatever happens inside.
"""

from __future__ import annotations

import copy
import random
import signal
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .attention import compiled_flex_attention

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_MODULE_INTERNALS = frozenset(vars(nn.Module()))
_CONTAINERS = (list, dict, set, OrderedDict, defaultdict, deque)


class _Delay:
    """The process's own signal handlers, and the signals that have arrived while they are held back."""

    def __init__(self) -> None:
        self.depth = 0
        self.handlers: dict[int, Any] = {}
        self.pending: list[tuple[int, FrameType | None]] = []

    def receive(self, number: int, frame: FrameType | None) -> None:
        if any(number == waiting for waiting, _ in self.pending):
            # A second Ctrl-C is delivered at once: the forward pass may hang.
            self.handlers[number](number, frame)
        self.pending.append((number, frame))

    def deliver(self) -> None:
        while self.pending:
            number, frame = self.pending.pop(0)
            self.handlers[number](number, frame)


_delay = _Delay()


@contextmanager
def delayed_interrupts() -> Iterator[None]:
    """Hold back SIGINT and SIGTERM while the block runs, and deliver them after the outermost such block.

    Their handlers may raise between any two operations, also inside a ``finally`` that restores live weights. Only
    handlers written in Python are held back, and only in the main thread (the only one that runs handlers). A second
    signal of the same number is delivered at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _delay.depth == 0:
        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
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
def isolated(model: nn.Module, seed: int = 0, *, gradients: bool = False) -> Iterator[None]:
    """Run ``model`` inside, in eval mode and eagerly even if compiled; afterwards everything is as it was.

    On leaving, also through an exception or Ctrl-C, these are restored bit for bit: the random states; every
    submodule's train/eval flag; every gradient (the same tensor object); every buffer; and every attribute of every
    submodule that is a tensor, or a plain list, dict or set (one level deep), which covers caches and torchmetrics
    states. Inside, buffers and such attributes are copies. Weights need no copy, as a forward pass does not write them.
    Signals are held back until the end of the block (:func:`delayed_interrupts`).

    Args:
        model: the module to evaluate, with its submodules.
        seed: random seed inside, so that any randomness of the evaluation is the same for all candidates.
        gradients: whether gradients are recorded inside. The modules then hold other Parameter objects on the same
            memory as the trainable ones, so that no hook of the live parameters fires (DDP, DeepSpeed and optimizers
            that step during backward have such hooks) and no live gradient changes.
    """
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    saved_gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    with delayed_interrupts(), ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.enter_context(preserved_rng(seed))
        # A compiled model would otherwise recompile for eval mode, which counts against training's recompile limit.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(compiled_flex_attention())
        try:
            for module, saved in zip(modules, attributes, strict=True):
                _copy_state(module, saved)
            for parameter, _ in saved_gradients:
                parameter.grad = None
            if gradients:
                _replace_parameters(modules)
            model.eval()
            yield
        finally:
            for module, saved in zip(modules, attributes, strict=True):
                vars(module).clear()
                vars(module).update(saved)
            for parameter, gradient in saved_gradients:
                parameter.grad = gradient


def _copy_state(module: nn.Module, saved: dict[str, Any]) -> None:
    """Let a module hold copies of its buffers and of its attributes that are tensors or plain containers."""
    attributes = vars(module)
    attributes["_buffers"] = {
        name: buffer if buffer is None else buffer.clone() for name, buffer in module._buffers.items()
    }
    for name, value in saved.items():
        if name in _MODULE_INTERNALS:
            continue
        if isinstance(value, Tensor):
            attributes[name] = value.clone()
        elif type(value) in _CONTAINERS:
            attributes[name] = copy.copy(value)


def _replace_parameters(modules: list[nn.Module]) -> None:
    """Let modules hold other Parameter objects on the same memory; tied parameters stay tied."""
    others: dict[int, nn.Parameter] = {}

    def other(parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or not parameter.requires_grad:
            return parameter
        return others.setdefault(id(parameter), nn.Parameter(parameter.data))

    for module in modules:
        vars(module)["_parameters"] = {name: other(parameter) for name, parameter in module._parameters.items()}
