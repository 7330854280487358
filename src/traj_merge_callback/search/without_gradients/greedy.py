"""Greedy soup: a uniform average of rows that grows by one row where that lowers the loss."""

from __future__ import annotations

import numpy as np

from ..problem import Observed, Problem, Search


class GreedySearch(Search):
    """Greedy soup (Model soups, arXiv 2203.05482) over the newest rows the budget allows.

    Every row is evaluated alone. The soup begins with the best row; the others are tried in the order of their loss,
    and stay in the soup, a uniform average, if they lower its loss. With live among them r rows cost at most
    ``2 (r - 1)`` evaluations, so the ``1 + evaluations // 2`` newest rows take part.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._rows = max(2, min(len(problem.steps), 1 + problem.evaluations // 2))
        # Losses of single rows, by age. The soup and the candidate asked for are lists of ages.
        self._losses = {0: problem.live_loss}
        self._soup: list[int] = []
        self._soup_loss = np.inf
        self._waiting: list[int] | None = None
        self._asked: list[int] = []

    def ask(self) -> np.ndarray | None:
        if len(self._losses) < self._rows:
            return self.problem.row(age=len(self._losses))
        if self._waiting is None:
            self._waiting = sorted(self._losses, key=lambda age: self._losses[age])
            best = self._waiting.pop(0)
            self._soup, self._soup_loss = [best], self._losses[best]
        if not self._waiting:
            return None
        self._asked = [*self._soup, self._waiting.pop(0)]
        return np.mean([self.problem.row(age) for age in self._asked], axis=0)

    def tell(self, weights: np.ndarray, loss: float, observed: Observed) -> None:
        if self._waiting is None:
            self._losses[len(self._losses)] = loss
        elif loss < self._soup_loss:
            self._soup, self._soup_loss = self._asked, loss
