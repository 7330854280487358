"""One search for merge weights: candidates in, held-out losses out, the best evaluated one kept (k-world)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..pieces import SEARCH, Pieces
from ..search import GradientSearch, Observed, Problem, Search
from ..search.evaluation import Evaluation, Gradient

# A search may repeat itself (repeats are answered from memory, for free), but not for ever.
_ASKS_PER_EVALUATION = 10
# A forward and a backward pass, in forward passes.
_GRADIENT_COST = 3

Measure = Callable[
    [np.ndarray, bool, Sequence[int], Callable[[Evaluation], bool]], Pieces[tuple[Evaluation, "Gradient | None"]]
]


@dataclass(frozen=True)
class Selection:
    """The best candidate so far, and what it cost to find.

    Args:
        weights: shape ``(size,)`` or ``(groups, size)``; None for live itself.
        loss: the objective on the search split, nats per token.
        evaluation: on the search split; None if the loss was known from an earlier merge.
        evaluations: how many candidates were evaluated, live included.
        forward_equivalents: what that cost, in forward passes over the search split.
    """

    weights: np.ndarray | None
    loss: float
    evaluation: Evaluation | None
    evaluations: int = 1
    forward_equivalents: float = 1.0


def select(
    search: Search | GradientSearch,
    problem: Problem,
    measure: Measure,
    start: Selection,
    row_losses: dict[int, list[float]],
) -> Pieces[Selection]:
    """Run a search to its end or its budget, in pieces.

    Args:
        search: asked for candidates and told their losses.
        problem: the problem the search was built for; ``problem.evaluations`` is the budget.
        measure: evaluates merge weights on parts of the search split, with the gradient in the weights if asked for.
        start: the best candidate so far, live to begin with.
        row_losses: losses of single rows by step, known from earlier merges; new ones are added. Each is a list, of the
            losses of the objective's components.

    Raises:
        ValueError: a candidate of the wrong shape, with a weight that is not finite, or that does not sum to 1.
    """
    objective = problem.objective
    best, count, spent = start, 0, 0.0
    known = {} if problem.live is None else {problem.live.tobytes(): objective.live}
    single = {problem.row(age).tobytes(): step for age, step in enumerate(reversed(problem.steps))}
    known |= {key: np.array(row_losses[step]) for key, step in single.items() if step in row_losses}

    def hopeless(evaluation: Evaluation) -> bool:
        unfinished = len(evaluation.nll) < problem.batches
        return unfinished and best.evaluation is not None and objective.clearly_worse(evaluation, best.evaluation)

    for _ in range(_ASKS_PER_EVALUATION * problem.evaluations):
        yield SEARCH
        if (candidate := search.ask()) is None:
            break
        weights = _checked(candidate, problem)
        key = weights.tobytes()
        with_gradient = bool(getattr(search, "wants_gradient", False))
        wanted_parts = min(int(getattr(search, "wants_parts", problem.parts)), problem.parts)
        evaluation, gradient = None, None
        if with_gradient or key not in known:
            cost = _GRADIENT_COST if with_gradient else 1
            if spent + cost * wanted_parts / problem.parts > problem.evaluations:
                break
            # Candidates that are not evaluated on all parts take different ones in turn, whose errors differ.
            parts = [(count + part) % problem.parts for part in range(wanted_parts)]
            evaluation, gradient = yield from measure(weights, with_gradient, parts, hopeless)
            share = len(evaluation.nll) / problem.batches
            count, spent = count + 1, spent + cost * share
            losses = objective.losses(evaluation)
            whole = len(evaluation.nll) == problem.batches
            if whole:
                known[key] = losses
            elif best.evaluation is not None:
                # Its difference to the best candidate is taken to be the same on the rest of the split.
                losses = losses + objective.losses(best.evaluation)
                losses -= objective.losses(best.evaluation.on(evaluation.indices))
        else:
            losses, whole = known[key], True
        loss = objective.value(losses)
        # What was not evaluated on the whole split is not known well enough to be published.
        if whole and loss < best.loss:
            best = replace(best, weights=weights, loss=loss, evaluation=evaluation)
        more: tuple[Any, ...] = ()
        if getattr(search, "needs_gradients", False):
            more = (Observed(losses, None if gradient is None else objective.gradients(gradient), gradient),)
        yield SEARCH
        search.tell(weights, loss, *more)
    row_losses |= {step: known[key].tolist() for key, step in single.items() if key in known}
    return replace(best, evaluations=best.evaluations + count, forward_equivalents=best.forward_equivalents + spent)


def _checked(candidate: np.ndarray, problem: Problem) -> np.ndarray:
    weights = np.array(candidate, dtype=np.float64)
    if weights.shape != problem.shape:
        raise ValueError(f"the search proposed weights of shape {weights.shape}; the problem has {problem.shape}")
    if not np.isfinite(weights).all() or np.abs(weights.sum(axis=-1) - 1.0).max() > 1e-6:
        raise ValueError(f"the search proposed weights {weights.tolist()}, which are not finite with a sum of 1")
    return weights + 0.0  # -0.0 becomes 0.0, so that equal candidates have equal bytes
