"""What held-out losses have to do with the numbers that the trainer shows."""

import logging

import pytest
import torch
from conftest import AT_ONCE
from test_transformers import make_trainer
from torch.nn import functional
from transformers import Trainer

from traj_merge_callback.transformers import TrajMergeCallback


def test_live_loss_is_the_trainers_eval_loss_up_to_the_sample(tmp_path, train, heldout):
    """The first part of the eval set is much easier than the rest."""
    easy = torch.arange(96)[:, None].expand(96, 32)
    both = type(heldout)(torch.cat([easy, heldout.blocks]))
    trainer = make_trainer(tmp_path, train, both, max_steps=20, learning_rate=1e-2, eval_strategy="no", save_steps=99)
    options = {"capture_every": 10, "merge_every": 20, "heldout_batches": 8, **AT_ONCE}
    callback = TrajMergeCallback(**options).attach(trainer)
    trainer.train()
    (record,) = callback.merger.records
    assert record.live_loss == pytest.approx(trainer.evaluate()["eval_loss"], rel=0.1)


def half(outputs, labels, num_items_in_batch=None):
    logits, targets = outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return 0.5 * functional.cross_entropy(logits, targets)


class Doubling(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        return (2 * loss, outputs) if return_outputs else 2 * loss


OTHERS = {
    "label_smoothing_factor=0.3": {"label_smoothing_factor": 0.3},
    "compute_loss_func=half": {"compute_loss_func": half},
    "Doubling.compute_loss": {"trainer_class": Doubling},
}


@pytest.mark.parametrize("said", [*OTHERS, None])
def test_which_loss_is_meant_is_said_where_another_is_trained(tmp_path, train, heldout, caplog, said):
    options = dict(OTHERS.get(said, {}))
    function = options.pop("compute_loss_func", None)
    trainer = make_trainer(tmp_path, train, heldout, max_steps=4, eval_strategy="no", save_steps=99, **options)
    trainer.compute_loss_func = function
    callback = TrajMergeCallback(capture_every=2, merge_every=4, heldout_batches=8, on_error="raise", **AT_ONCE)
    with caplog.at_level(logging.INFO, "traj_merge_callback"):
        callback.attach(trainer)
        trainer.train()
    (record,) = callback.merger.records
    with torch.no_grad():
        ids = heldout.blocks
        plain = trainer.model.eval()(input_ids=ids, labels=ids).loss.item()
    assert record.live_loss == pytest.approx(plain, rel=0.03)
    assert ("eval_loss" in caplog.text) == (said is not None)
    if said is not None:
        assert said in caplog.text
        assert trainer.evaluate()["eval_loss"] != pytest.approx(plain, rel=0.03)
