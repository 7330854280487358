"""A window's columns in pieces, and sums over the columns of all processes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..distributed import Processes
from ..pieces import EXCHANGE, Pieces
from .groups import ParameterGroups
from .layout import ParameterLayout, Slot
from .products import Chunk, Span, pieces_of


class Columns:
    """The columns of a layout, by parameter group if there are any.

    Args:
        layout: of this process's columns.
        groups: parameter groups that may have merge weights of their own.
        processes: that train the model together.
    """

    def __init__(self, layout: ParameterLayout, groups: ParameterGroups | None, processes: Processes) -> None:
        self._layout = layout
        self._groups = groups
        self._processes = processes
        kinds = [(grouped, device) for grouped in (False, True) for device in ("cpu", "meta")]
        counts = [len(list(pieces_of(self._spans(grouped), torch.device(device)))) for grouped, device in kinds]
        # As many in every process, so that all are at the same piece.
        most = processes.all_reduce_max(*counts)
        self._counts = {kind: int(count) for kind, count in zip(kinds, most, strict=True)}

    @property
    def num_pieces(self) -> int:
        """How many pieces the columns have."""
        return self._counts[False, "cpu"]

    def groups(self, grouped: bool) -> int:
        """How many vectors of merge weights there are."""
        return len(self._groups) if grouped and self._groups is not None else 1

    def regions(self, grouped: bool) -> list[tuple[int, int]]:
        """The kinds of columns there are: their parameter group, and how many processes hold them."""
        return sorted({(group, slot.shard.copies) for group, slot in self._slots(grouped)})

    def pieces(self, grouped: bool, device: torch.device) -> Iterator[list[Chunk]]:
        """The columns in pieces, for work on a device; empty ones at the end where other processes have more."""
        found = list(pieces_of(self._spans(grouped), device))
        yield from found
        yield from [[]] * (self._counts[grouped, "cpu" if device.type == "cpu" else "meta"] - len(found))

    def _slots(self, grouped: bool) -> list[tuple[int, Slot]]:
        members = self._groups.members if grouped and self._groups is not None else [0] * len(self._layout.slots)
        return list(zip(members, self._layout.slots, strict=True))

    def _spans(self, grouped: bool) -> list[Span]:
        regions = self.regions(grouped)
        spans: list[Span] = []
        for group, slot in self._slots(grouped):
            region, end = regions.index((group, slot.shard.copies)), slot.offset + slot.numel
            if spans and spans[-1][0] == region:
                spans[-1] = (region, spans[-1][1], end)
            else:
                spans.append((region, slot.offset, end))
        return spans

    def sum(self, products: Tensor, *, grouped: bool, summands: bool) -> Pieces[np.ndarray]:
        """Sum products over the regions of a group, and over processes.

        Args:
            products: of each region, float64, shape ``(regions, ...)``.
            grouped: whether regions are of parameter groups.
            summands: whether what several processes hold are summands; otherwise it is the same, and counts once.

        Returns:
            Shape ``(groups, ...)``, or ``(...)`` if not grouped; the same in all processes, to the last bit.
        """
        found = np.zeros((self.groups(grouped), *products.shape[1:]))
        for (group, copies), product in zip(self.regions(grouped), products.cpu().numpy(), strict=True):
            found[group] += product if summands else product / copies
        if self._processes.size > 1:
            yield EXCHANGE
            found = self._processes.all_gather_array(found).sum(axis=0)
        return found if grouped else found[0]
