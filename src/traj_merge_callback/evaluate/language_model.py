"""The default loss: the negative log-likelihood of a language model's target tokens, and nothing else in ``.loss``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .data import IGNORED, count_sequences

# The model's .loss and the one that its logits give differ by no more than this, relatively, if they are the same.
_SAME = {torch.float32: 2e-5, torch.float64: 2e-5}
_SAME_ROUNDED = 1e-2
# Of two ways to shift labels one is the model's if .loss is this much nearer to it.
_NEARER = 0.1


@dataclass(frozen=True)
class _Convention:
    """How a model's loss comes of its logits and labels.

    Args:
        shifts: whether the logits of a position are for the label of the next one.
        loss_is_nll: whether ``.loss`` is the mean NLL of the targets, and no more.
    """

    shifts: bool
    loss_is_nll: bool


class LanguageModelNll:
    """``(summed NLL in nats, target tokens)`` of a model that returns ``.loss`` for batches with labels.

    ``.loss`` is compared with the mean NLL that the model's logits give, with and without the shift of causal models.
    That shows which labels are targets. Where ``.loss`` is neither, it holds more (a router's loss, label smoothing,
    further heads): from then on the NLL is computed from the logits. Without logits to look at, ``.loss`` is taken as
    it is, and the labels as the model's class has it. Passes with gradients go by what those without have shown.

    Args:
        say: called with a sentence if ``.loss`` is not what is measured.
    """

    def __init__(self, say: Callable[[str], None] = lambda text: None) -> None:
        self._say = say
        self._convention: _Convention | None = None
        self._taken_as_it_is = False

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        """See :class:`LanguageModelNll`.

        Args:
            model: called as ``model(**batch)``, like every Hugging Face model.
            batch: a mapping with "labels", shape ``(sequences, length)``; labels of -100 are no targets.

        Raises:
            TypeError: the batch is no mapping with labels, or the output has no loss; the message names ``nll=``.
        """
        if not isinstance(batch, Mapping) or not ("labels" in batch or "shift_labels" in batch):
            raise TypeError(
                f"held-out batches must be mappings with 'labels', got {_describe(batch)}; "
                "for other batches pass nll=, a function (model, batch) -> (summed NLL, tokens)"
            )
        tokens = count_targets(model, batch)
        if tokens == 0:
            return torch.zeros(()), 0
        # In eval mode a decoder would otherwise build a key-value cache that nobody reads.
        no_cache = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
        output = model(**{**no_cache, **batch})
        loss = _loss_of(output)
        logits = None if "shift_labels" in batch else _logits_of(output, batch["labels"])
        if loss is None:
            raise TypeError(
                f"{type(model).__name__} returned no .loss, one number, for a batch with labels; "
                "pass nll=, a function (model, batch) -> (summed NLL, tokens)"
            )
        loss = loss.float().mean() if loss.dim() else loss
        if logits is not None:
            convention = self._convention
            if convention is None or not self._still_holds(convention, loss, logits, batch["labels"]):
                convention = self._learn(model, loss, logits, batch["labels"])
            targets = _targets(batch["labels"], logits.shape[1], convention.shifts)
            tokens = int((targets != IGNORED).sum())
            if not convention.loss_is_nll and logits.shape[1] == batch["labels"].shape[1]:
                # What the model has computed for its own loss is not needed to go backward.
                del output, loss
                return _summed(logits, targets), tokens
        elif "shift_labels" not in batch and not self._taken_as_it_is:
            self._taken_as_it_is = True
            self._say(
                f"held-out loss: {type(model).__name__} returns no logits of its labels to compare .loss with; it is "
                "taken as it is, for a mean over the labels, and may hold more than the language-model loss"
            )
        return (loss.float() * tokens if tokens else torch.zeros(())), tokens

    def _still_holds(self, convention: _Convention, loss: Tensor, logits: Tensor, labels: Tensor) -> bool:
        """Whether ``.loss`` is still no more than the NLL: other terms may come later, or with some batches only."""
        if torch.is_grad_enabled() or not convention.loss_is_nll:
            return True
        targets = _targets(labels, logits.shape[1], convention.shifts)
        mean = float(_summed(logits, targets)) / max(1, int((targets != IGNORED).sum()))
        return _same(mean, loss) or not math.isfinite(mean)

    def _learn(self, model: nn.Module, loss: Tensor, logits: Tensor, labels: Tensor) -> _Convention:
        """How this model's loss comes of logits and labels, kept if this batch shows it."""
        given, means = float(loss.detach()), {}
        for shifts in (True, False):
            targets = _targets(labels, logits.shape[1], shifts)
            with torch.no_grad():
                total = sum(float(_summed(logits[i : i + 1], targets[i : i + 1])) for i in range(len(targets)))
            means[shifts] = total / max(1, int((targets != IGNORED).sum()))
        same = [shifts for shifts, mean in means.items() if _same(mean, loss)]
        declared = shifts_labels(model)
        if len(same) == 2 or not all(map(math.isfinite, [given, *means.values()])):
            return _Convention(declared, loss_is_nll=True)
        if same:
            self._convention = _Convention(same[0], loss_is_nll=True)
            return self._convention
        away = {shifts: abs(mean - given) for shifts, mean in means.items()}
        nearest = min(away, key=lambda shifts: away[shifts])
        shifts = nearest if away[nearest] < _NEARER * away[not nearest] else declared
        if self._convention is not None:  # what was seen before holds more now
            shifts = self._convention.shifts
        self._convention = _Convention(shifts, loss_is_nll=False)
        name = type(model).__name__
        if logits.shape[1] == labels.shape[1]:
            self._say(
                f"held-out loss: the .loss of {name} holds more than the language-model loss ({given:.4f}, by its "
                f"logits {means[shifts]:.4f}); the mean NLL per token by the logits is searched on and reported"
            )
        else:
            self._say(
                f"held-out loss: the .loss of {name} is not the mean NLL of its labels by its logits, which stand at "
                "other positions; .loss is searched on and reported as it is"
            )
        return self._convention


