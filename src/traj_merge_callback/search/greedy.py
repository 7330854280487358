"""Greedy soup: add rows to the uniform average, best first, as long as the loss falls."""

from __future__ import annotations

import numpy as np

from .problem import Observed, Problem, Search


class GreedySearch(Search):
    """Greedy soup (Model soups, arXiv 2203.05482) over the newest rows the budget allows.

    Every row is evaluated alone, then rows join the soup in the order of their loss where that lowers the soup's loss.
    r rows cost at most ``2 (r - 1)`` evaluations beside live, so r = ``1 + evaluations // 2`` newest rows take part.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._rows = max(2, min(len(problem.steps), 1 + problem.evaluations // 2))
        self._losses = dict(problem.live_losses)
        self._soup: list[int] = []
        self._soup_loss = np.inf
        self._waiting: list[int] | None = None
        self._asked: list[int] = []

    def ask(self) -> np.ndarray | None:
        if len(self._losses) < self._rows:
            return self._problem.row(age=len(self._losses))
        if self._waiting is None:
            self._waiting = sorted(self._losses, key=lambda age: self._losses[age])
            best = self._waiting.pop(0)
            self._soup, self._soup_loss = [best], self._losses[best]
        if not self._waiting:
            return None
        self._asked = [*self._soup, self._waiting.pop(0)]
        return np.mean([self._problem.row(age) for age in self._asked], axis=0)

    def tell(self, weights: np.ndarray, loss: float, observed: Observed) -> None:
        if self._waiting is None:
            self._losses[len(self._losses)] = loss
        elif loss < self._soup_loss:
            self._soup, self._soup_loss = self._asked, loss
