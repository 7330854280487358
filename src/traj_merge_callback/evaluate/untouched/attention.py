"""Flex attention in a model that is evaluated eagerly: compiled all the same, since eagerly it makes all the scores."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_MODULE = "torch.nn.attention.flex_attention"


@contextmanager
def compiled_flex_attention() -> Iterator[None]:
    """Within the context, where nothing else is compiled, ``flex_attention`` runs as its fused kernel.

    Without it, a sequence of length S would take ``heads * S * S`` floats. What is compiled is a function of our own:
    training's compiled graphs, and the number of times that they may be compiled again, stay as they are.
    """
    module = sys.modules.get(_MODULE)
    operator = getattr(module, "flex_attention_hop", None)
    if module is None or operator is None:
        yield
        return
    replaced = {"flex_attention_hop": _fused, "_warn_once": lambda *args, **kwargs: None}
    kept = {name: getattr(module, name) for name in replaced if hasattr(module, name)}
    try:
        vars(module).update({name: replaced[name] for name in kept})
        yield
    finally:
        vars(module).update(kept)


def _fused(*args: Any) -> Any:
    with torch.compiler.set_stance("default"):
        if args[0].device.type == "cpu":  # whose kernel has no other outputs
            return _compiled(only_first=True)(*args), None, None
        return _compiled(only_first=False)(*args)


@functools.cache
def _compiled(*, only_first: bool) -> Callable[..., Any]:
    """The operator, or its first output; made when it is first needed, as torch.compile takes seconds to import."""

    def operator(*args: Any) -> Any:
        from torch._higher_order_ops.flex_attention import flex_attention

        return flex_attention(*args)[0] if only_first else flex_attention(*args)

    return torch.compile(operator, fullgraph=True)
