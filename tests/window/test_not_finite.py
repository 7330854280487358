"""Checkpoints that are not finite never enter the window; spoiled rows leave it first."""

import numpy as np
import pytest
import torch
from torch import nn

from traj_merge_callback import CheckpointWindow


def filled(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"dtype": "int8"}, {"buffered": True}])
def test_a_row_that_is_not_finite_is_not_in_the_window(options, bad, asynchronous):
    model = nn.Linear(3, 2)
    window = CheckpointWindow(model, 3, asynchronous=asynchronous, **options)
    for step, value in enumerate((1.0, 2.0, bad, bad, 4.0, bad), start=1):
        filled(model, value)
        window.push(model, step)
        window.settle()
        assert all(step in (1, 2, 5) for step in window.steps)
    assert window.steps[-2:] == (2, 5)
    assert np.isfinite(window.gram()).all()
    torch.testing.assert_close(window.combine(np.eye(len(window))[-1]), torch.full((8,), 4.0), atol=0.02, rtol=0)
    window.close()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_sample_that_is_not_finite_is_left_out_of_its_mean(asynchronous):
    model = nn.Linear(3, 2)
    window = CheckpointWindow(model, 3, mean_rows=True, multiscale=True, asynchronous=asynchronous)
    nan = float("nan")
    for row, values in enumerate([(1.0, nan, 2.0, 3.0), (nan, nan, 5.0, 7.0), (9.0, 9.0, 9.0, nan)]):
        for place, value in enumerate(values, start=1):
            filled(model, value)
            (window.push if place == 4 else window.sample)(model, 4 * row + place)
            window.settle()
    # A row that ends with a checkpoint that is not finite does not enter, and nothing of it is in the next one.
    assert window.spans == ((1, 4, 3), (7, 8, 2), (8, 8, 1))
    torch.testing.assert_close(window.combine([0.0, 0.0, 1.0]), torch.full((8,), 7.0))
    for value in (11.0, 13.0):
        filled(model, value)
        (window.sample if value == 11.0 else window.push)(model, int(value) + 2)
        window.settle()
    for weights, mean in zip(np.eye(4), (2.0, 6.0, 12.0, 13.0), strict=True):
        torch.testing.assert_close(window.combine(weights), torch.full((8,), mean))
    window.close()


def test_a_row_is_left_out_where_another_rank_says_so():
    model = nn.Linear(3, 2)
    window = CheckpointWindow(model, 3, mean_rows=True)

    class Others:
        """Another rank, which found the last capture not finite."""

        def all_reduce_error(self, error, *values):
            return [1.0, *values[1:]]

    for step in range(1, 4):
        window.push(model, step)
    window.processes = Others()
    assert window.settle_together(0.5) == [1.0, 0.5]
    window.settle_together()  # once is enough
    assert window.steps == (1, 2)
    window.sample(model, 4)
    window.settle_together()
    window.push(model, 5)
    assert window.spans[-1] == (5, 5, 1)


@pytest.mark.parametrize("options", [{}, {"mean_rows": True, "multiscale": True}])
def test_spoiled_rows_leave_first_and_are_joined_with_none(options):
    model = nn.Linear(3, 2)
    window = CheckpointWindow(model, 3, **options)
    for step in (1, 2, 3):
        filled(model, float(step))
        window.push(model, step)
    filled(model, 4.0)
    window.push(model, 4, spoiled=["2"])
    assert window.steps == (1, 3, 4)
    for weights, value in zip(np.eye(3), (1.0, 3.0, 4.0), strict=True):
        assert torch.equal(window.combine(weights), torch.full((8,), value))
