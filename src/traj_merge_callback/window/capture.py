"""Copying live weights out while training goes on; and whether mixed precision skipped an optimizer step."""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .devices import side_stream, worker
from .modes import has_modes
from .storage import add_share


class Capture:
    """Copies tensors in the background, while the next forward and backward pass run, but before any optimizer writes.

    On CUDA the copy runs on a stream of its own, and the training stream waits for it before the next optimizer step.
    On the CPU a worker thread copies, and the optimizer step waits for it. The wait is a pre-hook of every
    ``torch.optim.Optimizer``; code that writes weights in another way calls :meth:`wait` first. Optimizers of
    ``torch.optim`` that are given a closure (by Lightning) wait after the closure, which runs the forward and backward
    passes.

    Args:
        asynchronous: False copies at once.
        device: of the sources, or of the first of them.
    """

    def __init__(self, *, asynchronous: bool, device: torch.device) -> None:
        self.waited_s = 0.0
        # Futures and events of the last capture, until someone has waited for them.
        self._reading: Future[None] | None = None
        self._jobs: list[Future[None]] = []
        self._finite = True  # of the last capture, what has to be
        self._copied: dict[torch.device, torch.cuda.Event] = {}
        #: Optimizers that have taken a step and have modes for training and evaluation.
        self.with_modes: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._worker: ThreadPoolExecutor | None = None
        self._hook: Any = None
        if asynchronous:
            self._worker = worker("traj-merge-capture", device)
            # The hook must not keep a window alive that its owner has dropped.
            guard = functools.partial(_guard, weakref.ref(self))
            self._hook = register_optimizer_step_pre_hook(torch.compiler.disable(guard))

    def begin(
        self,
        pairs: list[tuple[Tensor, Tensor]],
        then: Callable[[bool], None],
        share: float = 1.0,
        finite: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        """Start to copy each source to its target; when all are copied, call ``then`` in the worker thread.

        The capture before must be settled.

        Args:
            pairs: targets and sources of the same shapes.
            then: reads targets, but no sources; called with whether what must be finite is.
            share: on the CPU a target becomes ``1 - share`` of itself and ``share`` of its source; 1 on other devices.
            finite: targets and sources that must be finite. If a source on the CPU is not, nothing there is copied; of
                those on CUDA devices the targets are looked at when all is copied, for which training does not wait.
        """
        self._finite = True
        # A detached tensor keeps its memory; a parameter points elsewhere while a merged model is evaluated.
        pairs = [(target, source.detach()) for target, source in pairs]
        before = [source.detach() for _, source in finite if not source.is_cuda]
        after = [target for target, source in finite if source.is_cuda]
        for device in {source.device for _, source in pairs if source.is_cuda}:
            stream = side_stream(device, "capture")
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for target, source in pairs:
                    if source.device == device:
                        target.copy_(source, non_blocking=True)
                        source.record_stream(stream)
                self._copied[device] = stream.record_event()
        on_cpu = [(target, source) for target, source in pairs if not source.is_cuda]
        events = list(self._copied.values())
        versions = [source._version for _, source in on_cpu]

        @torch.no_grad()
        def copy() -> None:
            self._finite = all(map(_is_finite, before))
            _copy(on_cpu if self._finite else [], share)
            if [source._version for _, source in on_cpu] != versions:
                raise RuntimeError(
                    "weights were written, and not by an optimizer of torch, while a capture of them was being copied; "
                    "its row is dropped. Call settle() before such code"
                )

        @torch.no_grad()
        def call_after() -> None:
            for event in events:
                event.synchronize()
            self._finite = self._finite and all(map(_is_finite, after))
            then(self._finite)

        if self._worker is None:
            copy()
            call_after()
            return
        self._reading = self._worker.submit(copy)
        self._jobs = [self._reading, self._worker.submit(call_after)]

    def wait(self) -> None:
        """Wait until the sources may be written: on the CPU this thread waits, on CUDA only the training stream."""
        for device, event in self._copied.items():
            torch.cuda.current_stream(device).wait_event(event)
        self._copied = {}
        if self._reading is not None:
            started = time.perf_counter()
            # An error of the copy is raised by settle, and not in the optimizer step that waits here.
            wait([self._reading])
            self._reading = None
            self.waited_s += time.perf_counter() - started

    def settle(self) -> bool:
        """Wait until the last capture is complete, ``then`` included; whether what had to be finite was.

        Raises:
            Exception: what the copy or ``then`` raised.
        """
        self.wait()
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.result()
        return self._finite

    def close(self) -> None:
        """Let the last capture finish, and stop watching optimizers."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._worker is not None:
            self._worker.shutdown(wait=True)


def _copy(pairs: list[tuple[Tensor, Tensor]], share: float) -> None:
    for target, source in pairs:
        add_share(target, source, share)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite, in one pass and without a copy: NaN and infinity are what min and max keep."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def _guard(capture: weakref.ref[Capture], optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
    """Before an optimizer step: wait for the capture, or replace the step's closure by one that waits at its end."""
    owner = capture()
    if owner is not None and has_modes(optimizer):
        owner.with_modes.add(optimizer)
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


class LossScaleWatch:
    """Tells from the loss scale of mixed precision whether a step was skipped: gradients that overflow lower it.

    Trainers count skipped steps as steps, since a fused optimizer is called all the same and skips the update itself.
    The scale stays on its device until :meth:`skipped` is called, so that watching makes no CPU wait for its GPU.
    """

    def __init__(self) -> None:
        self._scaler: Any = None
        self._before: Tensor | None = None

    def before_step(self, scaler: Any) -> None:
        """Note the scale between the backward pass and the optimizer step; ``scaler`` is a GradScaler or None."""
        scale = getattr(scaler, "_scale", None)
        self._scaler = scaler
        self._before = None if scale is None else scale.detach().clone()

    def skipped(self) -> bool:
        """Whether the step after the last :meth:`before_step` was skipped."""
        return self._before is not None and bool(self._scaler._scale < self._before)
