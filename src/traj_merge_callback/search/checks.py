"""What an option may be: the checks of single values, and the name that was probably meant."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Collection
from numbers import Real
from typing import Any

#: The largest seed that all random generators take.
LARGEST_SEED = 2**32 - 1


def did_you_mean(given: object, known: Collection[str]) -> str:
    """The end of a sentence that names what is most like a misspelt name; empty if nothing is."""
    found = difflib.get_close_matches(str(given).lower(), known, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def integer(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> int:
    """The value as an ``int``, from one of any library; a bool is none."""
    try:
        found = operator.index(value) if not isinstance(value, bool) else None
    except TypeError:
        found = None
    if found is None:
        raise TypeError(f"{name}={value!r}: must be an integer; got a {type(value).__name__}")
    if found < least:
        raise ValueError(f"{name}={value}: must be at least {least}")
    if found > most:
        raise ValueError(f"{name}={value}: must be at most {most}")
    return found


def number(name: str, value: Any, right: str) -> float:
    """The value as a finite ``float``.

    Args:
        name: of the option.
        value: what was given.
        right: what would be right, for the message.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r}: must be {right}; got a {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value}: must be {right}")
    return float(value)


def choice(name: str, value: Any, allowed: Collection[str]) -> None:
    """Raise a ValueError if the value is none of the allowed ones."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {[*allowed]}{did_you_mean(value, allowed)}")
