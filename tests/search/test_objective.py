"""One number from several domains, early giving up, and the small programs that minimise models of them."""

import math

import numpy as np
import pytest
from conftest import evaluation, select
from hypothesis import given, settings
from hypothesis import strategies as st

from traj_merge_callback import Evaluation, Problem, Search
from traj_merge_callback.engine.choose import Selection
from traj_merge_callback.search.objective import Objective
from traj_merge_callback.search.quadratic import Quadratic
from traj_merge_callback.search.space import PrincipalAxes, best_point
from traj_merge_callback.search.surrogate import SurrogateSearch


def two_domains(code, prose, code_tokens=3.0, prose_tokens=1.0):
    nll = np.array([code * code_tokens, prose * prose_tokens])
    return Evaluation(nll, np.array([code_tokens, prose_tokens]), ("code", "prose"), (0, 1))


def test_the_mean_is_over_tokens_or_weighted_as_asked():
    live, merged = two_domains(1.0, 2.0), two_domains(0.8, 2.1)
    plain = Objective.of(live, ["code", "prose"])
    assert plain.value(plain.losses(merged)) == pytest.approx(merged.loss)
    assert plain.value(plain.live) == pytest.approx(live.loss)
    weighted = Objective.of(live, ["code", "prose"], domain_weights={"code": 1.0, "prose": 3.0})
    assert weighted.value(weighted.losses(merged)) == pytest.approx(0.25 * 0.8 + 0.75 * 2.1)


def test_a_loss_on_the_whole_split_is_estimated_from_that_of_a_reference_unless_that_is_far_off():
    objective = Objective.of(evaluation(3.0, 3.4, 3.6, 3.2), [""])
    part = evaluation(2.5)
    assert objective.on_whole(part, evaluation(3.0, 3.4, 3.6, 3.2)) == pytest.approx(2.5 + 0.3)
    # A model that blew up varies more between batches than the loss of another one is high.
    assert objective.on_whole(part, evaluation(500.0, 480.0, 490.0, 450.0)) == pytest.approx(2.5 - 0.2)
    assert objective.on_whole(evaluation(-1.0), evaluation(-0.8, -0.6, -0.4, -0.6)) == pytest.approx(-0.8)


def test_the_worst_domain_counts_by_its_rise_over_live():
    live = two_domains(1.0, 2.0)
    worst = Objective.of(live, ["code", "prose"], kind="worst")
    assert worst.value(worst.live) == pytest.approx(live.loss)
    # Prose has the higher loss in any case; what counts is that code gains less.
    gains = worst.value(worst.live) - worst.value(worst.losses(two_domains(0.95, 1.5)))
    assert gains == pytest.approx(0.05)


def test_a_tolerance_rules_out_what_harms_one_domain():
    live = two_domains(1.0, 2.0)
    careful = Objective.of(live, ["code", "prose"], tolerance=0.01)
    assert careful.value(careful.losses(two_domains(0.5, 2.02))) == math.inf
    assert careful.value(careful.losses(two_domains(0.5, 2.009))) < live.loss
    assert careful.value(np.array([0.5, np.nan])) == math.inf


def test_a_candidate_is_clearly_worse_only_if_it_is_so_in_every_domain_beyond_doubt():
    rng = np.random.default_rng(0)
    losses = 1.0 + 0.1 * rng.normal(size=8)
    best = Evaluation(losses, np.ones(8), ("a",) * 4 + ("b",) * 4, tuple(range(8)))
    objective = Objective.of(best, ["a", "b"], kind="worst")

    def shifted(a, b, noise=0.001):
        nll = losses + np.repeat([a, b], 4) + noise * rng.normal(size=8)
        return Evaluation(nll, np.ones(8), best.domains, best.indices)

    assert objective.clearly_worse(shifted(0.5, 0.5), best)
    assert not objective.clearly_worse(shifted(0.5, -0.1), best)
    assert not objective.clearly_worse(shifted(0.5, 0.5, noise=1.0), best)
    part = shifted(0.5, 0.5).on((4, 5, 0, 1))
    assert objective.clearly_worse(part, best)


def test_a_hopeless_candidate_costs_only_the_part_it_was_evaluated_on():
    batches, parts = 8, 4
    rng = np.random.default_rng(0)
    base = 1.0 + 0.1 * rng.normal(size=batches)
    costs = []

    def measure(weights, with_gradient, wanted, abandon):
        nll = base + (weights[0] - 0.2) + 1e-4 * rng.normal(size=batches)
        done = Evaluation(np.zeros(0), np.zeros(0), ())
        for part in wanted:
            places = range(2 * part, 2 * part + 2)
            done = done.joined(Evaluation(nll[places], np.ones(2), ("",) * 2, tuple(places)))
            if abandon(done):
                break
        costs.append(len(done.nll) / batches)
        return done, None

    class Two(Search):
        def __init__(self):
            self.candidates, self.told = [np.array([0.1, 0.9]), np.array([0.9, 0.1]), np.array([-0.1, 1.1])], []

        def ask(self):
            return self.candidates.pop(0) if self.candidates else None

        def tell(self, weights, loss, observed):
            self.told.append(loss)

    live = Evaluation(base, np.ones(batches), ("",) * batches, tuple(range(batches)))
    problem = Problem((1, 2), 9, Objective.of(live, [""]), batches=batches, parts=parts)
    search = Two()
    chosen = select(search, problem, measure, Selection(None, live.loss, live), {})
    assert costs == [1.0, 0.25, 1.0]
    assert chosen.forward_equivalents == 3.25
    assert search.told[1] == pytest.approx(live.loss + 0.7, abs=0.01)  # told what its loss would have been
    np.testing.assert_array_equal(chosen.weights, [-0.1, 1.1])


