"""Sparse Bayesian optimisation: of many rows it finds the few that matter, and refines their weights."""

import numpy as np
import pytest

from traj_merge_callback import Problem
from traj_merge_callback.search import resolve_search
from traj_merge_callback.search.objective import Objective

ROWS = 20
MATTER = [3, 10, 18]


def loss(weights):
    """A loss that three rows matter for: it falls as they approach their best weights, 0.5, 0.2 and 0.3."""
    return 1.0 + float(np.square(weights[MATTER] - [0.5, 0.2, 0.3]).sum())


def run(evaluations, seed=1, rows=ROWS, loss=loss, name="sparse", **options):
    """All candidates, and their losses."""
    steps = tuple(range(50, 50 * rows + 1, 50))
    problem = Problem(steps, evaluations, Objective.single(loss(np.eye(rows)[-1])), seed=seed)
    search = resolve_search(name, options)(problem, **options)
    candidates = []
    for _ in range(evaluations):
        candidates.append(search.ask())
        search.tell(candidates[-1], loss(candidates[-1]), None)
    return np.array(candidates), np.array([loss(one) for one in candidates])


def test_the_rows_that_matter_are_found_and_their_weights_refined():
    candidates, losses = run(30)
    best = candidates[losses.argmin()]
    assert best[MATTER].sum() > 0.8
    assert losses.min() - 1.0 < 0.03
    assert losses.min() < losses[:15].min()  # the second stage went on from the first


def test_after_half_of_the_budget_a_candidate_differs_from_the_best_in_few_rows():
    candidates, losses = run(16, active=4)
    for index in range(8, 16):
        best = candidates[losses[:index].argmin()]
        # The other rows keep their proportions to each other.
        factors = np.divide(candidates[index], best, out=np.zeros(ROWS), where=best > 0)
        same = max(int(np.isclose(factors[best > 0], factor).sum()) for factor in factors[best > 0])
        assert same + int(((best == 0) & (candidates[index] == 0)).sum()) >= ROWS - 4


def test_the_same_seed_gives_the_same_candidates_and_another_seed_others():
    one, two, other = (run(6, seed=seed, rows=6, loss=lambda w: 1.0 + w[0])[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


def test_losses_that_are_not_finite_are_survived():
    candidates, losses = run(8, rows=6, loss=lambda w: np.inf if w[0] > 0.05 else 1.0 + w[1])
    assert np.isfinite(candidates).all()
    assert np.isfinite(losses).any()


@pytest.mark.parametrize("active", [0, 2.5, "five"])
def test_bad_options_are_named(active):
    with pytest.raises((ValueError, TypeError), match="active="):
        resolve_search("sparse", {"active": active})