def _same(mean: float, loss: Tensor) -> bool:
    tolerance = _SAME.get(loss.dtype, _SAME_ROUNDED)
    return math.isclose(mean, float(loss.detach()), rel_tol=tolerance, abs_tol=1e-6)


def language_model_nll(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """:class:`LanguageModelNll` of a single batch."""
    return LanguageModelNll()(model, batch)


def count_targets(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """The number of labels the model's loss averages over: not -100, and shifted by one for causal models."""
    if "shift_labels" in batch:
        labels = batch["shift_labels"]
    else:
        labels = batch["labels"][..., 1:] if shifts_labels(model) and batch["labels"].dim() > 1 else batch["labels"]
    return int((labels != IGNORED).sum())


def shifts_labels(model: nn.Module) -> bool:
    """Whether the class of the model, or of the model in it, shifts labels itself, as causal decoders do."""
    inner = next((m for m in model.modules() if hasattr(m, "config") and hasattr(m, "loss_function")), model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return False
    loss_function = getattr(inner, "loss_function", None)
    return loss_function is None or getattr(loss_function, "__name__", "") == "ForCausalLMLoss"


def summed_nll(model: nn.Module, batch: Any, mean_loss: Tensor) -> tuple[Tensor | float, int]:
    """A mean loss as ``(summed NLL, tokens)``: weighted with the batch's labels, without labels with its sequences."""
    has_labels = isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor)
    weight = count_targets(model, batch) if has_labels else count_sequences(batch)
    return mean_loss.float().mean() * weight if weight else 0.0, weight


def _entry(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _loss_of(output: Any) -> Tensor | None:
    """The loss: one number, or one for each device; in a tuple the only such tensor."""
    found = [_entry(output, "loss")]
    if found == [None] and isinstance(output, tuple):
        found = [one for one in output if isinstance(one, Tensor) and one.dim() == 0]
    (loss,) = found if len(found) == 1 else [None]
    return loss if isinstance(loss, Tensor) and loss.dim() <= 1 else None


def _logits_of(output: Any, labels: Any) -> Tensor | None:
    """``.logits``, or else the only output that may be logits of the labels."""
    if (logits := _entry(output, "logits")) is not None:
        return logits if _of_tokens(logits, labels) else None
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else []
    found = [one for one in values if _of_tokens(one, labels)]
    return found[0] if len(found) == 1 else None


def _of_tokens(logits: Any, labels: Any) -> bool:
    """Whether logits, shape ``(sequences, positions, vocabulary)``, may be those of labels for some positions."""
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor) or logits.dim() != 3 or labels.dim() != 2:
        return False
    if labels.is_floating_point() or len(logits) != len(labels) or logits.shape[1] < labels.shape[1]:
        return False
    targets = labels[labels != IGNORED]
    return not len(targets) or bool(targets.min() >= 0 and targets.max() < logits.shape[2])


def _targets(labels: Tensor, positions: int, shifts: bool) -> Tensor:
    """The token that the logits of each position are for, shape ``(sequences, positions)``.

    Where there are more positions than labels, virtual tokens stand in front, as in prompt tuning.
    """
    targets = functional.pad(labels, (positions - labels.shape[1], 0), value=IGNORED)
    return functional.pad(targets, (0, 1), value=IGNORED)[:, 1:] if shifts else targets


def _summed(logits: Tensor, targets: Tensor) -> Tensor:
    targets = targets.to(logits.device).reshape(-1)
    return functional.cross_entropy(logits.float().flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")


def _describe(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a mapping with keys {sorted(map(str, batch))}"
    return f"a {type(batch).__name__}"
