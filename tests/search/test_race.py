"""Where training went astray: which merges are raced, which rows are left out, and what an ordinary merge costs."""

import numpy as np
import pytest
import torch
from conftest import select
from test_surrogate import landscape

from traj_merge_callback import Problem
from traj_merge_callback.engine.choose import Selection
from traj_merge_callback.search.evaluation import Evaluation, Gradient
from traj_merge_callback.search.objective import Objective
from traj_merge_callback.search.problem import SearchState
from traj_merge_callback.search.race import RacedSearch, is_uneven, unspoiled
from traj_merge_callback.search.surrogate import SurrogateSearch

# Parts of one batch each, of so many tokens that what one part says of the others is worth something.
PARTS, TOKENS = 4, 1000.0


def merge(loss, gradient, gram, search=RacedSearch, evaluations=9, live=None, memory=None, before=(), **options):
    """One merge, on a split of four parts of one batch each; ``before``: live's losses at the merges before."""
    seen, size = [], len(gram)

    def on_parts(value, parts):
        tokens = np.full(len(parts), TOKENS)
        return Evaluation(value * tokens, tokens, ("",) * len(parts), tuple(parts))

    def measure(weights, with_gradient, parts, abandon):
        seen.append((weights, with_gradient, tuple(parts)))
        found = on_parts(loss(weights), parts)
        if not with_gradient:
            return found, None
        return found, Gradient(np.outer(found.tokens, gradient(weights)), found.tokens, found.domains)

    live = loss(np.eye(size)[-1]) if live is None else live
    objective = Objective((frozenset([""]),), np.ones(1), np.array([live]), np.array([PARTS * TOKENS]))
    problem = Problem(
        tuple(range(1, size + 1)),
        evaluations - 1,
        objective,
        gram=gram,
        batches=PARTS,
        parts=PARTS,
        memory={} if memory is None else memory,
        **{"astray": SearchState(live_losses=list(before)).is_astray(live), **options},
    )
    chosen = select(search(problem), problem, measure, Selection(None, live, on_parts(live, range(PARTS))), {})
    return chosen, seen, problem


def spiked(seed=0, size=8, rise=2.0, row=-1):
    """A landscape with a row far up a wall that no quadratic of the others knows."""
    loss, gradient, gram, best = landscape(seed, size)
    wall = np.eye(size)[row]

    def with_wall(weights):
        return loss(weights) + rise * abs(float(weights @ wall))

    return with_wall, lambda weights: gradient(weights) + rise * np.sign(weights @ wall) * wall, gram, best


@pytest.mark.parametrize("seed", range(6))
def test_an_ordinary_merge_is_the_surrogates_and_costs_what_it_costs(seed):
    loss, gradient, gram, _ = landscape(seed)
    live = loss(np.eye(8)[-1])
    before = (live + 0.3, live + 0.1, live + 0.05)
    chosen, seen, _ = merge(loss, gradient, gram, memory={"merged": live}, before=before)
    alone, expected, _ = merge(loss, gradient, gram, search=SurrogateSearch)
    assert len(seen) == len(expected)
    for one, other in zip(seen, expected, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        assert one[1:] == other[1:]
    assert chosen.loss == alone.loss


@pytest.mark.parametrize("evaluations", [5, 9, 12])
@pytest.mark.parametrize("seed", range(6))
def test_after_a_spike_nothing_worse_than_a_row_or_a_recipe_is_published(seed, evaluations):
    loss, gradient, gram, _ = spiked(seed)
    memory, before = {}, (1.7, 1.65, 1.62)
    chosen, seen, _ = merge(loss, gradient, gram, evaluations=evaluations, memory=memory, before=before)
    assert chosen.forward_equivalents <= evaluations
    assert memory["spoiled"] == ["8"]
    for weights in [*np.eye(8), np.full(8, 1 / 8)]:
        assert chosen.loss <= loss(weights) + 1e-12
    # The race is on one part, the same for all rows; live's loss is known.
    assert [parts for _, _, parts in seen[:7]] == [(0,)] * 7
    assert chosen.weights[-1] == 0


@pytest.mark.parametrize("seed", range(3))
def test_after_a_spike_of_the_training_loss_rows_are_raced_and_good_ones_all_stay(seed):
    loss, gradient, gram, _ = landscape(seed)
    live = loss(np.eye(8)[-1])
    known = {"memory": {"merged": live}, "before": (live + 0.1, live + 0.05)}
    _, seen, problem = merge(loss, gradient, gram, evaluations=12, astray=True, **known)
    assert [parts for _, _, parts in seen[:7]] == [(0,)] * 7
    alone = [loss(row) for row in np.eye(8)]
    good = all(one <= min(alone[: at + 1]) * 1.02 for at, one in enumerate(alone))
    assert bool(problem.memory["spoiled"]) != good


@pytest.mark.parametrize("evaluations", [2, 3, 4])
def test_with_too_few_evaluations_for_a_race_the_last_merge_is_made_again(evaluations):
    loss, gradient, gram, best = spiked(rise=200.0)
    again = np.append(best[:-1] / best[:-1].sum(), 0.0)
    known = {"memory": {"merged": loss(again)}, "before": (loss(again) + 0.1,) * 3}
    chosen, seen, _ = merge(loss, gradient, gram, evaluations=evaluations, again=again, previous=best, **known)
    assert loss(seen[0][0]) == pytest.approx(loss(again))
    assert chosen.loss <= loss(again) + 1e-9
    assert chosen.forward_equivalents <= evaluations


def test_what_is_spoiled_has_no_part_in_the_next_merge_and_begins_no_race():
    loss, gradient, gram, _ = spiked(row=3)
    known = {"memory": {"spoiled": ["4"]}, "before": (loss(np.eye(8)[-1]),)}
    again = np.array([0.1, 0.2, 0.1, 0.0, 0.1, 0.2, 0.2, 0.1])
    chosen, seen, _ = merge(loss, gradient, gram, again=again, **known)
    np.testing.assert_allclose(seen[0][0], again, atol=1e-12)
    assert all(weights[3] == 0 for weights, _, _ in seen)
    assert all(with_gradient or len(parts) == PARTS for _, with_gradient, parts in seen)
    assert chosen.loss < loss(np.eye(8)[-1])


def test_a_first_candidate_that_is_clearly_worse_than_the_last_merge_begins_a_race():
    loss, gradient, gram, _ = spiked()
    memory, before = {"merged": 1.6}, (loss(np.eye(8)[-1]),)  # live has been as bad for long
    chosen, seen, _ = merge(loss, gradient, gram, memory=memory, before=before)
    assert seen[0][1]  # with its gradient, as the surrogate begins
    assert not any(with_gradient for _, with_gradient, _ in seen[1:8])
    assert memory["spoiled"] == ["8"]
    assert chosen.loss <= min(map(loss, np.eye(8)))


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e30])
def test_a_row_beyond_all_measure_costs_neither_the_merge_nor_an_exception(value):
    loss, gradient, gram, _ = landscape(2)
    gram = gram.copy()
    gram[3, 3] = value

    def broken(weights):
        return np.nan if weights[3] else loss(weights)

    chosen, _, problem = merge(broken, gradient, gram)
    assert "4" in problem.memory["spoiled"]
    assert chosen.weights[3] == 0
    assert chosen.loss < min(loss(row) for at, row in enumerate(np.eye(8)) if at != 3)


