"""The Hugging Face callback in whole training runs."""

import json
import math

import pytest
import torch
from conftest import AT_ONCE, overflow_at, same_weights, tiny_llama, warnings_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from realtext import Blocks
from traj_merge_callback import HeldOutLoss
from traj_merge_callback.transformers import TrajMergeCallback

OPTIONS = {"window_size": 4, "capture_every": 2, "merge_every": 4, "evaluations": 5, "heldout_batches": 4} | AT_ONCE


def make_trainer(tmp_path, train, heldout, model=None, trainer_class=Trainer, callbacks=None, **arguments):
    options = {
        "output_dir": str(tmp_path),
        "max_steps": 10,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_steps": 4,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return trainer_class(
        model or tiny_llama(),
        TrainingArguments(**{**options, **arguments}),
        train_dataset=train,
        eval_dataset=heldout,
        callbacks=callbacks,
    )


def own_logs(trainer):
    """What the trainer logs itself, without times."""
    timed = ("runtime", "per_second")
    return [
        {key: value for key, value in log.items() if not any(word in key for word in timed)}
        for log in trainer.state.log_history
        if "merge/loss" not in log
    ]


def merges(trainer):
    return {log["step"]: log for log in trainer.state.log_history if "merge/loss" in log}


@pytest.mark.parametrize("how", ["attach", "callbacks"])
@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"torch_compile": True, "torch_compile_backend": "eager"}])
def test_the_run_is_untouched_and_its_own_logs_are_complete(caplog, tmp_path, train, heldout, how, precision):
    torch._dynamo.reset()
    plain = make_trainer(tmp_path / "plain", train, heldout, **precision)
    plain.train()
    torch._dynamo.reset()
    shuffled = DataLoader(heldout, batch_size=8, shuffle=True)
    callback = TrajMergeCallback(shuffled, on_error="raise", **OPTIONS)
    callbacks = [callback] if how == "callbacks" else None
    trainer = make_trainer(tmp_path / "merging", train, heldout, callbacks=callbacks, **precision)
    if how == "attach":
        callback.attach(trainer)
    trainer.train()
    assert same_weights(plain.model, trainer.model)
    # Losses, evaluations and learning rates of the trainer: all there, each at its step, with the same values.
    assert own_logs(trainer) == own_logs(plain)
    # Gradient accumulation: steps are optimizer steps. The last step is merged although it was not due.
    assert merges(trainer).keys() == {4, 8, 10}
    # The first merge took gradients, and later ones could; those may race rows first, each on a part of the split.
    first = callback.merger.records[0]
    assert first.forward_equivalents > first.evaluations
    assert "could not search with gradients" not in caplog.text
    # What is logged at a step is in the checkpoint of that step.
    state = json.loads((tmp_path / "merging" / "checkpoint-8" / "trainer_state.json").read_text())
    assert [log["step"] for log in state["log_history"] if "merge/loss" in log] == [4, 8]


def test_mean_rows_and_groups_leave_the_run_untouched_and_resume(tmp_path, train, heldout):
    options = {
        **OPTIONS,
        "evaluations": 14,
        "row": "mean",
        "samples_per_row": 2,
        "groups": "blocks",
        "on_error": "raise",
    }
    plain = make_trainer(tmp_path / "plain", train, heldout)
    plain.train()
    trainer = make_trainer(tmp_path / "merging", train, heldout)
    TrajMergeCallback(**options).attach(trainer)
    trainer.train()
    assert same_weights(plain.model, trainer.model)
    # From a checkpoint in the middle of a row.
    resumed = make_trainer(tmp_path / "resumed", train, heldout, save_steps=5)
    callback = TrajMergeCallback(**options).attach(resumed)
    resumed.train()
    again = make_trainer(tmp_path / "resumed", train, heldout, save_steps=5)
    callback = TrajMergeCallback(**options).attach(again)
    again.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-5"))
    assert same_weights(plain.model, again.model)
    expected, found = merges(trainer), merges(again)
    for step in (8, 10):
        assert found[step]["merge/loss"] == expected[step]["merge/loss"]
    assert [record.step for record in callback.merger.records] == [8, 10]


def test_attached_it_takes_the_eval_dataset_and_tensorboard_holds_its_scalars(tmp_path, train, heldout, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make_trainer(tmp_path, train, {"code": heldout, "seen": train}, report_to="tensorboard")
    TrajMergeCallback(on_error="raise", **OPTIONS).attach(trainer)
    trainer.train()
    runs = list((tmp_path / "board").glob("events*"))
    assert len(runs) == 1, "one run holds the training loss and the merges"
    events = EventAccumulator(str(runs[0])).Reload()
    for name in (
        "merge/loss",
        "merge/live_loss",
        "merge_details/gain_stderr",
        "merge_details/weight/0",
        "merge_details/loss/code",
        "loss",
    ):
        assert f"train/{name}" in events.Tags()["scalars"]
    logged = {event.step: event.value for event in events.Scalars("train/merge/loss")}
    assert logged == pytest.approx({step: log["merge/loss"] for step, log in merges(trainer).items()})
    assert logged.keys() == {4, 8, 10}


def test_snapshots_load_with_from_pretrained_and_have_the_reported_loss(tmp_path, train, heldout):
    trainer = make_trainer(tmp_path, train, heldout)
    callback = TrajMergeCallback(on_error="raise", **OPTIONS).attach(trainer)
    trainer.train()
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "best")
    loss = HeldOutLoss(DataLoader(heldout, batch_size=8), batches=4).evaluate(best, "report").loss
    assert loss == pytest.approx(min(record.merged_loss for record in callback.merger.records), abs=1e-6)
    assert (tmp_path / "merged" / "best" / "generation_config.json").exists()


