"""Linear layers merged by least squares on their inputs: RegMean (arXiv 2212.09849, equation 2)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ...search.problem import LEARNING_COST
from ...window.devices import without_autocast
from ...window.layout import Slot
from ...window.matrix import Matrix
from ...window.memory import check_free
from ...window.names import unwrap
from ...window.pieces import COMBINE, PROJECT, Pieces
from ...window.storage import CHUNK
from ..heldout import HeldOutLoss
from ..parking import Parking
from ..weights import Weights

logger = logging.getLogger("traj_merge_callback")
# By what the entries off the diagonal of a Gram matrix are multiplied: the paper's alpha, with its value.
_OFF_DIAGONAL = 0.9
# Of the mean of a sum's diagonal, added to it, so that it can be inverted. Ours.
_RIDGE = 1e-6
_TINY = 1e-30
# The class of GPT-2's linear layers, which are stored the other way round.
_CONV1D = "Conv1D"
# What calls, and GPT-2's, give a matrix and its inputs to, and the names of their operands.
_OPERANDS = {functional.linear: ("input", "weight"), torch.addmm: ("input", "mat1", "mat2")}


class _Layer(NamedTuple):
    """A linear layer, by its matrix.

    Args:
        slot: its columns.
        transposed: whether it is stored as (inputs, outputs), as that of GPT-2's Conv1D.
    """

    slot: Slot
    transposed: bool

    @property
    def inputs(self) -> int:
        """How many inputs the layer has."""
        return self.slot.shape[0 if self.transposed else 1]

    def by_input(self, row: Tensor) -> Tensor:
        """The matrix in a flat row, as (inputs, outputs)."""
        view = row[self.slot.offset : self.slot.offset + self.slot.numel].view(self.slot.shape)
        return view if self.transposed else view.T


class _Sums:
    """What the least squares of one layer need.

    Args:
        layer: the layer.
        gram: for the Gram matrix of the inputs in the row that is looked at, shape ``(inputs, inputs)``, zeros.
    """

    def __init__(self, layer: _Layer, gram: Tensor) -> None:
        size = layer.inputs
        self.layer = layer
        self.gram = gram
        # Over all rows: of Gram matrices, and of their products with the rows' differences to their mean.
        self.grams, self._products = torch.zeros(size, size), torch.zeros(size, layer.slot.numel // size)

    def add(self, row: Tensor, mean: Tensor) -> None:
        """Add what was seen of a row, which is given as well as the rows' mean, and look at the next one."""
        self.gram.mul_(_OFF_DIAGONAL).diagonal().div_(_OFF_DIAGONAL)
        difference = self.layer.by_input(row) - self.layer.by_input(mean).to(row.device)
        with without_autocast(row.device):
            self._products.add_((self.gram @ difference).cpu())
        self.grams.add_(self.gram.cpu())
        self.gram.zero_()

    def solve(self, merged: Tensor) -> None:
        """Put the least squares in the place of the rows' mean, which is kept where no input says anything."""
        self.grams.diagonal().add_(max(_RIDGE * float(self.grams.diagonal().mean()), _TINY))
        found = torch.linalg.solve(self.grams.double(), self._products.double())
        self.layer.by_input(merged).add_(found)


