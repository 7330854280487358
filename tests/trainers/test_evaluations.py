"""``Trainer(callbacks=[TrajMergeCallback()])``: held-out data are what the trainer evaluates first."""

import pytest
import torch
from conftest import same_weights, warnings_of
from test_transformers import OPTIONS, make_trainer, merges, own_logs

from realtext import Blocks
from traj_merge_callback.transformers import TrajMergeCallback


def run(folder, train, heldout, resume=None, attach=False, options=OPTIONS, **arguments):
    callback = TrajMergeCallback(**{"on_error": "raise", **options})
    trainer = make_trainer(folder, train, heldout, callbacks=None if attach else [callback], **arguments)
    if attach:
        callback.attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback.merger.records


def same_merges(ones, others):
    for one, other in zip(ones, others, strict=True):
        for name in ("step", "checkpoint_steps", "weights", "live_loss", "merged_loss", "steps_saved", "evaluations"):
            assert getattr(one, name) == getattr(other, name)
    return True


@pytest.mark.parametrize("named", [False, True])
def test_merges_are_those_of_an_attached_callback_once_the_trainer_evaluates(tmp_path, train, heldout, text, named):
    data = {"code": heldout, "more": Blocks(text[1][48:80])} if named else heldout
    plain = make_trainer(tmp_path / "plain", train, data)
    plain.train()
    _, attached = run(tmp_path / "attached", train, data, attach=True)
    trainer, records = run(tmp_path / "callbacks", train, data)
    assert [record.step for record in records] == [4, 8, 10]
    assert same_merges(records, attached)
    assert records[0].domains.keys() == ({"code", "more"} if named else set())
    assert same_weights(plain.model, trainer.model)
    assert own_logs(trainer) == own_logs(plain)
    assert merges(trainer).keys() == {4, 8, 10}


def test_rows_are_captured_before_the_first_evaluation(tmp_path, train, heldout):
    _, records = run(tmp_path, train, heldout, eval_steps=6)
    # The merge of step 4 had to wait for the evaluation at step 6, where live is a row.
    assert [record.step for record in records] == [6, 8, 10]
    assert records[0].row_spans[0][0] <= 2


@pytest.mark.parametrize("when", [{"eval_steps": 100}, {"eval_strategy": "epoch"}, {"eval_on_start": True}])
def test_an_evaluation_at_either_end_is_enough(tmp_path, train, heldout, when):
    small = Blocks(train.blocks[:80])  # 10 steps are one epoch
    _, records = run(tmp_path, small, heldout, save_strategy="no", **when)
    assert [record.step for record in records] == ([4, 8, 10] if "eval_on_start" in when else [10])


def test_without_an_evaluation_there_is_one_sentence_that_says_what_to_do(tmp_path, train, heldout, caplog):
    plain = make_trainer(tmp_path / "plain", train, heldout, eval_delay=100)
    plain.train()
    trainer, records = run(tmp_path / "merging", train, heldout, eval_delay=100)
    assert records == []
    assert same_weights(plain.model, trainer.model)
    (said,) = [message for message in warnings_of(caplog) if "no merge was made" in message]
    assert "attach(trainer)" in said
    assert "heldout=" in said


def test_resuming_gives_the_merges_of_an_uninterrupted_run(tmp_path, train, heldout):
    whole, records = run(tmp_path, train, heldout, max_steps=12)
    resumed, rest = run(tmp_path, train, heldout, max_steps=12, resume=str(tmp_path / "checkpoint-4"))
    assert same_weights(whole.model, resumed.model)
    assert same_merges(records[1:], rest)
    # What was published before is still known.
    assert (tmp_path / "merged" / "step-00000004").is_dir() == (
        records[0].search_losses["merged"] < min(record.search_losses["merged"] for record in rest)
    )


def test_data_that_cannot_be_merged_on_end_merging_and_not_training(tmp_path, train, heldout, caplog):
    plain = make_trainer(tmp_path / "plain", train, heldout)
    plain.train()
    one = Blocks(torch.cat([heldout.blocks[:1]]))
    trainer, records = run(tmp_path / "merging", train, one, options={**OPTIONS, "on_error": "warn"})
    assert records == []
    assert trainer.state.global_step == 10
    assert same_weights(plain.model, trainer.model)
    assert len([message for message in warnings_of(caplog) if "at least 2 different sequences" in message]) == 1


def test_what_somebody_evaluates_under_another_name_is_not_taken(tmp_path, train, heldout):
    from transformers import TrainerCallback

    class Tests(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                trainer.evaluate(Blocks(heldout.blocks[:8]), metric_key_prefix="test")

    callback = TrajMergeCallback(on_error="raise", **OPTIONS)
    trainer = make_trainer(tmp_path, train, heldout, callbacks=[Tests(), callback])
    trainer.train()
    assert [record.step for record in callback.merger.records] == [4, 8, 10]
