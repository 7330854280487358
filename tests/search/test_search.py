"""Searches on landscapes whose answer is known, and the protocol around them (k-world: no torch)."""

import math
import sys

import numpy as np
import pytest
from conftest import evaluation, select

from traj_merge_callback import Problem, Search, available_searches, register_search
from traj_merge_callback.engine.choose import Selection
from traj_merge_callback.search import _registered, resolve_search
from traj_merge_callback.search.evaluation import Gradient
from traj_merge_callback.search.objective import Objective

STEPS = tuple(range(50, 450, 50))
# These extrapolate; BEMA needs running sums beside the window as well: see test_merger.
ON_THE_SIMPLEX = sorted(set(available_searches()) - {"bema", "surrogate", "trajectory", "auto"})


def quadratic(target):
    """A held-out loss with its minimum at ``target``."""
    return lambda weights: 1.0 + float(np.square(np.asarray(weights) - target).sum())


def measuring(loss, seen, gradient=None):
    """What ``select`` evaluates candidates with: one batch, one token."""

    def measure(weights, with_gradient, parts, abandon):
        seen.append(weights)
        found = evaluation(loss(weights))
        abandon(found)
        return found, Gradient(np.array([gradient(weights)]), np.ones(1), ("",)) if with_gradient else None

    return measure


def run(name, loss, evaluations=12, previous=None, row_losses=None, steps=STEPS, gram=None, gradient=None, **options):
    seen = []
    live, memory = loss(np.eye(len(steps))[-1]), options.pop("memory", {})
    problem = Problem(steps, evaluations - 1, Objective.single(live), previous, 1, gram=gram, memory=memory)
    search = resolve_search(name, options)(problem, **options)
    start = Selection(None, live, evaluation(live))
    chosen = select(search, problem, measuring(loss, seen, gradient), start, {} if row_losses is None else row_losses)
    return chosen, seen


def weights_of(chosen, size=8):
    """The chosen weights, those of live if live itself was chosen."""
    return np.eye(size)[-1] if chosen.weights is None else chosen.weights


@pytest.mark.parametrize("name", ON_THE_SIMPLEX)
@pytest.mark.parametrize("evaluations", [2, 3, 12])
def test_every_search_keeps_its_budget_proposes_merges_and_returns_the_best_it_evaluated(name, evaluations):
    loss = quadratic(np.full(8, 1 / 8))
    chosen, seen = run(name, loss, evaluations)
    assert chosen.evaluations == len(seen) + 1 <= evaluations
    candidates = [np.eye(8)[-1], *seen]
    for weights in candidates:
        assert weights.sum() == pytest.approx(1)
        assert weights.min() >= 0
    assert chosen.loss == pytest.approx(min(loss(weights) for weights in candidates))
    assert loss(weights_of(chosen)) == chosen.loss


@pytest.mark.parametrize("name", ON_THE_SIMPLEX)
def test_live_wins_where_every_merge_is_worse(name):
    chosen, _ = run(name, quadratic(np.eye(8)[-1]))
    assert chosen.weights is None


@pytest.mark.parametrize(("name", "atol"), [("gp", 0.02), ("reach", 0.02)])
def test_bayesian_search_gets_near_the_best_merge_on_the_simplex(name, atol):
    target = np.array([0, 0, 0.05, 0.1, 0.15, 0.2, 0.2, 0.3])
    chosen, _ = run(name, quadratic(target), evaluations=30)
    assert chosen.loss - 1.0 < atol
    assert chosen.loss < min(quadratic(target)(np.full(8, 1 / 8)), quadratic(target)(np.eye(8)[-1]))


@pytest.mark.parametrize(("best", "alpha", "expected"), [(0.7, 0.5, 0.7), (0.2, 0.5, 0.5), (0.2, 0.0, 0.2)])
def test_pairwise_finds_lambda_inside_its_bounds(best, alpha, expected):
    def loss(weights):
        assert np.count_nonzero(weights[:-2]) == 0
        return 1.0 + (weights[-1] - best) ** 2

    chosen, _ = run("pairwise", loss, evaluations=16, alpha=alpha)
    assert chosen.weights[-1] == pytest.approx(expected, abs=0.03)


def test_greedy_soup_is_the_one_of_the_paper():
    # The rows that are in the soup are exactly those that lower its loss when added best first.
    rng = np.random.default_rng(0)
    target = rng.dirichlet(np.ones(5))
    loss = quadratic(target)
    rows = np.eye(5)
    soup, best = [], math.inf
    for row in sorted(rows, key=loss):
        if (value := loss(np.mean([*soup, row], axis=0))) < best:
            soup, best = [*soup, row], value
    chosen, _ = run("greedy", loss, evaluations=20, steps=STEPS[:5])
    np.testing.assert_allclose(chosen.weights, np.mean(soup, axis=0))


