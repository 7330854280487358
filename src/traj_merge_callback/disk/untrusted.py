"""Reading what somebody else may have written or damaged: names, paths and JSON are checked before they are used.

Whatever is wrong raises a ValueError, or a FileNotFoundError where a file is missing. Nothing is unpickled anywhere.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# Larger than any document of ours: an index of ranges takes about 60 bytes for each tensor and rank.
_LARGEST_DOCUMENT = 2**30
# Integers of more digits are no steps, sizes or times; parsing very long ones takes for ever.
_MOST_DIGITS = 18


def parse_json(data: bytes) -> Any:
    """A JSON document in UTF-8, with keys that are unique and integers of at most 18 digits.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_with_unique_keys, parse_int=_short_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice in an object")
    return found


def _short_integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS + 1:
        raise ValueError(f"an integer has {len(digits)} digits")
    return int(digits)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; see :func:`own_file`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is something else, or lies elsewhere.
    """
    own_file(path)
    if (size := path.stat().st_size) > _LARGEST_DOCUMENT:
        raise ValueError(f"{path} is damaged: it has {size} bytes")
    try:
        return mapping(parse_json(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error!s:.200})") from error


def own_file(path: Path) -> Path:
    """A path, if a regular file is there, which lies in its folder after links are followed.

    Links into the ``blobs`` of the Hugging Face cache, as ``huggingface_hub.snapshot_download`` makes them, are
    followed too.

    Raises:
        FileNotFoundError: there is no regular file.
        ValueError: its name is no file name, or the file lies elsewhere.
    """
    home, found = resolved(path.parent), resolved(path)
    stores = [above.parent / "blobs" for above in home.parents if above.name == "snapshots"]
    if not found.is_relative_to(home) and found.parent not in stores:
        raise ValueError(f"{path} leads out of its folder, to {found}")
    if not found.is_file():
        raise FileNotFoundError(f"{path} is not there, or is not a file")
    return path


def resolved(path: Path) -> Path:
    """Where a path leads.

    Raises:
        ValueError: in a circle.
    """
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # links that lead to each other
        raise ValueError(f"{path} leads nowhere ({error})") from error


def safetensors_in(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU; see :func:`own_file`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or lies elsewhere.
    """
    own_file(path)
    with damage_of(path):
        return load_file(path)


@contextmanager
def damage_of(path: Path) -> Iterator[None]:
    """What is wrong with a file, or with the files of a folder, becomes a ValueError that names it.

    A FileNotFoundError where it is not there any more: a run that goes on removes its oldest snapshots while somebody
    reads them, and safetensors and torch do not say so in the same way at each step of opening a file.
    """
    try:
        yield
    except (SafetensorError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        if not path.exists():
            raise FileNotFoundError(f"{path} was removed while it was read") from error
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error


def folder_name_of_step(step: int) -> str:
    """The name of a folder that belongs to an optimizer step: ``step-00000500``."""
    return f"step-{step:08d}"


def is_step_name(name: Any) -> bool:
    """Whether it is a name that :func:`folder_name_of_step` gives."""
    if not isinstance(name, str) or not re.fullmatch(r"step-[0-9]{8,18}", name):
        return False
    return name == folder_name_of_step(int(name.removeprefix("step-")))


def is_folder_of_step(path: Path, holds: str) -> bool:
    """Whether a path is a folder of ours, as :func:`folder_name_of_step` names it, with a file of ours in it.

    A user's folder that happens to have such a name is none, nor is a link.
    """
    return is_step_name(path.name) and path.is_dir() and not path.is_symlink() and (path / holds).is_file()


# Values of a JSON document


def integer(value: Any, *, least: int = 0) -> int:
    """An integer that is at least ``least``.

    Raises:
        TypeError, ValueError: it is none.
    """
    if type(value) is not int:
        raise TypeError(f"{value!r} is not an integer")
    if value < least:
        raise ValueError(f"{value} is less than {least}")
    return value


def number(value: Any, *, finite: bool = True) -> float:
    """A number.

    Raises:
        TypeError, ValueError: it is none, or is not finite.
    """
    if type(value) not in (int, float):
        raise TypeError(f"{value!r} is not a number")
    if finite and not math.isfinite(value):
        raise ValueError(f"{value!r} is not finite")
    return value


def numbers(values: Any, *, finite: bool = True) -> list[float]:
    """A list of numbers; see :func:`number`."""
    return [number(value, finite=finite) for value in sequence(values)]


def sequence(values: Any) -> list[Any]:
    """A list.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is not a list")
    return values


def texts(values: Any) -> list[str]:
    """A list of strings; see :func:`sequence`."""
    if wrong := [value for value in sequence(values) if not isinstance(value, str)]:
        raise TypeError(f"{wrong[0]!r} is not a string")
    return values


def shards_in(index: Path, suffixes: tuple[str, ...] = (".safetensors",)) -> list[str]:
    """The names of the weights files that an index of Hugging Face names, which lie beside it.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: it is damaged, or names something else.
    """
    with damage_of(index):
        names = sorted(set(texts(list(read_json_object(index)["weight_map"].values()))))
    if wrong := [name for name in names if not (re.fullmatch(r"[\w.-]+", name) and name.endswith(suffixes))]:
        raise ValueError(f"{index} is damaged: {wrong[0]!r} is not the name of a weights file")
    return names


def mapping(values: Any) -> dict[str, Any]:
    """An object.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{values!r} is not an object")
    return values