def test_load_merged_at_end(tmp_path, train, heldout):
    trainer = make_trainer(tmp_path, train, heldout)
    TrajMergeCallback(on_error="raise", load_merged_at_end=True, **OPTIONS).attach(trainer)
    trainer.train()
    assert same_weights(trainer.model, AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "best"))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_resuming_gives_the_merges_of_an_uninterrupted_run(tmp_path, train, heldout, elsewhere):
    def run(folder, resume=None):
        trainer = make_trainer(folder, train, heldout, max_steps=12)
        callback = TrajMergeCallback(on_error="raise", **OPTIONS).attach(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, callback.merger.records

    whole, records = run(tmp_path / "a")
    assert {"row-00.rank-00000.safetensors", "state.json"} <= {
        path.name for path in (tmp_path / "a" / "checkpoint-8" / "traj_merge").iterdir()
    }
    resumed, rest = run(tmp_path / ("b" if elsewhere else "a"), str(tmp_path / "a" / "checkpoint-4"))
    assert same_weights(whole.model, resumed.model)
    for one, other in zip(records[1:], rest, strict=True):
        for name in ("step", "checkpoint_steps", "weights", "live_loss", "merged_loss", "steps_saved", "evaluations"):
            assert getattr(one, name) == getattr(other, name)
    assert [record.step for record in rest] == [8, 12]


def test_a_missing_window_is_said_once_and_training_resumes(tmp_path, train, heldout, caplog):
    make_trainer(tmp_path, train, heldout, max_steps=4).train()
    trainer = make_trainer(tmp_path, train, heldout)
    callback = TrajMergeCallback(**OPTIONS).attach(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert [r.message for r in caplog.records if "no saved window" in r.message]
    assert [record.step for record in callback.merger.records] == [8, 10]


def test_plain_callbacks_say_once_what_attach_would_add(tmp_path, train, heldout, caplog):
    callback = TrajMergeCallback(DataLoader(heldout, batch_size=8), **OPTIONS)
    trainer = make_trainer(tmp_path, train, heldout, callbacks=[callback])
    trainer.train()
    assert len([r for r in caplog.records if "attach(trainer)" in r.message]) == 1
    assert merges(trainer).keys() == {4, 8, 10}


def test_no_held_out_data_is_an_error_before_training(tmp_path, train):
    trainer = make_trainer(tmp_path, train, None, eval_strategy="no")
    with pytest.raises(ValueError, match="pass heldout= to TrajMergeCallback, or eval_dataset="):
        TrajMergeCallback(**OPTIONS).attach(trainer)
    trainer = make_trainer(tmp_path, train, None, eval_strategy="no", callbacks=[TrajMergeCallback(**OPTIONS)])
    with pytest.raises(ValueError, match=r"attach\(trainer\)"):
        trainer.train()
    trainer = make_trainer(tmp_path, train, None, eval_strategy="no", callbacks=[TrajMergeCallback([], **OPTIONS)])
    with pytest.raises(ValueError, match="yields no batches"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_steps_that_amp_skips_are_not_captured(tmp_path, train, heldout):
    trainer = make_trainer(tmp_path, train, heldout, max_steps=8, gradient_accumulation_steps=1)
    # Accelerate refuses fp16 on the CPU, but its loop works with any scaler.
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    overflow_at(trainer.model, {1, 2, 4, 6})
    callback = TrajMergeCallback(on_error="raise", **{**OPTIONS, "merge_at_end": False, "row": "last"}).attach(trainer)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 1024 / 2**4
    # Captures were due at 2, 4, 6 and 8, merges at 4 and 8: what fell on a skipped step was done at the next real one.
    assert callback.merger.records[-1].checkpoint_steps == [3, 5, 7, 8]
    assert [record.step for record in callback.merger.records] == [5, 8]


def test_a_run_that_is_stopped_early_is_merged_at_its_last_step(tmp_path, train, heldout):
    trainer = make_trainer(
        tmp_path,
        train,
        heldout,
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=10.0)],
    )
    callback = TrajMergeCallback(on_error="raise", **{**OPTIONS, "capture_every": 1, "merge_every": 3}).attach(trainer)
    trainer.train()
    assert trainer.state.global_step == 4
    assert [record.step for record in callback.merger.records] == [3, 4]


def test_trls_sft_trainer_keeps_its_own_averages(tmp_path, heldout):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {chr(i): i for i in range(32, 127)} | {"<pad>": 0, "<eos>": 1}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    rows = [{"text": bytes(row.tolist()).decode(errors="replace")} for row in heldout.blocks]
    data = datasets.Dataset.from_list(rows)

    def run(merging):
        config = trl.SFTConfig(
            output_dir=str(tmp_path / str(merging)),
            max_steps=6,
            logging_steps=2,
            per_device_train_batch_size=4,
            max_length=32,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            save_strategy="no",
        )
        model = tiny_llama(dropout=0.0)
        trainer = trl.SFTTrainer(model, config, train_dataset=data, eval_dataset=data, processing_class=fast)
        if merging:
            TrajMergeCallback(on_error="raise", **{**OPTIONS, "capture_every": 1, "merge_every": 3}).attach(trainer)
        trainer.train()
        return trainer

    plain, trainer = run(False), run(True)
    assert same_weights(plain.model, trainer.model)
    assert own_logs(plain) == own_logs(trainer)
    assert any("mean_token_accuracy" in log for log in own_logs(trainer))
    assert merges(trainer).keys() == {3, 6}
    assert all(math.isfinite(log["merge/loss"]) for log in merges(trainer).values())
    assert (tmp_path / "True" / "merged" / "best" / "tokenizer.json").exists()


SPREAD = {"schedule": "interleaved", "max_pause": 1e-6}


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"torch_compile": True, "torch_compile_backend": "eager"}])
def test_merges_spread_over_steps_leave_the_run_untouched(tmp_path, train, heldout, precision):
    torch._dynamo.reset()
    plain = make_trainer(tmp_path / "plain", train, heldout, max_steps=40, **precision)
    plain.train()
    torch._dynamo.reset()
    trainer = make_trainer(tmp_path / "merging", train, heldout, max_steps=40, **precision)
    callback = TrajMergeCallback(on_error="raise", **{**OPTIONS, **SPREAD}).attach(trainer)
    trainer.train()
    assert same_weights(plain.model, trainer.model)
    assert own_logs(trainer) == own_logs(plain)
    records = callback.merger.records
    assert records[0].step <= 6  # as soon as it is known what pieces take
    assert records[-1].step == 40
    assert any(record.finished_step > record.step for record in records)
    # Every merge is in the trainer's log, at the step at which it was done, and says of which step it is.
    logged = [log for log in trainer.state.log_history if "merge/loss" in log]
    assert [log["merge_details/step"] for log in logged] == [record.step for record in records]
    assert [log["step"] for log in logged] == [record.finished_step for record in records]


