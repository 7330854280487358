"""A merge that is made over many training steps measures, and publishes, the model of its own step and no mixture."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import nll_without_gradients, same_weights, train_steps
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from traj_merge_callback import TrajectoryMerger, load_merged


class Changing(nn.Module):
    """A language model that training changes in a way that no row holds."""

    def __init__(self, what):
        super().__init__()
        torch.manual_seed(0)
        self.what = what
        self.embedding, self.head = nn.Embedding(512, 24), nn.Linear(24, 512)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mask", torch.zeros(24))
        self.mask[0] = float("-inf")
        self.register_buffer("hidden", torch.zeros(24), persistent=False)
        self.register_buffer("wide", torch.zeros(300, 256, dtype=torch.long))
        self.frozen = nn.Parameter(torch.zeros(24), requires_grad=False)
        self.teacher = nn.Embedding(512, 256).requires_grad_(False)
        self.cache, self.number = torch.zeros(24), 0.0

    def change(self):
        if self.what in ("count", "hidden", "wide"):
            getattr(self, self.what).add_(1)
        elif self.what == "mask":
            self.mask[1:] += 1
        elif self.what == "frozen":
            with torch.no_grad():
                self.frozen += 1
        elif self.what == "teacher":
            self.teacher.weight.data.add_(1)  # which no version tells
        elif self.what == "another teacher":
            self.teacher.weight.data = self.teacher.weight.data + 1
        elif self.what == "cache":
            self.cache = self.cache + 1
        elif self.what == "number":
            self.number += 1

    def forward(self, input_ids, labels):
        if self.training:
            self.change()
        changed = self.count + self.mask[1] + self.hidden[0] + self.frozen[0] + self.cache[0] + self.wide[0, 0]
        x = self.embedding(input_ids) * (1 + 0.02 * (changed + self.number + self.teacher(input_ids)[..., :24]))
        logits = self.head(x)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=logits)


def run(what, train, heldout, folder, schedule, states=None, **options):
    model = Changing(what)
    common = {"window_size": 3, "capture_every": 2, "merge_every": 6, "heldout_batches": 2, "max_overhead": None}
    common |= {"merge_at_end": False, "progress": False, "keep_last": 99, "on_error": "raise", "evaluations": 5}
    merger = TrajectoryMerger(
        DataLoader(heldout, 8), output_dir=str(folder), schedule=schedule, max_pause=1e-9, **{**common, **options}
    )

    def each(step):
        if states is not None:
            states[step] = copy.deepcopy(model)
        merger.step(model, step)

    torch.manual_seed(1)
    train_steps(model, train, 6 if schedule == "blocking" else 40, each, lr=1e-2)
    merger.finish(model)
    return model, {record.step: record for record in merger.records}


CHANGES = ["count", "mask", "hidden", "wide", "frozen", "teacher", "another teacher", "cache", "number"]


@pytest.mark.parametrize("what", CHANGES)
def test_a_merge_made_between_steps_is_one_made_at_once(train, heldout, tmp_path, what):
    states = {}
    _, at_once = run(what, train, heldout, tmp_path / "at once", "blocking")
    model, between = run(what, train, heldout, tmp_path / "between", "interleaved", states)
    plain = Changing(what)
    torch.manual_seed(1)
    assert same_weights(train_steps(plain, train, 40, lr=1e-2), model)
    common = at_once.keys() & between.keys()
    assert common
    for step in common:
        one, other = at_once[step], between[step]
        assert other.finished_step > step + 10
        assert other.live_loss == pytest.approx(one.live_loss, rel=1e-5)
        assert other.merged_loss == pytest.approx(one.merged_loss, rel=1e-4)
        found, expected = (load_file(Path(record.snapshot) / "model.safetensors") for record in (other, one))
        assert found.keys() == expected.keys()
        assert ("frozen" in found, "teacher.weight" in found) == (what == "frozen", "teacher" in what)
        for name in ("count", "mask", "wide"):
            assert torch.equal(found[name], states[step].state_dict()[name]), name
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=1e-3)
        load_merged(other.snapshot, Changing(what))


def test_a_merge_that_is_begun_again_is_of_its_own_step_too(train, heldout, tmp_path, caplog):
    states = {}
    _, between = run("count", train, heldout, tmp_path, "interleaved", states, nll=nll_without_gradients)
    assert "could not search with gradients" in caplog.text
    (step, record), *_ = between.items()
    assert load_file(Path(record.snapshot) / "model.safetensors")["count"] == step
    blocking = run("count", train, heldout, tmp_path / "again", "blocking", nll=nll_without_gradients)[1]
    assert record.merged_loss == pytest.approx(blocking[step].merged_loss, rel=1e-4)