class RegressionMean:
    """Each linear layer's matrix is the one whose outputs are nearest to those of the rows' own, on the rows' inputs.

    With ``G_i = X_i' X_i`` of the inputs ``X_i`` that the layer has in row i, on one part of the search split, that is
    ``(sum_i G_i)^-1 sum_i G_i W_i``. All other parameters are the rows' mean, and so are matrices that are shared with
    an embedding. There is one such merge; its merge weights are those of the mean.

    Args:
        window: the rows.
        model: the model.
        parking: of device memory.

    Raises:
        ValueError: the model has no linear layer.
        NoRoom: there is too little memory: for each matrix what its inputs' Gram matrix takes twice, and the matrix.
    """

    def __init__(self, window: Matrix, model: nn.Module, parking: Parking) -> None:
        self._window = window
        self._parking = parking
        model = unwrap(model)
        # Not their attributes: a parametrized weight is computed whenever it is asked for, and may change by that.
        matrices = {one: one._parameters.get("weight") for one in model.modules()}
        embeddings = {id(matrix) for one, matrix in matrices.items() if isinstance(one, nn.Embedding)}
        tensors = zip(window.layout.tensors(model), window.layout.slots, strict=True)
        slots = {id(tensor): slot for tensor, slot in tensors if slot.is_parameter and id(tensor) not in embeddings}
        #: By the ``id`` of their parameter.
        self._layers = {
            id(matrix): _Layer(slots[id(matrix)], not isinstance(one, nn.Linear))
            for one, matrix in matrices.items()
            if id(matrix) in slots and (isinstance(one, nn.Linear) or type(one).__name__ == _CONV1D)
        }
        if not self._layers:
            raise ValueError("search='regmean' merges linear layers, and the model has none that is merged")
        #: Device memory that a merge holds.
        self.nbytes = 4 * sum(one.inputs**2 for one in self._layers.values())
        products = sum(one.slot.numel for one in self._layers.values())
        beside = 4 * (products + window.layout.numel)
        # The window's rows may have been promised and not yet used, so that they still count as free.
        check_free(window.nbytes + 2 * self.nbytes + beside, "the window with the layers' Gram matrices")
        self._merged = torch.empty(window.layout.numel)

    def learn(
        self, load: Callable[[np.ndarray], Pieces[None]], weights: Weights, heldout: HeldOutLoss
    ) -> Pieces[float]:
        """See :class:`ByParameter`: a forward pass over one part of the split for each row."""
        yield COMBINE
        count, device = self._window.num_weights, weights.row.device
        sums = {
            key: _Sums(one, self._parking.hold(torch.zeros(one.inputs, one.inputs, device=device)))
            for key, one in self._layers.items()
        }

        @contextmanager
        def ready(gradients: bool) -> Iterator[None]:
            with weights.ready(gradients), _Inputs(sums):
                yield

        yield from self._window.combine_pieces(np.full(count, 1 / count), self._merged)
        for row in np.eye(count):
            yield from load(row)
            yield from heldout.search_pieces(weights.model, ready, [0])
            for one in sums.values():
                yield COMBINE
                one.add(weights.row, self._merged)
        for one in sums.values():
            self._parking.let_go(one.gram)
        if unseen := [one.layer.slot.name for one in sums.values() if not one.grams.any()]:
            logger.info("regmean: no input was seen of %s, which are the rows' mean", ", ".join(unseen))
        for one in sums.values():
            yield PROJECT  # no product with rows, but as rare, so that nobody plans with the time that it takes
            one.solve(self._merged)
        return LEARNING_COST["regmean"] * count / heldout.parts

    def release(self) -> None:
        """See :class:`ByParameter`: all that is held goes with :meth:`learn`."""

    def combine_pieces(self, weights: np.ndarray, out: Tensor) -> Pieces[None]:
        """See :class:`ByParameter`.

        Raises:
            ValueError: the weights are not equal.
        """
        if np.ptp(weights) > 1e-9:
            raise ValueError(f"weights={weights.tolist()}: the least squares of all rows have equal weights")
        for there, merged in zip(out.split(CHUNK), self._merged.split(CHUNK), strict=True):
            yield COMBINE
            there.copy_(merged)


class _Inputs(TorchFunctionMode):
    """Adds to layers' Gram matrices what their matrices are multiplied with.

    It sees calls and not modules, so that no hook has to be put into the model that is being trained.

    Args:
        sums: of the layers, by the ``id`` of their parameter.
    """

    def __init__(self, sums: dict[int, _Sums]) -> None:
        super().__init__()
        self._sums = sums

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (names := _OPERANDS.get(func)) is not None:
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            if (found := self._sums.get(id(given.get(names[-1])))) is not None:
                inputs = given[names[-2]].detach().reshape(-1, len(found.gram)).float()
                with without_autocast(inputs.device):
                    found.gram.add_(inputs.T @ inputs)
        return func(*args, **(kwargs or {}))