def test_without_a_finite_row_there_is_nothing_to_publish_but_live():
    chosen, _, _ = merge(lambda weights: np.nan, lambda weights: np.zeros(4), np.full((4, 4), np.nan), live=2.0)
    assert chosen.weights is None


def test_rows_are_compared_on_one_part_where_one_of_them_is_known():
    """The first part of the split is easier; the loss of the oldest row, the best, is known on the whole split."""
    losses, ease = np.array([1.50, 1.52, 1.51, 2.0]), np.array([-0.6, 0.2, 0.2, 0.2])

    def on_parts(value, parts):
        tokens = np.full(len(parts), TOKENS)
        return Evaluation((value + ease[list(parts)]) * tokens, tokens, ("",) * len(parts), tuple(parts))

    def measure(weights, with_gradient, parts, abandon):
        found = on_parts(weights @ losses, parts)
        gradient = Gradient(np.outer(found.tokens, losses), found.tokens, found.domains)
        return found, gradient if with_gradient else None

    objective = Objective((frozenset([""]),), np.ones(1), losses[-1:], np.array([PARTS * TOKENS]))
    gram = landscape(0, 4)[2]
    options = {"gram": gram, "batches": PARTS, "parts": PARTS, "astray": True}
    problem = Problem((1, 2, 3, 4), 8, objective, **options)
    start = Selection(None, losses[-1], on_parts(losses[-1], range(PARTS)))
    search = RacedSearch(problem)
    scores = []
    tell = search.tell
    search.tell = lambda weights, loss, observed: (scores.append(loss), tell(weights, loss, observed))
    chosen = select(search, problem, measure, start, {"1": [losses[0]]})
    np.testing.assert_allclose(scores[:4], losses)
    assert problem.memory["spoiled"] == ["4"]
    assert chosen.loss <= losses[0]


def test_what_is_uneven():
    assert not is_uneven(landscape(0)[2])
    assert not is_uneven(np.zeros((4, 4)))
    far = np.array([0.0, 1.0, 2.0, 1e4, 3.0, 4.0, 5.0, 6.0])[:, None] - 6.0
    assert is_uneven(far @ far.T)
    for seed in range(20):  # the newest row is far away: what the Gram matrix says of the others is rounded
        rng = np.random.default_rng(seed)
        rows = np.cumsum(rng.normal(size=(6, 1000)), axis=0)
        rows[-1] += 1e5 * rng.normal(size=1000)
        deltas = torch.tensor(rows - rows[-1], dtype=torch.float32)
        assert is_uneven((deltas @ deltas.T).double().numpy())


def test_a_spoiled_row_is_worse_than_an_older_one():
    assert unspoiled(np.array([2.0, 1.7, 1.5, 1.4])) == [0, 1, 2, 3]
    assert unspoiled(np.array([2.0, 1.7, 3.0, 1.6, 1.61])) == [0, 1, 3, 4]
    assert unspoiled(np.array([np.inf, 1.7, 2.5])) == [1]
    assert unspoiled(np.array([-1.0, -1.3, -1.29, -0.9, -1.31])) == [0, 1, 2, 4]  # the losses of densities
    assert unspoiled(np.array([np.inf, np.inf])) == []
