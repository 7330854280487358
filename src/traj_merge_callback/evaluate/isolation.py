"""Evaluating a model without a trace: random states, buffers, gradients, flags and signals are as they were."""

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

_MODULE_INTERNALS = frozenset(vars(nn.Module()))
_CONTAINERS = (list, dict, set, OrderedDict, defaultdict, deque)


@contextmanager
def preserved_rng(seed: int | None = None) -> Iterator[None]:
    """Restore the random state of Python, numpy, torch's CPU, every CUDA device in use and MPS on leaving.

    Args:
        seed: if given, what happens inside starts from this seed, the same one every time.
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
            # Not torch.manual_seed: where CUDA is not initialised yet it leaves a seed behind for later.
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
def isolated(model: nn.Module, seed: int = 0, *, gradients: bool = False) -> Iterator[None]:
    """Evaluate ``model`` inside: eval mode, eager even if compiled, and no trace left behind.

    On leaving, also through an exception or Ctrl-C, these are what they were, bit for bit: the random states; every
    submodule's train/eval flag; every gradient (its very tensor, unread and unwritten); every buffer (evaluation writes
    to copies); and every attribute of every submodule that is a tensor, or a plain list, dict or set (one level deep),
    which covers caches and torchmetrics states. Weights are not written by a forward without gradients. A Ctrl-C
    inside waits for the end of the block.

    Args:
        model: the module to evaluate; its submodules are covered.
        seed: random seed inside, so that any randomness of the evaluation is common to all candidates.
        gradients: whether gradients are recorded inside. The modules then hold stand-ins for trainable parameters,
            other Parameter objects on the same memory, so that no hook of the live ones fires (DDP, DeepSpeed and
            optimizers that step during backward have such hooks) and no live gradient changes.
    """
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    saved_gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    with delayed_interrupts(), ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.enter_context(preserved_rng(seed))
        # A compiled model would otherwise recompile for eval mode, and use up training's share of the recompile limit.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for module, saved in zip(modules, attributes, strict=True):
                _work_on_copies(module, saved)
            for parameter, _ in saved_gradients:
                parameter.grad = None
            if gradients:
                _use_stand_ins(modules)
            model.eval()
            yield
        finally:
            for module, saved in zip(modules, attributes, strict=True):
                vars(module).clear()
                vars(module).update(saved)
            for parameter, gradient in saved_gradients:
                parameter.grad = gradient


def _work_on_copies(module: nn.Module, saved: dict[str, Any]) -> None:
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


def _use_stand_ins(modules: list[nn.Module]) -> None:
    stand_ins: dict[int, nn.Parameter] = {}

    def stand_in(parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or not parameter.requires_grad:
            return parameter
        return stand_ins.setdefault(id(parameter), nn.Parameter(parameter.data))

    for module in modules:
        vars(module)["_parameters"] = {name: stand_in(parameter) for name, parameter in module._parameters.items()}


# Ctrl-C and SIGTERM wait while live weights are out of place

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Delay:
    """The signal handlers that were in place, and the signals received since. One per process, as handlers are."""

    def __init__(self) -> None:
        self.depth = 0
        self.handlers: dict[int, Any] = {}
        self.pending: list[tuple[int, FrameType | None]] = []

    def receive(self, number: int, frame: FrameType | None) -> None:
        if any(number == waiting for waiting, _ in self.pending):
            # A second Ctrl-C is not held back: the block may hang.
            self.handlers[number](number, frame)
        self.pending.append((number, frame))

    def deliver(self) -> None:
        while self.pending:
            number, frame = self.pending.pop(0)
            self.handlers[number](number, frame)


_delay = _Delay()


@contextmanager
def delayed_interrupts() -> Iterator[None]:
    """Hold back handlers of SIGINT and SIGTERM that are written in Python until the outermost block is done.

    Python may raise KeyboardInterrupt between any two operations, also inside a ``finally`` that restores weights. Held
    back, it is raised after the block. A second Ctrl-C is not held back. Only the main thread runs handlers, so in
    another thread there is nothing to do.
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
