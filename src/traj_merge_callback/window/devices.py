"""What CUDA asks for: threads on the right device, streams that are kept, page-locked memory, a look at free memory."""

from __future__ import annotations

import functools
import logging
import mmap
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import torch
from torch import Tensor

logger = logging.getLogger("traj_merge_callback")
#: Share of a memory, of the CPU or of a GPU, that a window and a merge under way leave to training. Before its first
#: step a run has neither gradients nor activations nor the optimizer's state, and nobody can say how large they will
#: be; but on a machine whose memory a window takes to the last page something else is killed by the system, and then
#: there is no message at all.
ROOM = 0.05
# cudaHostRegisterPortable: page-locked for every context of the process.
_PORTABLE = 1


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context in which products are as exact as their operands: a training loop may call us under its autocast."""
    return torch.autocast(device.type, enabled=False)


def worker(name: str, device: torch.device) -> ThreadPoolExecutor:
    """One thread whose CUDA work is on ``device``; it would otherwise open a context of 0.5 GB on the first GPU."""
    if device.type != "cuda":
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
    index = torch.cuda.current_device() if device.index is None else device.index
    return ThreadPoolExecutor(1, name, initializer=torch.cuda.set_device, initargs=(index,))


@functools.cache
def side_stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """The stream beside training's for one purpose: always the same, as freed memory is kept for its stream."""
    return torch.cuda.Stream(device)


def page_locked(nbytes: int) -> Tensor:
    """Memory that a GPU copies from and to while it computes, uint8, shape ``(nbytes,)``.

    torch's own pinned memory comes in powers of two, up to twice what is asked for. This is plain memory, registered
    with CUDA. Where the system does not allow that it stays plain memory, and copies take longer.
    """
    memory = mmap.mmap(-1, nbytes)
    found = torch.frombuffer(memory, dtype=torch.uint8)
    runtime = torch.cuda.cudart()
    error = int(runtime.cudaHostRegister(found.data_ptr(), nbytes, _PORTABLE))
    if error:
        logger.warning(
            "%.3g GB of memory could not be page-locked (CUDA error %d; see ulimit -l): captures and merges work, "
            "but their copies between CPU and GPU are slower",
            nbytes / 1e9,
            error,
        )
    else:
        # Not at exit: the CUDA runtime may be gone before.
        weakref.finalize(memory, runtime.cudaHostUnregister, found.data_ptr()).atexit = False
    return found


def free_memory(device: torch.device) -> tuple[float, float]:
    """Bytes of a GPU that nobody has claimed, and its bytes; infinite where that is not known.

    What torch's allocator has reserved is claimed: training needed it at its peak, and will again.
    """
    if device.type != "cuda":
        return float("inf"), float("inf")
    free, total = torch.cuda.mem_get_info(device)
    return float(free), float(total)


def empty_cache(device: torch.device) -> None:
    """Give the memory that torch's allocator has reserved on a GPU, and that holds nothing, back to the GPU."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()
