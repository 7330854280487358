"""Rows weighted by their Fisher information, parameter by parameter (arXiv 2111.09832, equation 3)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ...search.problem import LEARNING_COST
from ...window.layout import ParameterLayout
from ...window.matrix import Matrix
from ...window.memory import check_free
from ...window.names import unwrap
from ...window.pieces import COMBINE, Pieces
from ...window.storage import CHUNK
from ..heldout import HeldOutLoss
from ..parking import Parking
from ..weights import Weights

# Of the mean information, added to each: a parameter that no row's loss depends on, as that of a token which the
# held-out text has not, is the plain weighted mean of its rows then. Ours.
_LEAST = 1e-10


class FisherInformation:
    """``theta = sum_i a_i F_i theta_i / sum_i a_i F_i``, for each parameter by itself, with merge weights ``a``.

    ``F_i`` is the diagonal of the empirical Fisher information of row i: the square of the gradient of a batch's
    summed loss in row i, summed over the batches of one part of the search split. A pass over examples one by one, as
    in the paper, would take many times as long.

    Args:
        window: the rows.
        rows: how many there are at most. So many float32 rows are kept in CPU memory.
        parking: of device memory.

    Raises:
        NoRoom: there is too little memory.
    """

    def __init__(self, window: Matrix, rows: int, parking: Parking) -> None:
        # The window's rows may have been promised and not yet used, so that they still count as free.
        information = 4 * rows * window.layout.numel
        check_free(window.nbytes + information, f"the window with the Fisher information of {rows} rows")
        self._window = window
        self._parking = parking
        #: Device memory that a merge holds.
        self.nbytes = 8 * window.layout.numel
        self._information = torch.empty(rows, window.layout.numel)
        self._least = 0.0
        # On the device, during a merge: a row, and the sum of a parameter's weights or of its squared gradients.
        self._held: tuple[Tensor, Tensor] | None = None

    def learn(
        self, load: Callable[[np.ndarray], Pieces[None]], weights: Weights, heldout: HeldOutLoss
    ) -> Pieces[float]:
        """See :class:`ByParameter`: a forward and a backward pass over one part of the split for each row."""
        yield COMBINE
        count, numel = self._window.num_weights, self._window.layout.numel
        row, total = (self._parking.hold(torch.empty_like(weights.row)) for _ in range(2))
        self._held = row, total
        sums, squares = 0.0, _Squares(self._window.layout, weights.model, total)
        for one, information in zip(np.eye(count), self._information[:count], strict=True):
            yield from load(one)
            total.zero_()
            yield from heldout.search_pieces(weights.model, weights.ready, [0], gradient=squares)
            for kept, found in zip(information.split(CHUNK), total.split(CHUNK), strict=True):
                yield COMBINE
                kept.copy_(found)
                sums += float(kept.sum(dtype=torch.float64))
        self._least = max(_LEAST * sums / max(1, count * numel), float(torch.finfo(torch.float32).tiny))
        return LEARNING_COST["fisher"] * count / heldout.parts

    def combine_pieces(self, weights: np.ndarray, out: Tensor) -> Pieces[None]:
        """See :class:`ByParameter`.

        Raises:
            ValueError: a weight is negative, so that the sum of a parameter's weights might be 0.
        """
        if (weights < 0).any():
            raise ValueError(f"weights={weights.tolist()}: with Fisher information they must be at least 0")
        assert self._held is not None
        row, total = self._held
        total.zero_()
        out.zero_()
        merged, sums = out.split(CHUNK), total.split(CHUNK)
        for index in np.flatnonzero(weights):
            yield from self._window.combine_pieces(np.eye(len(weights))[index], row)
            chunks = zip(merged, sums, row.split(CHUNK), self._information[index].split(CHUNK), strict=True)
            for there, shares, values, information in chunks:
                yield COMBINE
                share = (information.to(out.device) + self._least).mul_(float(weights[index]))
                there.addcmul_(share, values)
                shares.add_(share)
        for there, shares in zip(merged, sums, strict=True):
            yield COMBINE
            there.div_(shares)

    def release(self) -> None:
        """See :class:`ByParameter`."""
        self._held = None


class _Squares:
    """A :class:`MergeGradient` that sums the squares of gradients, and has nothing to say of merge weights.

    Args:
        layout: of all columns of the model.
        model: whose backward passes leave gradients.
        total: the sum, float32, shape ``(N,)``.
    """

    def __init__(self, layout: ParameterLayout, model: nn.Module, total: Tensor) -> None:
        self._layout = layout
        self._model = unwrap(model)
        self._total = total

    def clear_gradient(self) -> None:
        """See :class:`MergeGradient`: sums go on over domains."""

    def add_gradient(self) -> None:
        """See :class:`MergeGradient`."""
        for slot, tensor in zip(self._layout.slots, self._layout.tensors(self._model), strict=True):
            if tensor.grad is not None:
                gradient = tensor.grad.detach().reshape(-1).float()
                self._total[slot.offset : slot.offset + slot.numel].addcmul_(gradient, gradient)

    def projected(self) -> Pieces[np.ndarray]:
        """See :class:`MergeGradient`."""
        yield COMBINE
        return np.zeros(1)
