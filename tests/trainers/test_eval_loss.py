"""What held-out losses have to do with the numbers that the trainer shows."""

import pytest
import torch
from conftest import AT_ONCE
from test_transformers import make_trainer

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
