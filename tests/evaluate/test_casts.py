"""Autocast's cache of low-precision weights, where the whole training loop runs under autocast."""

import torch
from conftest import same_weights, tiny_llama, train_steps
from torch.utils.data import DataLoader

from traj_merge_callback import TrajectoryMerger


def test_the_cache_of_a_training_loop_under_autocast_is_neither_used_nor_cleared(heldout, train, tmp_path):
    def run(merging):
        model = tiny_llama()
        options = {"window_size": 2, "capture_every": 1, "merge_every": 4, "schedule": "blocking", "max_overhead": None}
        loader = DataLoader(heldout, batch_size=4)
        merger = TrajectoryMerger(loader, **options, heldout_batches=2, evaluations=6, output_dir=str(tmp_path))
        with torch.autocast("cpu", torch.bfloat16):
            # Such a loop computes with the weights of its first step for ever: a user's mistake, but the user's run.
            train_steps(model, train, 12, (lambda step: merger.step(model, step)) if merging else None)
        merger.finish(model)
        return model, [record.live_loss for record in merger.records]

    plain, _ = run(False)
    model, losses = run(True)
    assert same_weights(plain, model)
    assert len(set(losses)) == 3
