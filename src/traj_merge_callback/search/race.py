"""The surrogate, and where training went astray a race before it, which says which rows are worth a merge."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from .problem import GRADIENT_COST, Observed, Problem, Search
from .recipes import perplexity
from .spans import Span
from .surrogate import SurrogateSearch, near_live

# A row, or a merge, is clearly worse than another one if its loss is higher by this share of it.
_CLEARLY = 0.02
# Ratio of the squared distances between neighbouring rows, to the median, from which on the principal axes are those of
# one row's distance alone: see space._SMALLEST_EXTENT.
_UNEVEN = 1e6


class RacedSearch(Search):
    """The surrogate, unless something looks wrong: then rows alone and simple merges are raced first.

    The surrogate believes that the loss is a quadratic between the rows. After a loss spike or a burst of the learning
    rate that is wrong. A race is run if live's loss rose far above that of the last merges, if the surrogate's first
    candidate is clearly worse than live or than the last merge was, if two later ones are clearly worse than live, or
    if one row is out of all proportion to the others. Every row alone is evaluated without gradient on the same part
    of the search split. Training makes rows better: one that is clearly worse than an older one is *spoiled*. Spoiled
    rows get weight 0, leave the window first (see ``Ring.room``) and are remembered until then. Of the other rows come
    three more candidates: the last merge's weights, an EMA, and the recipe "perplexity". The best of all is evaluated
    on the whole search split, so that nothing worse is published, and the surrogate goes on from there among the rows
    that are not spoiled.

    With too few evaluations for a race the last merge, once more, takes the place of its winner. A merge where nothing
    looks wrong is the surrogate's alone, and costs what it costs.

    Args:
        problem: the merge's problem, with its Gram matrix.
        space, bounds: see :class:`.surrogate.SurrogateSearch`.

    Raises:
        ValueError: as :func:`.space.check_space`.
    """

    needs_gradients = True
    multiscale = True
    wants_parts: int

    def __init__(self, problem: Problem, *, space: str = "affine", bounds: tuple[float, float] | None = None) -> None:
        super().__init__(problem)
        assert problem.gram is not None
        self._options: dict[str, Any] = {"space": space, "bounds": bounds}
        self._left = float(problem.evaluations)
        # What the last merge's weights should come near; at the first merge there are none.
        before = problem.memory.pop("merged", None)
        self._expected = np.inf if before is None else min(problem.live_loss, before)
        spoiled = problem.memory.get("spoiled", [])
        names = problem.names[:-1]  # live is what it is now
        self._good = [index for index, name in enumerate(names) if name not in spoiled] + [len(names)]
        # Candidates of the race that are still to be evaluated, and the scores of those that were, with their weights.
        self._runners: list[np.ndarray] = []
        self._scores: list[tuple[float, np.ndarray]] = []
        # The winner, until it has been evaluated on the whole split.
        self._winner: np.ndarray | None = None
        self._is_first, self._raced, self._given_up = True, False, 0
        self._surrogate = None
        looks_wrong = problem.astray or is_uneven(problem.gram)
        if looks_wrong and not self._race() and self._left >= 1:
            self._winner = self._again()  # too few evaluations for a race: as good as the last merge is good enough
        if not (self._runners or self._winner is not None):
            self._surrogate = self._among_good(self._previous())

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Raise a ValueError for an unknown space or wrong bounds."""
        SurrogateSearch.check_options(**options)

    def ask(self) -> np.ndarray | None:
        self.same_part = bool(self._runners)
        if self._runners:
            self.wants_gradient, self.wants_parts = False, 1
            return self._runners[0]
        if self._winner is not None:
            self.wants_gradient, self.wants_parts = False, self.problem.parts
            return self._winner
        candidate = None if self._surrogate is None else self._surrogate.ask()
        if self._surrogate is None or candidate is None:
            return None
        self.wants_gradient, self.wants_parts = self._surrogate.wants_gradient, self._surrogate.wants_parts
        return self._of_all_rows(candidate)

    def tell(self, weights: np.ndarray, loss: float, observed: Observed) -> None:
        score = self.problem.objective.score(observed.losses)
        score = score if np.isfinite(score) else np.inf
        memory = self.problem.memory
        if self.wants_parts == self.problem.parts and np.isfinite(score):
            memory["merged"] = min(score, self.problem.live_loss, memory.get("merged", np.inf))
        if self._runners:
            self._left -= 1.0 / self.problem.parts
            self._scores.append((score, self._runners.pop(0)))
            if not self._runners:
                self._next_lap()
        elif self._winner is not None:
            self._left -= 1.0
            start, self._winner = self._winner, None
            if np.isfinite(score):
                self._surrogate = self._among_good(start, observed.losses)
        elif self._surrogate is not None:
            share = 1.0
            if observed.parts is not None:
                share = float(observed.parts.tokens.sum() / self.problem.objective.tokens.sum())
            self._left -= share * (1.0 if observed.parts is None else GRADIENT_COST)
            if self._is_first:
                looks_wrong = score > self._expected + _CLEARLY * abs(self._expected)
            else:
                # Given up before the whole split was evaluated. Once may be a step too long, from which it learns.
                self._given_up += share < 1.0 and score > self.problem.live_loss
                looks_wrong = self._given_up == 2
            self._is_first = False
            if (looks_wrong or not np.isfinite(score)) and self._race():
                return
            try:
                self._surrogate.tell(weights[self._good], loss, self._among_good_rows(observed))
            except np.linalg.LinAlgError:  # its model cannot be solved: what was evaluated counts
                self._surrogate = None

    def _race(self) -> bool:
        """Begin a race, if there was none and the budget allows it and one evaluation more."""
        problem = self.problem
        if self._raced or self._left < (problem.size + 3) / problem.parts + 1:
            return False
        self._raced, self._is_first, self._surrogate = True, False, None
        self._runners = [problem.row(age) for age in reversed(range(problem.size))]
        return True

    def _next_lap(self) -> None:
        """After the rows come merges of those that are not spoiled; after these there is a winner."""
        problem = self.problem
        if len(self._scores) == problem.size:
            losses = np.array([score for score, _ in self._scores])
            self._good = unspoiled(losses)
            problem.memory["spoiled"] = [name for at, name in enumerate(problem.names) if at not in self._good]
            if len(self._good) > 1:
                recipe = self._of_all_rows(perplexity(losses[self._good].tolist()))
                average = near_live(self._good_spans(), len(self._good))
                self._runners = [recipe, self._of_all_rows(average)]
                if (previous := self._previous()) is not None:
                    self._runners.append(previous)
                return
        best, winner = min(self._scores, key=lambda one: one[0])
        self._winner = winner if np.isfinite(best) else None

    def _among_good(self, start: np.ndarray | None, losses: np.ndarray | None = None) -> SurrogateSearch | None:
        """The surrogate of the rows that are not spoiled; None if there is nothing that it could do.

        Args:
            start: where it begins.
            losses: there, on the whole split; after a race live may be spoiled, so that its loss says nothing.
        """
        problem, good = self.problem, self._good
        assert problem.gram is not None
        gram = problem.gram[np.ix_(good, good)]
        if len(good) < 2 or not np.isfinite(gram).all():
            return None
        among = replace(
            problem,
            steps=tuple(problem.steps[index] for index in good),
            spans=self._good_spans(),
            gram=gram,
            previous=None if start is None else start[good],
            evaluations=int(self._left),
        )
        try:
            known = None if start is None or losses is None else (start[good], losses)
            return SurrogateSearch(among, known=known, **self._options)
        except np.linalg.LinAlgError:
            return None

    def _among_good_rows(self, observed: Observed) -> Observed:
        gradients, parts = observed.gradients, observed.parts
        return Observed(
            observed.losses,
            None if gradients is None else gradients[:, self._good],
            None if parts is None else parts.on_rows(self._good),
        )

    def _of_all_rows(self, weights: np.ndarray) -> np.ndarray:
        """Weights of the good rows, and 0 for spoiled ones."""
        found = np.zeros(self.problem.size)
        found[self._good] = weights
        return found

    def _previous(self) -> np.ndarray | None:
        """The last merge's weights: by age, and where rows are spoiled those of that merge on the other rows."""
        return self.problem.previous if len(self._good) == self.problem.size else self._again()

    def _again(self) -> np.ndarray | None:
        """The last merge once more, of rows that are not spoiled; None where most of it has left, or is spoiled."""
        good, again = self._good, self.problem.again
        if again is None or again[good].sum() < 0.5:
            return None
        return self._of_all_rows(again[good] / again[good].sum())

    def _good_spans(self) -> tuple[Span, ...]:
        return tuple(self.problem.spans[index] for index in self._good) if self.problem.spans else ()


def is_uneven(gram: np.ndarray) -> bool:
    """Whether a Gram matrix is not finite, or a row is out of all proportion to the others."""
    if not np.isfinite(gram).all():
        return True
    squares = np.diag(gram)
    apart = squares[1:] + squares[:-1] - 2.0 * np.diag(gram, 1)
    # Where the newest row is far away, the distances between the others are rounding errors of any sign, or 0.
    return bool(apart.max() > _UNEVEN * float(np.median(np.abs(apart))))


def unspoiled(losses: np.ndarray) -> list[int]:
    """The rows, by index, that are finite and not clearly worse than an older one.

    Args:
        losses: of the rows alone, oldest first, shape ``(k,)``.
    """
    if not np.isfinite(losses).any():
        return []
    older = np.minimum.accumulate(np.concatenate([[np.inf], losses[:-1]]))
    good = np.isfinite(losses) & (losses <= older + _CLEARLY * abs(losses.min()))
    return np.flatnonzero(good).tolist()
