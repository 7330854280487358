"""Flex attention in a model that is evaluated eagerly: compiled all the same, since eagerly it makes all the scores."""

from __future__ import annotations

import sys
from collections.abc import Iterator
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
            return _compiled_first(*args), None, None
        return _compiled(*args)


def _operator(*args: Any) -> Any:
    from torch._higher_order_ops.flex_attention import flex_attention

    return flex_attention(*args)


_compiled = torch.compile(_operator, fullgraph=True)
_compiled_first = torch.compile(lambda *args: _operator(*args)[0], fullgraph=True)