def test_greedy_spends_a_small_budget_on_the_newest_rows():
    _, seen = run("greedy", quadratic(np.full(8, 1 / 8)), evaluations=5)
    assert all(np.count_nonzero(weights[:-3]) == 0 for weights in seen)


def test_recipes_that_need_losses_measure_rows_and_reuse_what_is_known():
    loss = quadratic(np.full(8, 1 / 8))
    known: dict[str, list[float]] = {}
    first, seen = run("perplexity", loss, row_losses=known, temperature=0.5)
    assert len(seen) == 8
    assert known.keys() == set(map(str, STEPS))
    second, seen = run("perplexity", loss, row_losses=known, temperature=0.5)
    assert len(seen) == 1
    np.testing.assert_array_equal(first.weights, second.weights)


def test_last_times_weights_are_among_the_first_candidates():
    previous = np.array([0, 0, 0, 0, 0.1, 0.2, 0.3, 0.4])
    for name in ("gp", "reach"):
        _, seen = run(name, quadratic(previous), previous=previous)
        assert any(np.array_equal(previous, weights) for weights in seen)


def test_a_candidate_whose_loss_is_not_finite_is_never_chosen():
    def loss(weights):
        return math.nan if weights[0] > 0 else 1.0 + float(weights[-1])

    for name in ("reach", "gp", "greedy", "lawa", "perplexity"):
        chosen, _ = run(name, loss)
        assert math.isfinite(chosen.loss)
        assert weights_of(chosen)[0] == 0


def test_the_same_seed_gives_the_same_search():
    loss = quadratic(np.linspace(0, 0.25, 8))
    one, two = (run("reach", loss)[1] for _ in range(2))
    np.testing.assert_array_equal(one, two)


class Ten(Search):
    """A user's own search, as in the documentation."""

    def __init__(self, problem, concentration=1.0):
        self.problem, self.concentration = problem, concentration
        self.rng = np.random.default_rng(problem.seed)

    def ask(self):
        return self.rng.dirichlet(np.full(self.problem.size, self.concentration))


def test_a_search_of_ones_own_by_name_and_by_path():
    sys.modules["my_searches"] = sys.modules[__name__]
    register_search("ten")(Ten)
    try:
        for name in ("ten", "my_searches:Ten"):
            chosen, seen = run(name, quadratic(np.full(8, 1 / 8)), concentration=50.0)
            assert len(seen) == 11
            assert chosen.weights is not None
    finally:
        del _registered["ten"]
    with pytest.raises(ValueError, match="'gp' is a built-in search"):
        register_search("gp")
    for search in (lambda problem: None, int):
        with pytest.raises(TypeError, match=r"must be a subclass of traj_merge_callback\.Search that overrides ask"):
            register_search("mine")(search)
    with pytest.raises(ValueError, match="must be a subclass"):
        resolve_search("math:sqrt")


def test_a_search_that_repeats_itself_ends():
    class Stuck(Ten):
        def ask(self):
            return np.full(8, 1 / 8)

    problem = Problem(STEPS, 5, Objective.single(2.0))
    measure = measuring(quadratic(np.full(8, 1 / 8)), [])
    chosen = select(Stuck(problem), problem, measure, Selection(None, 2.0, evaluation(2.0)), {})
    assert chosen.evaluations == 2


@pytest.mark.parametrize("weights", [np.ones(8), np.ones(3) / 3, np.full(8, np.nan)])
def test_a_candidate_that_is_no_merge_is_a_clear_error(weights):
    class Wrong(Ten):
        def ask(self):
            return weights

    problem = Problem(STEPS, 5, Objective.single(2.0))
    with pytest.raises(ValueError, match="the search proposed weights"):
        select(Wrong(problem), problem, measuring(lambda w: 1.0, []), Selection(None, 2.0, evaluation(2.0)), {})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bayes", {}, "search='bayes' is not one of"),
        ("nowhere:Search", {}, "cannot be imported"),
        ("math:Search", {}, "cannot be imported"),
        ("ema", {"beta": 1}, "search_options={'beta': 1} do not fit search='ema'"),
        ("ema", {"decay": 2.0}, "decay=2.0"),
        ("pairwise", {"alpha": 1.5}, "alpha=1.5"),
        ("lawa", {"k": 3}, "do not fit"),
    ],
)
def test_unknown_searches_and_options_fail_at_once(name, options, message):
    with pytest.raises(ValueError, match=message):
        resolve_search(name, options)
