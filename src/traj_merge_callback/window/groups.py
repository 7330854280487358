"""Parameter groups: which part of the model each merged tensor belongs to, when each part has its own merge weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .layout import ParameterLayout, Slot

# Whole words of parameter names in the models people train; the first kind that matches is taken.
_KINDS = {
    "norms": r"\w*(norm|ln_?\w?|bn\d?)",
    "attention": r"\w*(attn|attention)\w*|[qkvo]_proj|qkv|query|key|value",
    "mlp": r"\w*(mlp|ffn?|feed_?forward|experts?|gate_proj|up_proj|down_proj|dense\w*|c_fc)",
    "embeddings": r"\w*(embed\w*|wte|wpe)",
    "head": r"\w*(lm_head|head|output)",
}


@dataclass(frozen=True)
class ParameterGroups:
    """A partition of a layout's slots into named groups.

    Args:
        names: of the groups, in the order of the rows of grouped merge weights.
        members: for each slot of the layout the index of its group.
    """

    names: tuple[str, ...]
    members: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)


def check_groups(groups: str | Mapping[str, list[str]] | None) -> None:
    """Raise a ValueError or TypeError if ``groups`` is none of what :func:`parameter_groups` takes."""
    if groups is None or groups == "blocks":
        return
    if isinstance(groups, str):
        raise ValueError(f"groups={groups!r}: must be None, 'blocks', or a dict of name patterns")
    if not isinstance(groups, Mapping):
        raise TypeError(f"groups={groups!r}: must be None, 'blocks', or a dict of name patterns")
    for name, patterns in groups.items():
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns) or not patterns:
            raise TypeError(f"groups[{name!r}]={patterns!r}: must be a list of patterns such as ['model.layers.0.*']")


def parameter_groups(layout: ParameterLayout, groups: str | Mapping[str, list[str]]) -> ParameterGroups:
    """Sort the merged tensors of a model into groups.

    Args:
        layout: the merged tensors.
        groups: "blocks": each block's attention and its MLP, all norms, embeddings and head; or a mapping from group
            names to lists of patterns of parameter names (shell style, ``*`` for anything); the first group that
            matches takes a tensor, and what matches none becomes the group "other".

    Raises:
        ValueError: a group of patterns that matches no merged tensor.
    """
    if isinstance(groups, str):
        labels = [_block_label(slot) for slot in layout.slots]
        names = list(dict.fromkeys(labels))
    else:
        labels = [_pattern_label(slot.name, groups) for slot in layout.slots]
        if empty := [name for name in groups if name not in labels]:
            some = ", ".join(slot.name for slot in layout.slots[:5])
            raise ValueError(f"groups={empty} match no merged tensor; their names are like {some}")
        names = [*groups, *(["other"] if "other" in labels and "other" not in groups else [])]
    return ParameterGroups(tuple(names), tuple(names.index(label) for label in labels))


def _block_label(slot: Slot) -> str:
    parts = slot.name.split(".")
    block = next((f"block {part} " for part in parts if part.isdigit()), "")
    for kind, pattern in _KINDS.items():
        if any(re.fullmatch(pattern, part.lower()) for part in parts):
            # Norms hold so few numbers that those of all blocks share one vector of weights.
            return kind if kind == "norms" else block + kind
    return f"{block}other"


def _pattern_label(name: str, groups: Mapping[str, list[str]]) -> str:
    for group, patterns in groups.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return group
    return "other"
