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
_SHOWN = 80


def did_you_mean(given: object, known: Collection[str]) -> str:
    """The end of a sentence that names what is most like a misspelt name; empty if nothing is."""
    found = difflib.get_close_matches(str(given).lower(), known, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def shown(value: object) -> str:
    """A value in one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def whole(value: Any) -> int | None:
    """An integer of any library as an ``int``; None for everything else, also for a bool."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def integer(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> int:
    """The value as an ``int``; see :func:`whole`."""
    found = whole(value)
    if found is None:
        raise TypeError(f"{name}={shown(value)}: must be an integer; got a {type(value).__name__}")
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
        raise TypeError(f"{name}={shown(value)}: must be {right}; got a {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value}: must be {right}")
    return float(value)


def share(name: str, value: Any) -> None:
    """Raise a ValueError or TypeError if the value is no number strictly between 0 and 1."""
    if not 0.0 < number(name, value, right := "a share strictly between 0 and 1, as 0.5") < 1.0:
        raise ValueError(f"{name}={value}: must be {right}")


def choice(name: str, value: Any, allowed: Collection[str]) -> None:
    """Raise a ValueError if the value is none of the allowed ones."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={shown(value)} is not one of {[*allowed]}{did_you_mean(value, allowed)}")


def names(name: str, given: Collection[str], known: Collection[str], what: str) -> None:
    """Raise a ValueError if some of the given names are not known.

    Args:
        name: of the option.
        given: the names, or a mapping from them.
        known: those that there are.
        what: they are names of.
    """
    if unknown := sorted(set(given) - set(known)):
        meant = did_you_mean(unknown[0], known)
        raise ValueError(f"{name}={given}: {unknown} are not among the {what}, {sorted(known)}{meant}")


def function(name: str, value: Any, right: str) -> None:
    """Raise a TypeError if the value is no function; a context is none, although some can be called."""
    if not callable(value) or hasattr(type(value), "__enter__"):
        raise TypeError(f"{name}={shown(value)}: must be a function, {right}")
