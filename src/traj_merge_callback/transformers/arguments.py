"""The options beside ``TrainingArguments``: for ``HfArgumentParser``, from a command line, JSON or YAML."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, get_type_hints

from ..config import MergeConfig

# Options that TrainingArguments has as well.
_SHARED = ("output_dir", "seed")
# Options that may be dicts: on a command line as JSON.
_DICTS = ("search_options", "groups", "domain_weights")


class _Options:
    """What :class:`MergeArguments` adds to its fields."""

    def __post_init__(self) -> None:
        for name in _DICTS:
            if isinstance(given := getattr(self, name), str) and given.lstrip().startswith("{"):
                try:
                    setattr(self, name, json.loads(given))
                except ValueError as error:
                    raise ValueError(f"{name}={given!r}: is no JSON ({error})") from None
        MergeConfig(**self.options())

    def options(self) -> dict[str, Any]:
        """The options by the names that :class:`TrajMergeCallback` takes."""
        return {name.removeprefix("merge_") if name in _RENAMED else name: value for name, value in vars(self).items()}


_RENAMED = {f"merge_{name}" for name in _SHARED}
_HINTS = get_type_hints(MergeConfig)
_FIELDS = [
    (
        f"merge_{one.name}" if one.name in _SHARED else one.name,
        dict[str, Any] | str | None if one.name in _DICTS else _HINTS[one.name],
        dataclasses.field(default=one.default, default_factory=one.default_factory),
    )
    for one in dataclasses.fields(MergeConfig)
]
MergeArguments = dataclasses.make_dataclass("MergeArguments", _FIELDS, bases=(_Options,))
MergeArguments.__module__ = __name__
MergeArguments.__doc__ = """Options of :class:`MergeConfig` for ``HfArgumentParser``, beside ``TrainingArguments``.

The names are the same, but for ``merge_output_dir`` and ``merge_seed``, as ``TrainingArguments`` has ``output_dir`` and
``seed``. Options that are dicts are given as JSON on a command line.

Example::

    parser = HfArgumentParser((TrainingArguments, MergeArguments))
    args, merging = parser.parse_args_into_dataclasses()  # or parser.parse_yaml_file("run.yaml")
    TrajMergeCallback(**merging.options()).attach(Trainer(model, args, ...))

Raises:
    ValueError, TypeError: an option is wrong.
"""
