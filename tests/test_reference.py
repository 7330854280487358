"""The engine makes the merge of tests/reference.py, the method in 80 lines of plain PyTorch."""

import numpy as np
import pytest
import torch
from conftest import AT_ONCE, tiny_llama
from reference import one_gradient, train_and_merge

from traj_merge_callback import HeldOutLoss, Search, TrajectoryMerger, load_merged, register_search
from traj_merge_callback.search import _registered

STEPS = 120


class OneGradient(Search):
    """The candidates of the reference, asked by the engine."""

    needs_gradients = True

    def __init__(self, problem):
        self.candidates = one_gradient(problem.size)
        self.next, self.wants_gradient = next(self.candidates)

    def ask(self):
        return None if self.next is None else np.array(self.next)

    def tell(self, weights, loss, observed):
        slopes = None if observed.gradients is None else observed.gradients[0]
        try:
            self.next, self.wants_gradient = self.candidates.send((loss, slopes))
        except StopIteration:
            self.next, self.wants_gradient = None, False


@pytest.fixture
def search():
    register_search("one-gradient")(OneGradient)
    yield "one-gradient"
    del _registered["one-gradient"]


def taking_steps(model, train):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def take_step(step):
        generator = torch.Generator().manual_seed(step)
        batch = train.blocks[torch.randint(len(train), (8,), generator=generator)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return take_step


def test_the_engine_makes_the_merge_of_the_reference(text, train, tmp_path, search):
    sequences = torch.unique(text[1][:240], dim=0)
    batches = [{"input_ids": batch, "labels": batch} for batch in sequences.split(16)]
    dealt = HeldOutLoss(batches)._batches
    splits = [torch.cat([batch.data["input_ids"] for batch in dealt[split]]) for split in ("search", "report")]
    model = tiny_llama(dropout=0.0)
    weights, (live_loss, merged_loss) = train_and_merge(model, taking_steps(model, train), STEPS, *splits)

    ours = tiny_llama(dropout=0.0)
    take_step = taking_steps(ours, train)
    options = {"window_size": 4, "capture_every": 2, "merge_every": STEPS, "output_dir": str(tmp_path), **AT_ONCE}
    merger = TrajectoryMerger(batches, search=search, on_error="raise", **options)
    for step in range(1, STEPS + 1):
        take_step(step)
        merger.step(ours, step)
    (record,) = merger.records
    merger.finish(ours)
    assert np.count_nonzero(weights) == 4  # a merge won, not live
    assert record.weights == pytest.approx(weights, abs=1e-3)
    assert record.live_loss == pytest.approx(live_loss, abs=1e-5)
    assert record.merged_loss == pytest.approx(merged_loss, abs=1e-5)
    assert record.merged_loss < record.live_loss
    load_merged(tmp_path / "best", ours)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name), atol=1e-4, rtol=1e-3)
