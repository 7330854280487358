"""Spikes: what is far above what is usual, of the training loss and of live's held-out loss."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from traj_merge_callback.engine.training_loss import LossWatch
from traj_merge_callback.search.problem import SearchState


def has_risen(loss, before):
    return SearchState(live_losses=before).is_astray(loss)


def test_what_a_rise_is():
    plateau = [1.30, 1.31, 1.29, 1.32, 1.30, 1.31]
    assert not has_risen(1.5, [])
    assert not has_risen(1.33, plateau)
    assert has_risen(1.6, plateau)
    assert has_risen(3.2, [4.0, 3.4, 2.9, 2.6])  # a loss that falls fast makes no rise usual
    assert not has_risen(-1.30, [-1.25, -1.31])  # the loss of a density
    assert has_risen(-1.1, [-1.25, -1.31])
    assert has_risen(2.9, [4.0, 3.4, 2.6, 3.2])  # it still is far above what it was before the spike
    assert not has_risen(2.5, [4.0, 3.4, 2.6, 3.2])
    assert has_risen(3.0, [2.6, 3.2])  # also where there was one merge before it


def test_a_live_loss_that_is_no_number_has_risen():
    assert has_risen(math.nan, [1.3, 1.2])
    assert has_risen(math.inf, [1.3, 1.2])


def noisy(seed, steps, noise):
    """A training loss that falls as they do, with the noise of batches, now and then an odd one."""
    rng = np.random.default_rng(seed)
    losses = 2.0 + 3.0 / np.sqrt(1 + np.arange(steps) / 20) + noise * rng.standard_normal(steps)
    losses[50::97] += 1.0
    losses[51::388] += 1.0
    return losses


@pytest.mark.parametrize("noise", [0.001, 0.02, 0.2])
@pytest.mark.parametrize("seed", range(5))
def test_no_spike_in_a_run_that_has_none_but_odd_batches(seed, noise):
    watch = LossWatch()
    for step, loss in enumerate(noisy(seed, 2000, noise), start=1):
        watch.see(step, loss)
        assert watch.since is None, step


@pytest.mark.parametrize("seed", range(5))
def test_no_spike_in_a_loss_that_wanders(seed):
    rng, watch, wander = np.random.default_rng(seed), LossWatch(), 0.0
    for step in range(1, 2001):
        wander = 0.95 * wander + 0.02 * rng.standard_normal()
        watch.see(step, 2.5 + wander + 0.03 * rng.standard_normal())
        assert watch.since is None, step


def test_a_spike_is_seen_while_the_loss_still_falls_fast():
    watch = LossWatch()
    for step, loss in enumerate([*noisy(0, 40, 0.02)[:30], 5.2, 5.1, 5.0], start=1):
        watch.see(step, loss)
    assert watch.since == 30


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("seed", range(5))
def test_a_spike_is_seen_at_its_third_loss_and_is_over_when_the_loss_is_back(seed, every):
    watch, losses = LossWatch(), noisy(seed, 1500, 0.02)
    losses[1000:1060] = 3.5
    seen = {}
    for step in range(every, len(losses) + 1, every):
        watch.see(step, losses[step - 1])
        seen[step] = watch.since
    assert seen[1000 + 2 * every] is None
    assert {seen[step] for step in range(1000 + 3 * every, 1061, every)} == {1000}
    assert seen[1060 + every] is None


@given(st.lists(st.floats(0.5, 5.0), min_size=10, max_size=100), st.sampled_from([math.nan, math.inf]))
def test_what_is_not_finite_is_a_spike_and_does_not_spoil_what_is_usual(losses, bad):
    watch = LossWatch()
    for step, loss in enumerate(losses, start=1):
        watch.see(step, loss)
    usual, first = watch.usual, len(losses) + 1
    for step in range(first, first + 200):
        watch.see(step, bad)
    assert watch.since is not None
    assert watch.since <= first
    assert watch.usual == usual
    watch.see(first + 200, usual)
    assert watch.since is None


def test_other_data_with_a_higher_loss_are_usual_after_a_while():
    watch = LossWatch()
    for step in range(1, 101):
        watch.see(step, 1.2 + 0.01 * (step % 3))
    for step in range(101, 251):
        watch.see(step, 2.5 + 0.01 * (step % 3))
    assert watch.since is None
    assert watch.usual == pytest.approx(2.51, abs=0.02)
    for step, loss in enumerate([1.2, 3.4, 3.5, 3.4], start=251):
        watch.see(step, loss)
    assert watch.since == 251


def test_a_loss_that_is_no_number_does_not_make_a_spike_last():
    watch = LossWatch()
    for step in range(1, 301):
        watch.see(step, math.nan if step == 110 else 2.0 + 1.0 * (step > 100) + 0.01 * (step % 3))
    assert watch.since is None
    assert watch.usual == pytest.approx(3.01, abs=0.02)