def test_a_candidate_evaluated_in_part_cannot_win():
    live = evaluation(2.0, 2.0, 2.0, 2.0)

    class Aim(Search):
        wants_parts = 1
        asked = 0

        def ask(self):
            self.asked += 1
            return np.array([0.5, 0.5]) if self.asked < 4 else None

        def tell(self, weights, loss, observed):
            assert loss == pytest.approx(1.0)

    seen = []

    def measure(weights, with_gradient, parts, abandon):
        seen.append(tuple(parts))
        return evaluation(1.0, 1.0, 1.0, 1.0).on(tuple(parts)), None

    problem = Problem((1, 2), 9, Objective.of(live, [""]), batches=4, parts=4)
    chosen = select(Aim(problem), problem, measure, Selection(None, 2.0, live), {})
    assert chosen.weights is None
    assert chosen.forward_equivalents == 1.75
    assert seen == [(0,), (1,), (2,)]  # another part each time


def models(rng, count, size):
    """Quadratics with different minima."""
    found = []
    for _ in range(count):
        root = rng.normal(size=(size, size))
        hessian = root @ root.T / size + 0.2 * np.eye(size)
        center = 0.5 * rng.normal(size=size)
        found.append(Quadratic(0.5 * float(center @ hessian @ center), -hessian @ center, hessian))
    return found


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 3), worst=st.booleans(), careful=st.booleans())
def test_the_best_point_is_best_among_all_that_are_allowed(seed, count, worst, careful):
    rng = np.random.default_rng(seed)
    rows = np.cumsum(rng.normal(size=(5, 12)), axis=0)
    axes = PrincipalAxes((rows - rows[-1]) @ (rows - rows[-1]).T)
    quadratics = models(rng, count, 4)
    start = axes.to_point(np.array([0.0, 0.0, 0.0, 0.0, 1.0]))
    live = np.array([model.value(start) for model in quadratics])
    names = tuple(frozenset([str(i)]) for i in range(count))
    objective = Objective(names, np.full(count, 1 / count), live, np.ones(count), worst, 0.0 if careful else None)
    point = best_point(quadratics, objective, axes, (-0.2, 1.0), start)

    def score(at):
        return objective.score(np.array([model.value(at) for model in quadratics]))

    weights = axes.to_weights(point)
    assert -0.2 - 1e-6 <= weights.min() <= weights.max() <= 1.0 + 1e-6
    if careful:
        assert max(model.value(point) - low for model, low in zip(quadratics, live, strict=True)) <= 1e-6
    for _ in range(300):
        other = rng.dirichlet(np.ones(5)) * 2.0 - 0.2
        other = other + (1.0 - other.sum()) / 5
        if other.min() < -0.2 or other.max() > 1.0:
            continue
        other = axes.to_point(weights + rng.uniform(0, 1) ** 3 * (other - weights))
        losses = np.array([model.value(other) for model in quadratics])
        if careful and (losses - live).max() > 0:
            continue
        assert score(point) <= score(other) + 1e-6


def test_the_surrogate_search_serves_the_worst_domain():
    # Two domains that pull the merge in different directions: their mean would sacrifice the small one.
    rng = np.random.default_rng(0)
    rows = np.cumsum(rng.normal(size=(6, 40)), axis=0)
    gram = (rows - rows[-1]) @ (rows - rows[-1]).T
    axes = PrincipalAxes(gram)
    shape = axes.curvatures(0.6)
    live = axes.to_point(np.eye(6)[-1])
    shape *= 0.2 / float(shape @ np.square(live))
    bests = [
        axes.to_point(np.array([0.1, 0.1, 0.1, 0.2, 0.2, 0.3])),
        axes.to_point(np.array([-0.1, -0.1, 0.0, 0.0, 0.2, 1.0])),
    ]
    tokens = np.array([980.0, 20.0])

    def losses(weights):
        z = axes.to_point(weights)
        return np.array([1.0 + 0.5 * float(shape @ np.square(z - best)) for best in bests])

    def found(**options):
        seen = []

        def measure(weights, with_gradient, parts, abandon):
            from traj_merge_callback.search.evaluation import Gradient

            seen.append(weights)
            values = Evaluation(losses(weights) * tokens, tokens, ("a", "b"), (0, 1))
            slopes = [(axes.axes * axes.extents) @ (shape * (axes.to_point(weights) - best)) for best in bests]
            gradient = Gradient(np.array(slopes) * tokens[:, None], tokens, ("a", "b"))
            return values, gradient if with_gradient else None

        live = Evaluation(losses(np.eye(6)[-1]) * tokens, tokens, ("a", "b"), (0, 1))
        objective = Objective.of(live, ["a", "b"], **options)
        problem = Problem(tuple(range(6)), 20, objective, gram=gram, batches=2)
        start = Selection(None, objective.value(objective.live), live)
        return losses(select(SurrogateSearch(problem), problem, measure, start, {}).weights) - objective.live

    mean, worst, careful = found(), found(kind="worst"), found(tolerance=0.0)
    assert mean[1] > 0  # the mean harms the small domain
    assert worst.max() < -0.003  # minimax gains in both
    assert worst.max() < mean.max()
    assert careful.max() <= 0
    assert careful @ tokens < worst @ tokens + 1e-6  # and within the tolerance the mean is the better
