"""Buffers: what is finite and changes is merged, everything else is live's; a snapshot holds finite merged numbers."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import AT_ONCE, same_weights, tiny_llama, train_steps
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from traj_merge_callback import Search, TrajectoryMerger, load_merged

OPTIONS = {"window_size": 4, "capture_every": 2, "merge_every": 8, "heldout_batches": 4, "on_error": "raise"} | AT_ONCE
OPTIONS |= {"progress": False, "keep_last": 9}


class Beyond(Search):
    """Goes on in the direction of the last steps, which is better than live while the loss falls fast."""

    def __init__(self, problem):
        self.candidates = [np.array([0.0] * (problem.size - 2) + [-1.0, 2.0])]

    def ask(self):
        return self.candidates.pop() if self.candidates else None


class HandWritten(nn.Module):
    """A causal model as people write it by hand: its mask is a persistent float buffer with -inf."""

    def __init__(self, mask_name="causal_mask"):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(512, 24), nn.Linear(24, 512)
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.register_buffer(mask_name, torch.full((32, 32), float("-inf")).triu(1))
        self.register_buffer("frequencies", 1.0 / 3.0 ** torch.arange(24))  # constant
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(24))  # changes, as BatchNorm's statistics
        self.register_buffer("amax", torch.ones(3))
        self.spoil_at: dict[int, float] = {}

    def forward(self, input_ids, labels):
        x = self.embedding(input_ids) + torch.sin(self.frequencies)
        if self.training:
            self.step += 1
            self.mean.lerp_(x.detach().mean((0, 1)), 0.1)
            self.amax.fill_(self.spoil_at.get(int(self.step), 1e-3 * float(self.step)))
        x = x - self.mean
        x = x + self.attention(x, x, x, attn_mask=next(iter(self._buffers.values())), need_weights=False)[0]
        logits = self.head(x)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=logits)


@pytest.mark.parametrize(
    "options",
    [
        {"search": "auto"},
        {"search": "auto", "dtype": "int8"},
        {"search": "auto", "dtype": "bfloat16"},
        {"search": "auto", "row": "last"},
        {"search": "auto", "row": "last", "dtype": "int8"},
        {"search": "auto", "row": "last", "dtype": "bfloat16"},
        {"search": "bema"},
        {"search": "auto", "row": "mean", "samples_per_row": 2},
        {"search": "auto", "groups": "blocks", "evaluations": 9},
    ],
)
def test_masks_constants_and_counters_are_lives_and_statistics_are_merged(train, heldout, tmp_path, caplog, options):
    model, rows = HandWritten(), {}
    merger = TrajectoryMerger(DataLoader(heldout, 8), output_dir=str(tmp_path), **{**OPTIONS, **options})

    def each(step):
        rows[step] = copy.deepcopy(model.state_dict())
        merger.step(model, step)

    train_steps(model, train, 16, each, lr=1e-2)
    assert "without" not in caplog.text
    assert "could not search with gradients" not in caplog.text
    for record in merger.records:
        state, live = load_file(f"{record.snapshot}/model.safetensors"), rows[record.step]
        assert state.keys() == live.keys()
        for name in ("causal_mask", "frequencies", "step"):
            assert torch.equal(state[name], live[name]), name
        assert all(value.isfinite().all() for name, value in state.items() if name != "causal_mask")
        if options["search"] == "bema" or "groups" in options:
            continue
        means = []
        for first, last, samples in record.row_spans:
            assert samples == last - first + 1
            means.append(sum(rows[step]["mean"] for step in range(first, last + 1)) / samples)
        by_hand = sum(w * mean for w, mean in zip(record.weights, means, strict=True))
        torch.testing.assert_close(state["mean"], by_hand, atol=2e-3, rtol=1e-2)
    if options["search"] == "auto":
        assert merger.records[-1].search_losses["merged"] < merger.records[-1].search_losses["live"]
    merger.close()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_mask_costs_no_gain(train, heldout, tmp_path, dtype):
    def gains(persistent):
        model, folder = HandWritten(), tmp_path / str(persistent)
        if not persistent:
            model._non_persistent_buffers_set.add("causal_mask")
        merger = TrajectoryMerger(DataLoader(heldout, 8), output_dir=str(folder), dtype=dtype, **OPTIONS)
        train_steps(model, train, 16, lambda step: merger.step(model, step), lr=1e-2)
        return [record.gain for record in merger.records]

    assert gains(True) == pytest.approx(gains(False), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({}, float("nan")),
        ({"dtype": "int8"}, float("inf")),
        ({"row": "mean", "samples_per_row": 2}, float("nan")),
        ({"search": "bema"}, float("-inf")),
    ],
)
def test_a_buffer_that_stops_being_finite_is_lives(train, heldout, tmp_path, caplog, options, value):
    def run(folder, spoil, resume_at=None):
        model = HandWritten("mask")
        model.spoil_at = dict.fromkeys(spoil, value)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        merger = TrajectoryMerger(DataLoader(heldout, 8), output_dir=str(folder), **{**OPTIONS, **options})
        train_steps(model, train, 10, lambda step: merger.step(model, step), optimizer=optimizer)
        if resume_at:
            merger.save_state(folder / "state")
            merger.close()
            merger = TrajectoryMerger(DataLoader(heldout, 8), output_dir=str(folder), **{**OPTIONS, **options})
            merger.load_state(folder / "state", model, 10)
        train_steps(model, train, 8, lambda step: merger.step(model, step), start=10, optimizer=optimizer)
        return model, merger.records

    _, clean = run(tmp_path / "clean", [])
    spoilt, records = run(tmp_path / "spoilt", range(9, 12))
    _, resumed = run(tmp_path / "resumed", range(9, 12), resume_at=10)
    assert "failed" not in caplog.text
    assert [record.gain for record in records] == pytest.approx([record.gain for record in clean], abs=5e-4)
    # A window that is made while the buffer is not finite has no columns for it, so that its sums are a little shorter
    # and may be rounded in another way.
    merged = [record.merged_loss for record in records][-len(resumed) :]
    assert merged == pytest.approx([record.merged_loss for record in resumed], rel=1e-6)
    for record in records[1:]:
        assert load_file(f"{record.snapshot}/model.safetensors")["amax"][0] == pytest.approx(1e-3 * record.step)
    load_merged(records[-1].snapshot, spoilt)


def test_a_mask_of_minus_infinity_in_a_model_of_transformers(train, heldout, tmp_path):
    model = tiny_llama()
    model.model.register_buffer("bias", torch.full((64, 64), float("-inf")).triu(1))
    merger = TrajectoryMerger(DataLoader(heldout, 8), output_dir=str(tmp_path), **OPTIONS)
    train_steps(model, train, 16, lambda step: merger.step(model, step), lr=1e-2)
    assert merger.records[-1].search_losses["merged"] < merger.records[-1].search_losses["live"]
    again = tiny_llama(seed=1)
    again.model.register_buffer("bias", torch.zeros(64, 64))
    load_merged(merger.records[-1].snapshot, again)
    assert torch.equal(again.model.bias, model.model.bias)
    assert LlamaForCausalLM.from_pretrained(merger.records[-1].snapshot).num_parameters() == model.num_parameters()


def test_a_merge_that_is_not_finite_is_not_published_and_that_is_said_once(train, heldout, tmp_path, caplog):
    plain = train_steps(tiny_llama(), train, 17)
    model = tiny_llama()
    options = {**OPTIONS, "on_error": "warn", "search": f"{__name__}:Beyond"}
    merger = TrajectoryMerger(DataLoader(heldout, 8), output_dir=str(tmp_path), **options)
    # Numbers that no held-out token uses: the losses are finite.
    model.unused = nn.Parameter(torch.zeros(2, dtype=torch.float16))

    def each(step):
        model.unused.data.fill_(0.0 if step % 8 else 60000.0)  # twice as much is more than there is in float16
        merger.step(model, step)

    train_steps(model, train, 17, each)
    assert [record.source for record in merger.records] == ["merge"] * 2
    assert [record.snapshot for record in merger.records] == [None] * 2
    assert not list(tmp_path.glob("step-*"))
    assert (
        caplog.text.count("publishing a snapshot failed: ValueError: the merge at step 8 is not finite in 'unused'")
        == 1
    )
    del model.unused
    assert same_weights(plain, model)
