"""A window that does not fit into memory: trainers train without it, or do not begin."""

import pytest
from conftest import same_weights
from test_lightning import Module, fit
from test_transformers import make_trainer

from traj_merge_callback.lightning import TrajMergeCallback as LightningCallback
from traj_merge_callback.transformers import TrajMergeCallback as TransformersCallback
from traj_merge_callback.window.memory import NoRoom


def with_lightning(folder, train, heldout, options, steps):
    """Train, and add to ``steps`` how many were taken; the merger and the model."""
    callback, module = LightningCallback(**options), Module()
    try:
        fit(folder, train, heldout, *([callback] if options else []), module=module, max_steps=4)
    finally:
        steps.append(module.trainer.global_step)
    return callback.merger, module


def with_transformers(folder, train, heldout, options, steps):
    trainer = make_trainer(folder, train, heldout, max_steps=4)
    callback = TransformersCallback(**options)
    if options:
        callback.attach(trainer)
    try:
        trainer.train()
    finally:
        steps.append(trainer.state.global_step)
    return callback.merger, trainer.model


@pytest.mark.parametrize("run", [with_lightning, with_transformers])
def test_a_window_without_room_costs_the_merges_or_is_refused_before_the_first_step(
    tmp_path, train, heldout, caplog, run
):
    steps = []
    options = {"window_size": 10**8, "capture_every": 1, "merge_every": 2, "output_dir": str(tmp_path / "merged")}
    _, plain = run(tmp_path / "plain", train, heldout, {}, steps)
    merger, model = run(tmp_path / "warn", train, heldout, options, steps)
    assert same_weights(plain, model)
    assert merger.records == []
    assert not (tmp_path / "merged").exists()
    (said,) = [record for record in caplog.records if record.name == "traj_merge_callback" and record.levelno > 20]
    assert "window_size=100000000: 100000000 rows of float32, with what is kept beside them, take" in said.message
    assert "Nothing is merged. Training goes on." in said.message
    assert not said.exc_info
    with pytest.raises(NoRoom, match=r"what would fit: window_size="):
        run(tmp_path / "raise", train, heldout, {**options, "on_error": "raise"}, steps)
    assert steps == [4, 4, 0]
