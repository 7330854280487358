"""Choosing a merge's weights: the problem is posed, the search runs on rank 0, the best evaluated candidate wins."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..config import MergeConfig
from ..distributed import Processes
from ..evaluate.heldout import HeldOutLoss
from ..search import Observed, Problem, Search, resolve_search
from ..search.evaluation import Evaluation, Gradient
from ..search.grouped import GroupedSearch
from ..search.objective import Objective
from ..search.problem import GRADIENT_COST, SearchState
from ..search.spans import carried_over
from ..window.matrix import Matrix
from ..window.pieces import SEARCH, Pieces

logger = logging.getLogger("traj_merge_callback")

# Live's losses at so many merges say what is usual.
_REMEMBERED = 8
# A search may repeat itself (repeats are answered from memory, for free), but not for ever.
_ASKS_PER_EVALUATION = 10
# At how many merges in a row something must fail for it to be a fault that stays.
_TRIES = 3
_WITHOUT = {
    "gradients": "auto could not search with gradients of the held-out loss, and this merge is made with "
    "search='reach', which needs none and finds a little less",
    "groups": "merge weights by parameter group need gradients of the held-out loss, which could not be had, and "
    "weights of the whole model are published",
}

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
    make: Callable[[], Search],
    problem: Problem,
    measure: Measure,
    start: Selection,
    row_losses: dict[str, list[float]],
    processes: Processes,
) -> Pieces[Selection]:
    """Run a search to its end or its budget, in pieces.

    The search is built, asked and told on rank 0 alone, which broadcasts its candidates; all ranks evaluate them.

    Args:
        make: builds the search.
        problem: what it is built for; ``problem.evaluations`` is the budget.
        measure: evaluates merge weights on parts of the search split, with the gradient in the weights if asked for.
        start: the best candidate so far, live to begin with.
        row_losses: losses of single rows by name, known from earlier merges; new ones are added. Each is a list, of the
            losses of the objective's components.
        processes: the ranks.

    Raises:
        ValueError: a candidate of the wrong shape, with a weight that is not finite, or that does not sum to 1.
    """
    objective, search = problem.objective, None
    best, count, spent = start, 0, 0.0
    # The best candidate of those evaluated here on the whole split, with which the others are compared.
    reference = start.evaluation
    known = {problem.live.tobytes(): objective.live}
    single = {problem.row(age).tobytes(): name for age, name in enumerate(reversed(problem.names))}
    known |= {key: np.array(row_losses[name]) for key, name in single.items() if name in row_losses}

    def ask() -> tuple[np.ndarray | None, bool, int, bool]:
        nonlocal search
        search = make() if search is None else search
        candidate = search.ask()
        parts = problem.parts if search.wants_parts is None else min(search.wants_parts, problem.parts)
        return candidate, search.wants_gradient, parts, search.same_part

    def hopeless(evaluation: Evaluation) -> bool:
        unfinished = len(evaluation.nll) < problem.batches
        return unfinished and best.evaluation is not None and objective.clearly_worse(evaluation, best.evaluation)

    for _ in range(_ASKS_PER_EVALUATION * problem.evaluations):
        yield SEARCH
        candidate, with_gradient, wanted_parts, same_part = processes.from_rank0(ask)
        if candidate is None:
            break
        weights = _checked(candidate, problem)
        key = weights.tobytes()
        evaluation, gradient = None, None
        if with_gradient or key not in known:
            cost = GRADIENT_COST if with_gradient else 1
            if spent + cost * wanted_parts / problem.parts > problem.evaluations:
                break
            # Candidates that are not evaluated on all parts take different ones in turn, whose errors differ.
            first = 0 if same_part else count
            parts = [(first + part) % problem.parts for part in range(wanted_parts)]
            evaluation, gradient = yield from measure(weights, with_gradient, parts, hopeless)
            share = len(evaluation.nll) / problem.batches
            count, spent = count + 1, spent + cost * share
            losses = objective.losses(evaluation)
            whole = len(evaluation.nll) == problem.batches
            if whole:
                known[key] = losses
            elif reference is not None:
                losses = objective.on_whole(evaluation, reference)
        else:
            losses, whole = known[key], True
        loss = objective.value(losses)
        # What was not evaluated on the whole split is not known well enough to be published.
        if whole and loss < best.loss:
            best = replace(best, weights=weights, loss=loss, evaluation=evaluation)
            reference = reference if evaluation is None else evaluation
        yield SEARCH
        if search is not None:
            gradients = None if gradient is None else objective.gradients(gradient)
            search.tell(weights, loss, Observed(losses, gradients, gradient))
    yield SEARCH  # all ranks know by now if the search has failed
    row_losses |= {name: known[key].tolist() for key, name in single.items() if key in known}
    return replace(best, evaluations=best.evaluations + count, forward_equivalents=best.forward_equivalents + spent)


def _checked(candidate: np.ndarray, problem: Problem) -> np.ndarray:
    weights = np.array(candidate, dtype=np.float64)
    if weights.shape != problem.shape:
        raise ValueError(f"the search proposed weights of shape {weights.shape}; the problem has {problem.shape}")
    if not np.isfinite(weights).all() or np.abs(weights.sum(axis=-1) - 1.0).max() > 1e-6:
        raise ValueError(f"the search proposed weights {weights.tolist()}, which are not finite with a sum of 1")
    return weights + 0.0  # -0.0 becomes 0.0, so that equal candidates have equal bytes


def _comparable(problem: Problem, spoiled: Collection[str]) -> list[int]:
    """The rows, by index, whose distances to others are numbers, but for the spoiled ones."""
    assert problem.gram is not None
    names = [""] * problem.leading_rows + list(problem.names)
    finite = np.isfinite(np.diagonal(problem.gram, axis1=-2, axis2=-1)).all(axis=0)
    return [index for index, name in enumerate(names) if finite[index] and name not in spoiled]


class Chooser:
    """Chooses merge weights for one window after another.

    Args:
        config: the options.
        heldout: weights are chosen on its search split.
        processes: the ranks.
    """

    def __init__(self, config: MergeConfig, heldout: HeldOutLoss, processes: Processes) -> None:
        self._processes = processes
        self._config = config
        self._heldout = heldout
        self._search = resolve_search(config.search, config.search_options)
        # What is under way that another attempt can do without: "gradients", "groups" or None.
        self._trying: str | None = None
        # Of each the step of the merge at which it last failed, and at how many merges in a row it has failed.
        self._failed_at: dict[str, int] = {}
        self._failures: dict[str, int] = {}
        # Whether merges use what an earlier part of the run remembered, and whether they may.
        self._remembers, self._may_remember = False, True

    @property
    def closed_form(self) -> bool:
        """Whether a merge has one candidate that depends on no loss."""
        return self._search.closed_form

    def objective(self, live: Evaluation) -> Objective:
        """What is minimised, given live's evaluation on the search split."""
        return Objective.of(
            live,
            self._heldout.searched,
            kind=self._config.objective,
            domain_weights=self._config.domain_weights,
            tolerance=self._config.tolerance,
        )

    def choose(
        self,
        measure: Measure,
        window: Matrix,
        live: Evaluation,
        state: SearchState,
        step: int,
        evaluations: int,
    ) -> Pieces[tuple[Selection, dict[str, Any]]]:
        """Search for the best weights, in pieces.

        Args:
            measure: evaluates merges of the window; see :func:`select`.
            window: at least two rows.
            live: live on the search split.
            state: what the last merge remembers; what this one learns is written to it.
            step: optimizer step of the merge.
            evaluations: what may be spent, live included.

        Returns:
            The selection, and what the record and merge.json say of it: weights by name, losses on the search split.
        """
        if state.restored and not self._may_remember:
            state.forget()
        self._remembers = state.restored and self._may_remember
        with_gradients, with_groups = self._is_possible("gradients", step), self._is_possible("groups", step)
        problem = yield from self._problem(window, live, state, step, evaluations)
        start = Selection(None, problem.live_loss, live)
        build: Callable[..., Search] = self._search
        make: Callable[[], Search] = lambda: build(problem, **self._config.search_options)  # noqa: E731
        self._trying = "gradients" if self._config.search == "auto" and with_gradients else None
        if not with_gradients:
            reach: Callable[..., Search] = resolve_search("reach")
            make = lambda: reach(problem)  # noqa: E731
        chosen = yield from select(make, problem, measure, start, state.row_losses, self._processes)
        self._succeeded()
        shared = chosen.weights
        # Rank 0 searched; all ranks take rows, and must agree on which of them leave.
        state.memory = self._processes.from_rank0(lambda: problem.memory)
        if window.groups is not None and shared is not None and with_gradients and with_groups:
            self._trying = "groups"
            gram = yield from window.gram_pieces(grouped=True)
            left = evaluations - int(np.ceil(chosen.forward_equivalents))
            grouped, best = replace(problem, evaluations=left, gram=gram), shared
            rows = _comparable(grouped, state.spoiled)
            if len(rows) > 1:
                make = lambda: GroupedSearch(grouped, best, rows)  # noqa: E731
                chosen = yield from select(make, grouped, measure, chosen, {}, self._processes)
            self._succeeded()
        state.restored = self._remembers = False
        state.live_losses = [*state.live_losses, problem.live_loss][-_REMEMBERED:]
        state.previous, state.spans = (None if shared is None else shared.tolist()), list(window.spans)
        state.row_losses = {row: losses for row, losses in state.row_losses.items() if row in problem.names}
        shared = problem.live if shared is None else shared
        if chosen.weights is None and self._processes.is_rank_zero:
            logger.info("step %d: no merge was better than live on the search split: live itself is published", step)
        by_group = {}
        if window.groups is not None and chosen.weights is not None and chosen.weights.ndim == 2:
            by_group = dict(zip(window.groups.names, chosen.weights.tolist(), strict=True))
        return chosen, {
            "row_spans": state.spans,
            "weights": shared[problem.leading_rows :].tolist(),
            "running_sum_weights": shared[: problem.leading_rows].tolist(),
            "group_weights": by_group,
            "source": "live" if chosen.weights is None else "merge",
            "spike": problem.astray,
            "search_losses": {"live": problem.live_loss, "merged": chosen.loss},
        }

    def _is_possible(self, what: str, step: int) -> bool:
        """Whether a merge takes gradients, or groups: not if they failed in this very merge, or for good."""
        return self._failures.get(what, 0) < _TRIES and self._failed_at.get(what) != step

    def _succeeded(self) -> None:
        if self._trying is not None:
            self._failures[self._trying] = 0
        self._trying = None

    def fall_back(self, error: BaseException, step: int) -> bool:
        """After a failed merge: whether it can be made without what failed; a collective.

        The next merge tries it again, as memory may have been short at this one only. What fails at ``_TRIES`` merges
        in a row fails by its nature, and is not tried any more.
        """
        # Ranks that did not fail may be a piece ahead: what rank 0 was trying holds for all.
        trying, failures = self._processes.from_rank0(
            lambda: ("memory" if self._remembers else self._trying, self._failures.get(self._trying or "", 0) + 1)
        )
        self._trying, self._remembers = None, False
        if trying is None:
            return False
        if trying == "memory":
            self._may_remember = False
            logger.warning(
                "the first merge after resuming failed (%s: %s); it is made again without what the saved state "
                "remembers of earlier merges",
                type(error).__name__,
                error,
            )
            return True
        self._failed_at[trying], self._failures[trying] = step, failures
        if failures in (1, _TRIES):
            logger.warning(
                "step %d: %s (%s: %s); %s",
                step,
                _WITHOUT[trying],
                type(error).__name__,
                error,
                f"that was at {_TRIES} merges in a row, and is not tried again"
                if failures == _TRIES
                else "the next merge tries it again",
            )
        return True

    def _problem(
        self, window: Matrix, live: Evaluation, state: SearchState, step: int, evaluations: int
    ) -> Pieces[Problem]:
        config, size = self._config, window.num_weights
        previous = again = None
        spans = window.spans if any(span.samples > 1 for span in window.spans) else ()
        if state.previous is not None and spans and len(state.previous) == len(state.spans):
            previous = carried_over(state.previous, state.spans, spans)
        elif state.previous is not None and not spans and len(state.previous) <= size:
            # Ages match from the newest row on; a window that has grown since then has older rows of weight 0.
            previous = np.concatenate([np.zeros(size - len(state.previous)), state.previous])
        if state.previous is not None and len(state.previous) == len(state.spans):
            again = carried_over(state.previous, state.spans, window.spans, by_age=False)
        objective, gram = self.objective(live), None
        rose = state.is_astray(objective.live_loss)
        state.in_a_spike |= rose
        if self._search.needs_gradients and self._is_possible("gradients", step):
            gram = yield from window.gram_pieces()
        return Problem(
            steps=window.steps,
            evaluations=evaluations - 1 - (0 if config.groups is None else GroupedSearch.cost),
            previous=previous,
            again=again,
            seed=config.seed + step,
            leading_rows=size - len(window),
            gram=gram,
            objective=objective,
            batches=self._heldout.num_batches("search"),
            parts=self._heldout.parts,
            memory=state.memory,
            spans=spans,
            astray=state.spiked or rose,
        )
