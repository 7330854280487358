"""A search that the first process runs, and whose candidates all processes evaluate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..distributed import Processes
from ..search import Problem, SearchFactory


class Decided:
    """A search as all processes see it: built, asked and told in the first one, which tells the others what it asks.

    Args:
        make: builds the search.
        problem: what it is built for.
        options: of the search.
        processes: those that train the model together.
    """

    def __init__(self, make: SearchFactory, problem: Problem, options: Mapping[str, Any], processes: Processes) -> None:
        self._make = make
        self._problem = problem
        self._options = options
        self._processes = processes
        self._search: Any = None
        self.needs_gradients: bool = getattr(make, "needs_gradients", False)
        self.wants_gradient = False
        self.wants_parts = problem.parts

    def ask(self) -> np.ndarray | None:
        """The search's next candidate, and how it wants it evaluated."""
        candidate, self.wants_gradient, self.wants_parts = self._processes.from_rank0(self._ask)
        return candidate

    def _ask(self) -> tuple[np.ndarray | None, bool, int]:
        if self._search is None:
            self._search = self._make(self._problem, **self._options)
        candidate = self._search.ask()
        parts = getattr(self._search, "wants_parts", self._problem.parts)
        return candidate, bool(getattr(self._search, "wants_gradient", False)), int(parts)

    def tell(self, weights: np.ndarray, loss: float, *more: Any) -> None:
        """Tell the search."""
        if self._search is not None:
            self._search.tell(weights, loss, *more)
