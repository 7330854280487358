"""One search for merge weights: candidates in, held-out losses out, the best evaluated one kept (k-world)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .search import Problem, Search

# A search may repeat itself (repeats are answered from memory, for free), but not for ever.
_ASKS_PER_EVALUATION = 10
# A forward and a backward pass, in forward passes.
_GRADIENT_COST = 3


@dataclass(frozen=True)
class Selection:
    """The best evaluated merge weights and their loss on the search split.

    Args:
        weights: shape ``(size,)``.
        loss: nats per token.
        evaluations: how many candidates were evaluated, live included.
        forward_equivalents: what that cost, in forward passes over the search split.
    """

    weights: np.ndarray
    loss: float
    evaluations: int = 1
    forward_equivalents: int = 1

    @property
    def is_live(self) -> bool:
        """Whether the live model itself was the best candidate."""
        return is_row(self.weights, len(self.weights) - 1)


def is_row(weights: np.ndarray, index: int) -> bool:
    """Whether the weights are exactly one row alone."""
    return weights[index] == 1.0 and np.count_nonzero(weights) == 1


def select(
    search: Search,
    problem: Problem,
    evaluate: Callable[[np.ndarray, bool], tuple[float, np.ndarray | None]],
    row_losses: dict[int, float],
) -> Selection:
    """Run a search to its end or its budget.

    Args:
        search: asked for candidates and told their losses; live is evaluated before it is asked.
        problem: the problem the search was built for; ``problem.evaluations`` is the budget.
        evaluate: the loss of merge weights on the search split, and its gradient in the weights if asked for.
        row_losses: losses of single rows by step, known from earlier merges; new ones are added.

    Raises:
        ValueError: a candidate of the wrong shape, with a weight that is not finite, or that does not sum to 1.
    """
    best = Selection(problem.row(age=0), problem.live_loss)
    known = {best.weights.tobytes(): problem.live_loss}
    for age, step in enumerate(reversed(problem.steps)):
        if step in row_losses:
            known[problem.row(age).tobytes()] = row_losses[step]
    evaluations, spent = 0, 0
    for _ in range(_ASKS_PER_EVALUATION * problem.evaluations):
        candidate = search.ask()
        if candidate is None:
            break
        weights = _checked(candidate, problem)
        key = weights.tobytes()
        wants_gradient = bool(getattr(search, "wants_gradient", False))
        gradient = None
        if wants_gradient or key not in known:
            cost = _GRADIENT_COST if wants_gradient else 1
            if spent + cost > problem.evaluations:
                break
            known[key], gradient = evaluate(weights, wants_gradient)
            evaluations, spent = evaluations + 1, spent + cost
        loss = known[key] if math.isfinite(known[key]) else math.inf
        if loss < best.loss:
            best = Selection(weights, loss)
        if gradient is None:
            search.tell(weights, loss)
        else:
            search.tell(weights, loss, gradient)  # type: ignore[call-arg]
    row_losses |= {
        step: known[key]
        for age, step in enumerate(reversed(problem.steps))
        if (key := problem.row(age).tobytes()) in known
    }
    return Selection(best.weights, best.loss, evaluations + 1, spent + 1)


def _checked(candidate: np.ndarray, problem: Problem) -> np.ndarray:
    weights = np.array(candidate, dtype=np.float64)
    if weights.shape != (problem.size,):
        raise ValueError(f"the search proposed weights of shape {weights.shape}; the problem has {problem.size}")
    if not np.isfinite(weights).all() or abs(weights.sum() - 1.0) > 1e-6:
        raise ValueError(f"the search proposed weights {weights.tolist()}, which are not finite with a sum of 1")
    return weights + 0.0  # -0.0 becomes 0.0, so that equal candidates have equal bytes
