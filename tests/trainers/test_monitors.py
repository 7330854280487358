"""``metric_for_best_model`` and ``EarlyStoppingCallback`` on the loss of merges, in transformers.Trainer."""

import pytest
from conftest import same_weights
from test_transformers import OPTIONS, make_trainer, merges
from transformers import EarlyStoppingCallback

from traj_merge_callback.transformers import TrajMergeCallback

MONITORED = {"metric_for_best_model": "merge/loss", "eval_steps": 2, "save_steps": 2}
SPREAD = {"schedule": "interleaved", "max_pause": 1e-6}


@pytest.mark.parametrize("schedule", [{}, SPREAD])
def test_the_checkpoint_of_the_best_merge_is_known_and_loaded(tmp_path, train, heldout, schedule):
    trainer = make_trainer(tmp_path, train, heldout, load_best_model_at_end=True, **MONITORED)
    callback = TrajMergeCallback(on_error="raise", **{**OPTIONS, **schedule}).attach(trainer)
    trainer.train()
    best = min(callback.merger.records, key=lambda record: record.merged_loss)
    assert trainer.state.best_metric == best.merged_loss
    assert trainer.state.best_global_step == best.finished_step
    if not schedule:
        assert merges(trainer).keys() == {4, 8, 10}
    again = make_trainer(tmp_path / "again", train, heldout)
    again._load_from_checkpoint(trainer.state.best_model_checkpoint)
    assert same_weights(trainer.model, again.model)


def test_early_stopping_counts_merges_and_not_evaluations(tmp_path, train, heldout):
    # No merge is better by 10 nats: the second one is where patience ends, although evaluations come twice as often.
    stopping = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=10.0)
    trainer = make_trainer(tmp_path, train, heldout, callbacks=[stopping], max_steps=20, **MONITORED)
    callback = TrajMergeCallback(on_error="raise", **OPTIONS).attach(trainer)
    trainer.train()
    assert trainer.state.global_step == 8
    assert [record.step for record in callback.merger.records] == [4, 8]
    assert "on_evaluate" not in vars(stopping)


def test_what_cannot_work_is_refused_before_training(tmp_path, train, heldout):
    trainer = make_trainer(tmp_path, train, heldout, callbacks=[TrajMergeCallback(**OPTIONS)], **MONITORED)
    with pytest.raises(ValueError, match=r"metric_for_best_model='merge/loss' needs TrajMergeCallback.*attach"):
        trainer.train()
    trainer = make_trainer(tmp_path, train, heldout, **{**MONITORED, "metric_for_best_model": "merge/los"})
    TrajMergeCallback(**OPTIONS).attach(trainer)
    with pytest.raises(ValueError, match="metric_for_best_model='merge/los' is not among the metrics of merges"):
        trainer.train()
    assert trainer.state.global_step == 0
