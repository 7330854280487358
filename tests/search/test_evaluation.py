"""Statistics of an evaluation, against definitions and simulation."""

import numpy as np
import pytest

from traj_merge_callback import Evaluation


def evaluation(nll, tokens, domains=None):
    return Evaluation(np.array(nll, float), np.array(tokens, float), tuple(domains or ["heldout"] * len(nll)))


def test_loss_is_token_weighted_not_the_mean_of_batch_means():
    found = evaluation([10.0, 300.0], [10, 100])
    assert found.loss == pytest.approx(310 / 110)
    assert found.perplexity == pytest.approx(np.exp(310 / 110))


def test_standard_error_matches_repeated_sampling():
    rng = np.random.default_rng(0)
    losses, stderrs = [], []
    for _ in range(3000):
        tokens = rng.integers(20, 100, size=24)
        nll = tokens * (2 + 0.3 * rng.normal(size=24))
        found = evaluation(nll, tokens)
        losses.append(found.loss)
        stderrs.append(found.stderr)
    assert np.mean(stderrs) == pytest.approx(np.std(losses), rel=0.05)


def test_paired_difference_is_far_more_precise_than_its_parts():
    rng = np.random.default_rng(0)
    tokens = np.full(32, 100)
    hardness = rng.normal(2, 0.5, size=32) * tokens
    live, merged = evaluation(hardness, tokens), evaluation(hardness - 0.01 * tokens, tokens)
    gain, stderr = live.gain_of(merged)
    assert gain == pytest.approx(0.01)
    assert stderr < 1e-10 < live.stderr


def test_one_batch_has_no_standard_error():
    assert np.isnan(evaluation([1.0], [1]).stderr)


def test_domains_are_parts_of_the_whole():
    found = evaluation([1, 2, 30], [1, 1, 10], ["a", "b", "a"])
    assert found.only({"a"}).loss == pytest.approx(31 / 11)
    assert found.only({"b"}).loss == 2
    assert found.only({"a", "b"}).loss == found.loss
