"""Spans that grow with age, at any length of a run, and weights carried over from one set of spans to the next."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traj_merge_callback.search.spans import Span, average, carried_over, to_join


def pushed(rows, every, pushes):
    """The spans of a window after so many pushes."""
    spans = []
    for last in range(every, every * pushes + 1, every):
        if len(spans) == rows:
            index = to_join(spans, last)
            if index is None:
                del spans[0]
            else:
                spans[index : index + 2] = [spans[index].joined(spans[index + 1])]
        spans.append(Span(last - every + 1, last, every))
    return spans


@settings(deadline=None)
@given(rows=st.integers(2, 12), every=st.integers(1, 100), pushes=st.integers(1, 2000))
def test_spans_follow_each_other_and_reach_back_over_most_of_the_run(rows, every, pushes):
    spans = pushed(rows, every, pushes)
    assert len(spans) == min(rows, pushes)
    assert spans[-1].last == every * pushes
    for older, newer in itertools.pairwise(spans):
        assert newer.first == older.last + 1
    assert all(span.samples == span.last - span.first + 1 for span in spans)
    if rows >= 5:
        assert spans[0].first <= 0.5 * spans[-1].last + every


@pytest.mark.parametrize("pushes", [100, 1000, 20_000])
def test_spans_are_short_near_live_and_long_far_back_however_long_the_run(pushes):
    spans = pushed(6, 50, pushes)
    length = spans[-1].last
    shares = [(span.last - span.first + 1) / length for span in spans]
    assert shares[0] > 0.15
    assert shares[-1] <= 0.01
    assert sum(share < 0.15 for share in shares) >= 3


def spans_of(lengths, first=1):
    ends = np.cumsum([first - 1, *lengths])
    return [Span(int(a) + 1, int(b), int(b - a)) for a, b in itertools.pairwise(ends)]


lengths = st.lists(st.integers(1, 500), min_size=2, max_size=8)


@given(lengths, lengths, st.integers(0, 300), st.randoms())
def test_weights_that_are_carried_over_keep_their_sum(old, new, later, random):
    old, new = spans_of(old), spans_of(new, first=1 + later)
    weights = [random.uniform(-1, 2) for _ in old]
    found = carried_over(weights, old, new)
    assert found.shape == (len(new),)
    assert found.sum() == pytest.approx(sum(weights))


@given(lengths, st.integers(0, 300), st.randoms())
def test_weights_are_carried_over_by_age(old, later, random):
    old = spans_of(old)
    weights = [random.uniform(-1, 2) for _ in old]
    moved = [Span(first + later, last + later, samples) for first, last, samples in old]
    np.testing.assert_allclose(carried_over(weights, old, moved), weights, atol=1e-9)
    # A weight counts as spread evenly over its span.
    np.testing.assert_allclose(carried_over([3.0, -2.0], spans_of([10, 10]), spans_of([2, 8, 10])), [0.6, 2.4, -2.0])
    np.testing.assert_allclose(carried_over([3.0, -2.0], spans_of([10, 10]), spans_of([5, 5], 11)), [2.0, -1.0])


def test_lives_weight_stays_lives_and_goes_to_the_newest_mean_where_live_is_no_row():
    old, new = [*spans_of([10, 10]), Span(20, 20, 1)], [*spans_of([2, 8, 10]), Span(20, 20, 1)]
    np.testing.assert_allclose(carried_over([3.0, -2.5, 0.5], old, new), [0.6, 2.4, -2.5, 0.5])
    np.testing.assert_allclose(carried_over([3.0, -2.5, 0.5], old, new[:-1]), [0.6, 2.4, -2.0])
    np.testing.assert_allclose(carried_over([3.0, -2.0], old[:-1], new), [0.6, 2.4, -2.0, 0.0])
    assert average(new)[-1] == 0.0


@given(lengths)
def test_the_average_that_the_first_merge_begins_with(found):
    weights = average(spans_of(found))
    assert weights.sum() == pytest.approx(1)
    assert weights.min() >= 0
