"""The default way from a model and a batch to a summed negative log-likelihood."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Nll: TypeAlias = Callable[[nn.Module, Any], tuple[Tensor | float, Tensor | float | int]]

_IGNORED = -100


def language_model_nll(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """``(summed NLL in nats, target tokens)`` of a model that returns its mean loss per target token as ``.loss``.

    Args:
        model: called as ``model(**batch)``, like every Hugging Face model.
        batch: a mapping with "labels", shape ``(sequences, length)``; labels of -100 are no targets. A causal model
            predicts labels from the second position on.

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
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None and isinstance(output, tuple) and output:
        loss = output[0]
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"{type(model).__name__} returned no .loss for a batch with labels; "
            "pass nll=, a function (model, batch) -> (summed NLL, tokens)"
        )
    return loss.float().mean() * tokens, tokens


def count_targets(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """The number of labels the model's loss averages over: not -100, and shifted by one for causal models."""
    if "shift_labels" in batch:
        labels = batch["shift_labels"]
    else:
        labels = batch["labels"][..., 1:] if shifts_labels(model) and batch["labels"].dim() > 1 else batch["labels"]
    return int((labels != _IGNORED).sum())


def shifts_labels(model: nn.Module) -> bool:
    """Whether the model shifts labels itself: causal decoders do, encoder-decoders and masked models do not."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    loss_function = getattr(model, "loss_function", None)
    return loss_function is None or getattr(loss_function, "__name__", "") == "ForCausalLMLoss"


def _describe(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a mapping with keys {sorted(map(str, batch))}"
    return f"a {type(batch).__name__}"
