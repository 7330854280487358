"""Device memory of a merge: kept from pause to pause where it fits beside training, parked in CPU memory elsewhere."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..distributed import Processes
from ..window import devices
from ..window.storage import in_memory

logger = logging.getLogger("traj_merge_callback")


class Parking:
    """Keeps large tensors of a merge out of training's way, so that it is not training that runs out of memory.

    Where memory is tight they are *parked* before training goes on: copied to the CPU, their device memory given up.
    Before the next piece of the merge they are brought back. Tensor objects, and views of them, stay the same.

    Args:
        device: of the tensors.
        processes: the ranks, which park all or none.
    """

    def __init__(self, device: torch.device, processes: Processes) -> None:
        self._device = device
        self._processes = processes
        self._held: list[tuple[Tensor, Tensor]] = []
        self._kept = 0.0
        #: Whether tensors are parked.
        self.away = False
        #: Whether memory is tight.
        self.tight = False

    def begin(self, nbytes: int) -> None:
        """Look whether a merge that holds so many bytes fits on the device beside training; a collective."""
        self.release()
        free, total = devices.free_memory(self._device)
        # What the last merge kept is free for this one, though torch's allocator has reserved it.
        too_much = float(nbytes + devices.ROOM * total > free + self._kept)
        tight = self.tight or self._processes.all_reduce_max(too_much)[0] > 0
        if tight and not self.tight and self._processes.is_rank_zero:
            logger.warning(
                "a merge holds %.3g GB on %s, and training leaves %.3g GB there: while training goes on they are kept "
                "in CPU memory, and merges take longer",
                nbytes / 1e9,
                self._device,
                free / 1e9,
            )
        self.tight = tight
        self._kept = 0.0 if tight else float(nbytes)

    def hold(self, tensor: Tensor) -> Tensor:
        """Hold a tensor, which has a storage of its own, until :meth:`release`; returns it."""
        if self.tight:
            allocate = in_memory(pinned=tensor.is_cuda)
            self._held.append((tensor, allocate("parked", tuple(tensor.shape), tensor.dtype)))
        return tensor

    def let_go(self, tensor: Tensor) -> None:
        """Hold a tensor not any more."""
        self._held = [pair for pair in self._held if pair[0] is not tensor]

    def park(self) -> None:
        """Give up the device memory of what is held."""
        if self.away:
            return
        for tensor, parked in self._held:
            parked.copy_(tensor)
            tensor.untyped_storage().resize_(0)
        self.away = self.tight

    def bring_back(self) -> None:
        """Bring everything held back.

        Raises:
            torch.OutOfMemoryError: the device has no room for it.
        """
        for tensor, parked in self._held:
            tensor.untyped_storage().resize_(parked.nbytes)
            tensor.copy_(parked)
        self.away = False

    def give_back(self) -> None:
        """Where memory is tight, let training find the device as it was before a merge used it.

        Of blocks in the cache of torch's allocator that a merge has made or split, training can use but a part.
        """
        if self.tight:
            devices.empty_cache(self._device)

    def release(self) -> None:
        """Hold nothing any more."""
        self._held, self.away = [], False