def test_an_interrupted_run_leaves_no_thread_and_no_half_written_file(tmp_path, train, heldout, our_threads):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                raise KeyboardInterrupt

    trainer = make_trainer(tmp_path, train, heldout, callbacks=[Interrupt()])
    TrajMergeCallback(on_error="raise", **{**OPTIONS, **SPREAD}).attach(trainer)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert our_threads() == []
    assert not list((tmp_path / "merged").glob(".*"))


def test_a_newcomers_run_shows_every_merge_a_gain_and_at_most_one_warning(tmp_path, train, text, caplog):
    heldout = Blocks(text[1][:160])
    options = {"max_steps": 300, "gradient_accumulation_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    trainer = make_trainer(tmp_path, train, heldout, **options)
    TrajMergeCallback(capture_every=5, merge_every=50).attach(trainer)
    trainer.train()
    found = {log["merge_details/step"]: log for log in trainer.state.log_history if "merge/loss" in log}
    assert list(found) == [50, 100, 150, 200, 250, 300]
    assert all(log["merge/gain"] >= -2 * log["merge_details/gain_stderr"] for log in found.values())
    assert found[300]["merge/gain"] > 2 * found[300]["merge_details/gain_stderr"]
    ours = [one for one in caplog.records if one.name == "traj_merge_callback" and one.levelname == "WARNING"]
    assert len(ours) <= 1, caplog.text


class BlowsUp(TrainerCallback):
    """At some steps the weights are no longer what training made of them."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            with torch.no_grad():
                for parameter in kwargs["model"].parameters():
                    parameter.mul_(3.0)


@pytest.mark.parametrize("moments", ["reset", "keep"])
def test_a_spike_is_rolled_back_where_that_is_asked_for(tmp_path, train, heldout, caplog, moments):
    arguments = {"max_steps": 40, "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    trainer = make_trainer(tmp_path, train, heldout, callbacks=[BlowsUp({25})], **arguments)
    options = {**OPTIONS, "on_spike": "rollback", "spike_moments": moments, "merge_every": 8}
    callback = TrajMergeCallback(**options).attach(trainer)
    trainer.train()
    (said,) = [message for message in warnings_of(caplog) if "rolled back" in message]
    assert "merge of step 24" in said
    logged = merges(trainer)
    assert logged[24]["merge/spike"] == 0
    assert [log["merge_details/rollbacks"] for log in logged.values()] == [0, 0, 0, 1, 1]
    assert logged[40]["merge/live_loss"] < logged[16]["merge/live_loss"]
    assert callback.merger.records[-1].rollbacks == 1
    losses = {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}
    assert losses[26] > losses[40] + 0.5
