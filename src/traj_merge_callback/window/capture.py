"""Copying live weights out while training goes on."""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook


class Capture:
    """Copies tensors to a row in the background, of exactly one step: no optimizer writes them before they are read.

    On CUDA the copy runs on a stream of its own, beside the next forward and backward pass, and the training stream
    waits for it before the next optimizer step. On the CPU a worker thread copies, and the optimizer step waits for it.
    The wait is a pre-hook of every ``torch.optim.Optimizer``; who writes weights otherwise calls :meth:`wait` first.
    Optimizers of ``torch.optim`` that are given a closure (Lightning does) wait after the closure, which is where the
    forward and backward passes are.

    Args:
        asynchronous: False copies at once.
    """

    def __init__(self, *, asynchronous: bool) -> None:
        self.waited_s = 0.0
        self._reading: Future[None] | None = None
        self._jobs: list[Future[None]] = []
        self._copied: dict[torch.device, torch.cuda.Event] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._worker: ThreadPoolExecutor | None = None
        self._hook: Any = None
        if asynchronous:
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="traj-merge-capture")
            # The hook must not keep a window alive that its owner has dropped.
            guard = functools.partial(_guard, weakref.ref(self))
            self._hook = register_optimizer_step_pre_hook(torch.compiler.disable(guard))

    def begin(self, pairs: list[tuple[Tensor, Tensor]], settle: Callable[[], None]) -> None:
        """Copy each source to its target, both of the same shape, and then call ``settle``, which reads only targets.

        The capture before must be settled.
        """
        # The memory itself: a parameter may point elsewhere while a merged model is evaluated.
        pairs = [(target, source.detach()) for target, source in pairs]
        for device in {source.device for _, source in pairs if source.is_cuda}:
            stream = self._streams.setdefault(device, torch.cuda.Stream(device))
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for target, source in pairs:
                    if source.device == device:
                        target.copy_(source, non_blocking=True)
                        source.record_stream(stream)
                self._copied[device] = stream.record_event()
        on_cpu = [(target, source) for target, source in pairs if not source.is_cuda]
        events = list(self._copied.values())
        if self._worker is None:
            _read(on_cpu)
            _settle(events, settle)
            return
        self._reading = self._worker.submit(_read, on_cpu)
        self._jobs = [self._reading, self._worker.submit(_settle, events, settle)]

    def wait(self) -> None:
        """Wait until the sources may be written: the CPU for the worker, on CUDA only the training stream."""
        for device, event in self._copied.items():
            torch.cuda.current_stream(device).wait_event(event)
        self._copied = {}
        if self._reading is not None:
            started = time.perf_counter()
            # Not its result: what went wrong is no business of the optimizer step that waits here.
            wait([self._reading])
            self._reading = None
            self.waited_s += time.perf_counter() - started

    def settle(self) -> None:
        """Wait until the last capture is complete.

        Raises:
            Exception: what went wrong in it.
        """
        self.wait()
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.result()

    def close(self) -> None:
        """Let the last capture finish, and stop watching optimizers."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._worker is not None:
            self._worker.shutdown(wait=True)


@torch.no_grad()
def _read(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for target, source in pairs:
        target.copy_(source)


@torch.no_grad()
def _settle(events: list[torch.cuda.Event], settle: Callable[[], None]) -> None:
    for event in events:
        event.synchronize()
    settle()


def _guard(capture: weakref.ref[Capture], optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
    """Wait, or let the closure that an optimizer was given be followed by waiting."""
    owner = capture()
    if owner is None or (owner._reading is None and not owner._copied):
        return None
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    # Other optimizers may write before they call their closure (SAM does); those of torch call it first.
    if closure is None or not type(optimizer).__module__.startswith("torch.optim."):
        owner.wait()
        return None

    @functools.wraps(closure)
    def closure_then_wait() -> Any:
        result = closure()
        owner.wait()
        return result

    if len(args) > 1:
        return (args[0], closure_then_wait, *args[2:]), kwargs
    return args, {**kwargs, "closure": closure_then_wait}
