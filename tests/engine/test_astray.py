"""Training that goes astray for a while: what is published, saved and kept in the window then, and afterwards."""

import copy
import json
import logging
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import AT_ONCE, tiny_llama, train_steps, warnings_of
from torch.utils.data import DataLoader

from traj_merge_callback import TrajectoryMerger
from traj_merge_callback.search.spans import Span

OPTIONS = {"capture_every": 5, "merge_every": 5, "window_size": 4, "progress": False, "start_step": 5}


def a_merger(heldout, tmp_path, **options):
    options = {**AT_ONCE, **OPTIONS, "output_dir": str(tmp_path / "merged"), **options}
    return TrajectoryMerger(DataLoader(heldout, batch_size=3), **options)


@contextmanager
def as_it_was(merger, model):
    """Afterwards the model goes on with the weights it had before; what is captured within is of the others."""
    good = copy.deepcopy(model.state_dict())
    yield
    merger.settle()
    model.load_state_dict(good)


def blown_up(model, size):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("row", ["last", "multiscale"])
def test_a_model_that_blew_up_spoils_neither_the_good_rows_nor_the_race(train, heldout, tmp_path, row, dtype, caplog):
    merger, model = a_merger(heldout, tmp_path, row=row, dtype=dtype), tiny_llama()

    def each(step):
        if step > 20:  # the anchor of int8 rows is due to be renewed at step 25
            blown_up(model, 10.0)
        merger.step(model, step)

    with caplog.at_level(logging.WARNING, "traj_merge_callback"):
        train_steps(model, train, 35, each)
        merger.finish(model)
    before = merger.records[2]
    assert before.step == 20
    for record in merger.records[3:]:
        assert record.live_loss > 5 * before.live_loss
        assert record.merged_loss < before.merged_loss + 0.1
    assert not warnings_of(caplog)


@pytest.mark.parametrize("size", [10.0, 1e25])
def test_groups_leave_spoiled_rows_out_and_stay_on(train, heldout, tmp_path, size, caplog):
    groups = {"blocks": ["model.layers.*"], "rest": ["*"]}
    merger, model = a_merger(heldout, tmp_path, row="last", groups=groups, evaluations=16, merge_every=10), tiny_llama()

    def each(step):
        with as_it_was(merger, model):
            if step == 15:
                blown_up(model, size)
            merger.step(model, step)

    with caplog.at_level(logging.WARNING, "traj_merge_callback"):
        train_steps(model, train, 30, each)
        merger.finish(model)
    assert not warnings_of(caplog)
    assert [record.step for record in merger.records] == [10, 20, 30]
    assert all(record.group_weights for record in merger.records)
    after, later = merger.records[1:]
    spoiled = after.checkpoint_steps.index(15)
    assert all(weights[spoiled] == 0 for weights in after.group_weights.values())
    assert 15 not in later.checkpoint_steps


def test_a_state_saved_at_a_merge_of_weights_that_are_not_finite_can_be_read(train, heldout, tmp_path):
    options = {"merge_every": 10, "schedule": "interleaved", "row": "last"}

    merger, model = a_merger(heldout, tmp_path, **options), tiny_llama()

    def each(step):
        if step == 20:
            model.lm_head.weight.data[0, 0] = torch.nan
        merger.step(model, step)

    train_steps(model, train, 20, each)
    merger.save_state(tmp_path / "state", written=None)
    merger.wait()
    steps = merger.window.steps
    merger.close()
    assert json.loads(Path(tmp_path / "state" / "state.json").read_text())["merging"] is None
    resumed = a_merger(heldout, tmp_path, on_error="raise", **options)
    resumed.load_state(tmp_path / "state", tiny_llama(), 20)
    assert resumed.window.steps == steps
    resumed.close()


@pytest.mark.parametrize("row", ["last", "multiscale"])
def test_a_first_checkpoint_that_is_not_finite_is_no_failure(train, heldout, tmp_path, row, caplog):
    options = {"merge_every": 10, "schedule": "interleaved", "row": row, "start_step": 0, "on_error": "raise"}
    merger, model = a_merger(heldout, tmp_path, **options), tiny_llama()

    def each(step):
        with as_it_was(merger, model):
            if step <= 5:
                model.lm_head.weight.data[0, 0] = torch.nan
            merger.step(model, step)

    with caplog.at_level(logging.WARNING, "traj_merge_callback"):
        train_steps(model, train, 20, each)
        merger.finish(model)
    assert len(warnings_of(caplog)) == 1
    assert merger.records[-1].step == 20


def test_rows_that_are_spoiled_leave_before_the_merge_at_the_end_too(train, heldout, tmp_path):
    merger, model = a_merger(heldout, tmp_path, row="multiscale"), tiny_llama()

    def each(step):
        with as_it_was(merger, model):
            if 16 <= step <= 20:
                blown_up(model, 10.0)
            merger.step(model, step)

    train_steps(model, train, 23, each)
    spoiled = Span(16, 20, 5)
    assert spoiled in merger.window.spans
    merger.merge_at_end(model)
    assert merger.window.steps[-1] == 23
    assert not any(span.first <= spoiled.last and spoiled.first <= span.last for span in merger.window.spans)
    assert np.isfinite(merger.window.gram()).all()
    merger.close()
