"""Before training: does the model take the held-out batches, and does their loss come out as it should?

What does not fit is found here, by one forward pass on one batch of each domain, and not at the first merge. On a GPU
an id beyond an embedding would end the whole process, so ids are looked at before they reach one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import ENDS, CollectiveTimeout, FailedOnAllRanks, described
from ..evaluate.data import IGNORED, NAMELESS, describe
from ..evaluate.heldout import HeldOutLoss, Ready
from ..evaluate.language_model import LanguageModelNll
from ..window.memory import ran_out
from ..window.names import unwrap

logger = logging.getLogger("traj_merge_callback")
_TOKENIZER = "make the batches with the model's own tokenizer, or call model.resize_token_embeddings"
_RETURNS = "nll must return (summed NLL in nats, number of target tokens), two numbers"


def first_pass(model: nn.Module, heldout: HeldOutLoss, ready: Ready) -> None:
    """Evaluate one held-out batch of each domain, one with the longest sequences.

    Args:
        model: the model being trained.
        heldout: the held-out loss.
        ready: see :meth:`HeldOutLoss.evaluate_pieces`.

    Raises:
        ValueError: saying what does not fit, and what would.
    """
    try:
        for domain, batches in heldout.by_domain().items():
            _Domain(unwrap(model), heldout, domain, batches).check(ready)
    except BaseException as error:
        if not (isinstance(error, FailedOnAllRanks) or ran_out(error)):
            raise
        # Another rank says itself what failed there; memory that is short now need not be short at a merge.
        logger.debug("no first forward pass: %s", described(error))


class _BeyondError(ValueError):
    """Ids that have no row."""


class _Domain:
    """The held-out batches of one domain.

    Args:
        model: the model, without wrappers.
        heldout: the held-out loss.
        domain: its name.
        batches: on the CPU, those with the longest sequences first.
    """

    def __init__(self, model: nn.Module, heldout: HeldOutLoss, domain: str, batches: Sequence[Any]) -> None:
        self._model = model
        self._heldout = heldout
        self._domain = domain
        self._batches = batches
        self._of = "heldout" if domain == NAMELESS else f"heldout[{domain!r}]"
        nll = heldout.nll(domain)
        self._by_labels = isinstance(nll, LanguageModelNll)
        self._nll = getattr(nll, "__name__", type(nll).__name__)
        # Rows of the embedding that the batches' own ids go to, if there is one.
        self._vocabulary: int | None = None

    def check(self, ready: Ready) -> None:
        """See :func:`first_pass`."""
        if self._by_labels:
            self._check_ids("labels", self._output_rows(), "the model's output layer")
        # A batch without targets says nothing.
        if not any(self._passes(batch, ready) for batch in self._batches):
            none = f"all labels are {IGNORED}" if self._by_labels else f"nll={self._nll} returns 0 for each batch"
            raise ValueError(f"{self._of} has no target tokens: {none}; give sequences with targets")
        self._check_ids("input_ids", self._vocabulary, "the model's embedding")

    def _passes(self, batch: Any, ready: Ready) -> bool:
        """Evaluate a batch; whether it has target tokens."""
        stage = "to_device"
        try:
            with self._heldout.undisturbed(), ready(False):
                moved = self._heldout.moved(self._model, self._domain, batch)
                stage = "nll"
                for name, module in self._model.named_modules():
                    # Others may be given positions to look up in another way, as Bart's are.
                    if isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:
                        # Gone with everything else that is set on modules inside ``ready``.
                        module.register_forward_pre_hook(self._looking_at(name, moved))
                returned = self._heldout.returned(self._model, self._domain, moved)
                return _tokens(returned) > 0
        except (*ENDS, CollectiveTimeout):
            raise
        except BaseException as error:
            if ran_out(error):
                raise
            # Under FSDP all ranks leave a forward pass together, and the cause is what failed on this one.
            cause = error.__cause__ if isinstance(error, FailedOnAllRanks) else error
            if cause is None:
                raise
            if isinstance(cause, _BeyondError):
                raise ValueError(f"{self._of}: {cause}") from error
            raise ValueError(self._sentence(stage, batch, cause)) from error

    def _sentence(self, stage: str, batch: Any, error: BaseException) -> str:
        fails = f"fails on a batch of {self._of}, {describe(batch):.300}: {described(error)}"
        if stage == "to_device":
            return f"to_device {fails}; it must return the batch on the training device"
        name = type(self._model).__name__
        if self._by_labels:
            return f"{name} {fails}; {self._of} must give batches for model(**batch) with 'labels', or pass nll="
        return f"nll={self._nll} {fails}; {_RETURNS}, for the model {name} and such a batch"

    def _looking_at(self, name: str, batch: Any) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """A hook before an embedding that refuses ids beyond its rows."""

        def look(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            ids = arguments[0] if arguments else None
            if not isinstance(ids, Tensor) or ids.is_floating_point() or not ids.numel():
                return
            rows = int(module.num_embeddings)  # type: ignore[arg-type]
            given = batch.get("input_ids") if isinstance(batch, Mapping) else None
            if isinstance(given, Tensor) and given.shape == ids.shape and bool((given == ids).all()):
                self._vocabulary = rows
                _refuse_beyond("input_ids", ids, rows, name, _TOKENIZER)
            else:
                _refuse_beyond("what it looks up", ids, rows, name, "give shorter sequences if these are positions")

        return look

    def _output_rows(self) -> int | None:
        """How many labels the model tells apart, if its output layer says so and is whole."""
        try:
            weight = self._model.get_output_embeddings().weight  # type: ignore[operator]
        except Exception:  # whatever a model raises that has no such layer, or does not say which it is
            return None
        return len(weight) if isinstance(weight, Tensor) and weight.dim() == 2 else None

    def _check_ids(self, key: str, rows: int | None, where: str) -> None:
        """Look at the ids of all batches, on the CPU."""
        if rows is None:
            return
        for batch in self._batches:
            ids = batch.get(key) if isinstance(batch, Mapping) else None
            if isinstance(ids, Tensor) and not ids.is_floating_point():
                ids = ids[ids != IGNORED] if key == "labels" else ids
                _refuse_beyond(f"{self._of}: {key}", ids, rows, where, _TOKENIZER)


def _refuse_beyond(what: str, ids: Tensor, rows: int, where: str, remedy: str) -> None:
    low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
    if low < 0 or high >= rows:
        raise _BeyondError(f"{what} go from {low} to {high}, and {where} has {rows} rows; {remedy}")


def _tokens(returned: Any) -> float:
    """The target tokens of what ``nll`` returned.

    Raises:
        TypeError: it is not a pair of numbers.
        ValueError: a number of tokens that is none.
    """
    pair: Any = () if isinstance(returned, Mapping) else returned
    try:
        nll, tokens = pair
    except (TypeError, ValueError):
        raise TypeError(f"it returned {describe(returned)}") from None
    numbers = []
    for what, value in {"summed NLL": nll, "number of target tokens": tokens}.items():
        try:
            numbers.append(float(torch.as_tensor(value).detach()))
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"its {what} is {describe(value)}") from None
    if not 0 <= numbers[1] < math.inf:
        raise ValueError(f"its number of target tokens is {numbers[1]}")
    return numbers[1]
