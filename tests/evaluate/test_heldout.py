"""The held-out loss against one computed by hand, its two splits, and what it accepts."""

import math

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from traj_merge_callback import CheckpointWindow, HeldOutLoss
from traj_merge_callback.evaluate.candidate import weights_in
from traj_merge_callback.evaluate.data import merge_shares
from traj_merge_callback.evaluate.parking import Parking
from traj_merge_callback.evaluate.untouched.isolation import isolated
from traj_merge_callback.evaluate.weights import installed
from traj_merge_callback.window.pieces import finish


def ragged_batches(heldout, lengths=(32, 17, 9, 25)):
    """Batches whose sequences end at different lengths, padded, with padding ignored."""
    batches = []
    for start in range(0, 16, 4):
        ids = heldout.blocks[start : start + 4].clone()
        labels, mask = ids.clone(), torch.ones_like(ids)
        for row, length in enumerate(lengths):
            ids[row, length:], labels[row, length:], mask[row, length:] = 0, -100, 0
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def sequences(loss: HeldOutLoss, split: str) -> set[tuple[int, ...]]:
    return {tuple(row.tolist()) for batch in loss._batches[split] for row in batch.data["input_ids"]}


@torch.no_grad()
def by_hand(model, sequences_with_labels):
    """Mean NLL per target token, one sequence at a time, from the logits."""
    model.eval()
    total, tokens = 0.0, 0
    for ids, mask, labels in sequences_with_labels:
        logits = model(input_ids=ids[None], attention_mask=mask[None]).logits[0].double()
        targets = labels[1:]
        kept = targets != -100
        logp = functional.log_softmax(logits[:-1][kept], dim=-1)
        total -= logp.gather(1, targets[kept][:, None]).sum().item()
        tokens += int(kept.sum())
    return total / tokens


def test_loss_equals_one_computed_by_hand_on_ragged_batches(heldout):
    model = tiny_llama()
    batches = ragged_batches(heldout)
    loss = HeldOutLoss(batches)
    for split in ("search", "report"):
        mine = [
            (ids, mask, labels)
            for batch in loss._batches[split]
            for ids, mask, labels in zip(*(batch.data[k] for k in ("input_ids", "attention_mask", "labels")))
        ]
        assert loss.evaluate(model, split).loss == pytest.approx(by_hand(model, mine), abs=1e-5)


def test_the_splits_share_no_sequence_and_cover_all_but_the_gaps(heldout):
    loss = HeldOutLoss(DataLoader(heldout, batch_size=8), batches=100)
    search, report = sequences(loss, "search"), sequences(loss, "report")
    assert not search & report
    # Three borders between runs, with a sequence left out at each.
    assert len(search | report) == len({tuple(row.tolist()) for row in heldout.blocks}) - 3
    assert abs(len(search) - len(report)) <= 1


def test_equal_sequences_go_to_one_split_even_if_padded_differently(heldout):
    ids = heldout.blocks[:8]
    padded = functional.pad(ids, (0, 5))
    mask = functional.pad(torch.ones_like(ids), (0, 5))
    first = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    again = {"input_ids": padded.flip(0), "attention_mask": mask, "labels": padded.flip(0)}
    loss = HeldOutLoss([first, again])
    search = {row[:32] for row in sequences(loss, "search")}
    report = {row[:32] for row in sequences(loss, "report")}
    assert not search & report
    assert len(search | report) == 8


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
def test_search_fraction_is_the_share_of_sequences(heldout, fraction):
    loss = HeldOutLoss(DataLoader(heldout, batch_size=8), search_fraction=fraction)
    assert len(sequences(loss, "search")) == pytest.approx(45 * fraction, abs=1)


def test_one_large_batch_still_gives_a_standard_error(heldout):
    loss = HeldOutLoss([{"input_ids": heldout.blocks, "labels": heldout.blocks}])
    assert loss.num_batches("report") == 8
    assert loss.evaluate(tiny_llama(), "report").stderr > 0


def test_domains_are_named_and_the_whole_is_token_weighted(heldout, train):
    loss = HeldOutLoss({"a": DataLoader(heldout, batch_size=8), "b": DataLoader(train, batch_size=4)}, batches=3)
    found = loss.evaluate(tiny_llama(), "report")
    a, b = found.only({"a"}), found.only({"b"})
    assert a.tokens.sum() == 2 * b.tokens.sum()
    assert found.loss == pytest.approx((2 * a.loss + b.loss) / 3)


def test_domain_names_need_not_be_strings(heldout, train):
    loss = HeldOutLoss({0: DataLoader(heldout, batch_size=8), 1: DataLoader(train, batch_size=4)})
    assert set(loss.evaluate(tiny_llama(), "search").domains) == {"0", "1"}


def test_a_report_only_domain_is_never_searched_on(heldout, train):
    loaders = {"a": DataLoader(heldout, batch_size=8), "b": DataLoader(train, batch_size=4)}
    loss = HeldOutLoss(loaders, report_only=["b"])
    assert set(loss.evaluate(tiny_llama(), "search").domains) == {"a"}
    assert set(loss.evaluate(tiny_llama(), "report").domains) == {"a", "b"}


@pytest.mark.parametrize(
    ("model", "targets"),
    [
        (lambda: tiny_llama(), 31),
        (lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, bos_token_id=0, eos_token_id=0)), 31),
        (
            lambda: BertForMaskedLM(
                BertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16)
            ),
            32,
        ),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(num_layers=1, d_model=16, num_heads=2, d_ff=16, decoder_start_token_id=0)
            ),
            32,
        ),
    ],
    ids=["llama", "gpt2", "bert", "t5"],
)
def test_targets_are_counted_as_the_model_averages_them(heldout, model, targets):
    batches = [{"input_ids": heldout.blocks[:4], "labels": heldout.blocks[:4]}]
    found = HeldOutLoss(batches).evaluate(model().eval(), "report")
    assert found.tokens.tolist() == [targets, targets]


def test_a_batch_without_targets_counts_for_nothing(heldout):
    ids = heldout.blocks[:4]
    labels = ids.clone()
    labels[1:3] = -100
    found = HeldOutLoss([{"input_ids": ids, "labels": labels}]).evaluate(tiny_llama(), "report")
    assert math.isfinite(found.loss)
    assert found.tokens.tolist() == [0, 31]


def test_any_batch_works_with_an_nll_of_ones_own():
    model = nn.Linear(3, 5)
    x, y = torch.randn(12, 3), torch.randint(5, (12,))

    def nll(model, batch):
        inputs, targets = batch
        return functional.cross_entropy(model(inputs), targets, reduction="sum"), len(targets)

    loss = HeldOutLoss(DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4), nll=nll)
    rows = [torch.cat([batch.data[0] for batch in loss._batches[s]]) for s in ("search", "report")]
    assert sum(map(len, rows)) == 12
    indices = [int((x == row).all(1).nonzero()[0, 0]) for row in rows[1]]
    expected = functional.cross_entropy(model(x[indices]), y[indices]).item()
    assert loss.evaluate(model, "report").loss == pytest.approx(expected, abs=1e-6)


def test_a_shuffled_loader_is_read_the_same_way_each_time_and_not_disturbed(heldout):
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(heldout, batch_size=8, shuffle=True, generator=generator)
    torch.manual_seed(7)
    states = torch.get_rng_state(), generator.get_state()
    one, two = (HeldOutLoss(loader, batches=2) for _ in range(2))
    assert torch.equal(states[0], torch.get_rng_state())
    assert torch.equal(states[1], generator.get_state())
    assert one.digest == two.digest
    assert one.digest != HeldOutLoss(loader, batches=2, seed=1).digest


def test_persistent_workers_of_the_loader_are_left_as_they_are(heldout):
    loader = DataLoader(heldout, batch_size=8, num_workers=1, persistent_workers=True)
    mine = iter(loader)
    first = next(mine)
    HeldOutLoss(loader, batches=1)
    assert loader._iterator is mine
    assert torch.equal(next(mine)["input_ids"], heldout.blocks[8:16])
    assert torch.equal(first["input_ids"], heldout.blocks[:8])


def test_accelerates_loaders_are_not_made_the_active_one(heldout):
    from accelerate import Accelerator
    from accelerate.state import GradientState

    GradientState._reset_state()  # trainings of other tests that ended early leave their loader active
    loader = Accelerator(cpu=True).prepare(DataLoader(heldout, batch_size=8))
    HeldOutLoss(loader, batches=2)
    assert GradientState().active_dataloader is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heldout": []}, "'heldout' yields no batches"),
        ({"heldout": {"code": []}}, "'code' yields no batches"),
        ({"heldout": [{"labels": torch.zeros(1, 8).long()}]}, "at least 2 different sequences"),
        ({"heldout": [{"labels": torch.zeros(4, 8).long()}]}, "at least 2 different sequences"),
        ({"heldout": [{"labels": torch.arange(8)}], "report_only": ["law"]}, "report_only=\\['law'\\]"),
        ({"heldout": [{"labels": torch.arange(8)}], "report_only": ["heldout"]}, "leaves no domain"),
    ],
)
def test_nothing_to_hold_out_is_a_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        HeldOutLoss(**arguments)


def test_what_is_no_loader_is_a_clear_error(heldout):
    with pytest.raises(TypeError, match="is a Blocks, a Dataset: wrap it in a DataLoader"):
        HeldOutLoss(heldout)
    with pytest.raises(TypeError, match="is a int: give an iterable"):
        HeldOutLoss({"code": 5})
    with pytest.raises(TypeError, match="nll='loss'"):
        HeldOutLoss([{}], nll="loss")


def test_a_batch_the_default_cannot_read_names_the_way_out(heldout):
    with pytest.raises(TypeError, match="pass nll="):
        HeldOutLoss([heldout.blocks]).evaluate(tiny_llama(), "report")
    with pytest.raises(TypeError, match=r"no \.loss.*pass nll="):
        HeldOutLoss([{"input": torch.randn(4, 2), "labels": torch.arange(4)}]).evaluate(Silent(), "report")


class Silent(nn.Module):
    def forward(self, **batch):
        return {"logits": batch["input"]}


class Gradient:
    """What makes gradients in the merge weights of those in the model's own weights."""

    def __init__(self, weights, project):
        self.clear_gradient, self.add_gradient = weights.clear_gradient, weights.add_gradient
        self.weights, self.project = weights, project

    def projected(self):
        return (yield from self.project((yield from self.weights.gradient())))


def gradient_of(loss, model, window, project):
    gradient = Gradient(weights_in(model, window, 0, Parking(torch.device("cpu"), window.processes)), project)

    def ready(gradients):
        return isolated(model, gradients=gradients)

    return finish(loss.search_pieces(model, ready, range(loss.parts), gradient=gradient))


def test_the_gradient_is_that_of_the_token_weighted_loss_and_leaves_no_trace(heldout):
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    window = CheckpointWindow(model, 2)
    loss = HeldOutLoss(ragged_batches(heldout))
    fired = []
    parameter = model.model.layers[0].mlp.up_proj.weight
    parameter.register_hook(lambda gradient: fired.append("hook"))
    parameter.register_post_accumulate_grad_hook(lambda p: fired.append("post"))  # an optimizer in backward would step
    parameter.grad = torch.full_like(parameter, 3.0)
    held = parameter.grad
    flat = []

    def kept(row):
        flat.append(row.clone())
        return np.zeros(1)
        yield

    found, parts = gradient_of(loss, model, window, kept)
    gradient = sum(flat) / parts.tokens.sum()
    assert found.loss == pytest.approx(loss.evaluate(model, "search").loss, abs=1e-6)
    assert fired == []
    assert parameter.grad is held
    assert torch.equal(held, torch.full_like(parameter, 3.0))
    assert model.model.layers[0].mlp.up_proj.weight is parameter
    # Against finite differences in the direction of the gradient and in a random one.
    double = tiny_llama().double()
    double.load_state_dict(model.state_dict())
    double.model.embed_tokens.requires_grad_(False)
    tensors = window.layout.tensors(double)
    for direction in (gradient.double(), torch.randn(window.layout.numel, dtype=torch.float64)):
        direction /= direction.norm()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for slot, tensor in zip(window.layout.slots, tensors):
                    tensor.add_(sign * 1e-2 * direction[slot.offset : slot.offset + slot.numel].view(slot.shape))
                values.append(loss.evaluate(double, "search").loss)
                double.load_state_dict(model.state_dict())
        assert (values[0] - values[1]) / 2e-2 == pytest.approx(float(gradient.double() @ direction), abs=1e-3)
    # And the gradient of the loss with respect to merge weights, which is what it is for.
    window.push(model, 1)
    with torch.no_grad():
        parameter.mul_(4.0)
    window.push(model, 2)

    def merged(weight):
        with installed(window.layout, model, window.combine([1 - weight, weight])):
            return loss.evaluate(model, "search").loss

    with installed(window.layout, model, window.combine([0.5, 0.5])):
        _, parts = gradient_of(loss, model, window, window.project_pieces)
    slope = parts.of(frozenset(["heldout"]))
    assert slope[1] - slope[0] == pytest.approx((merged(0.51) - merged(0.49)) / 0.02, rel=2e-2)
    np.testing.assert_allclose(window.gram()[0, 0], float((3.0 / 4.0 * parameter.detach()).square().sum()), rtol=1e-4)


@pytest.mark.parametrize("by_sequence", [True, False])
def test_shares_of_ranks_become_the_batches_of_one_process(by_sequence):
    sequences = torch.arange(46).view(23, 2)
    # Samplers give every rank as many: a sequence, or a batch, is repeated.
    if by_sequence:
        dealt = torch.cat([sequences, sequences[:1]])
        shares = [[{"ids": batch} for batch in dealt[rank::3].split(4)] for rank in range(3)]
    else:
        batches = [{"ids": batch} for batch in sequences.split(4)]
        shares = [[*batches[rank::4], *batches[:1]][:2] for rank in range(4)]
    merged = merge_shares(shares, 6, by_sequence=by_sequence)
    assert [batch["ids"].tolist() for batch in merged] == [batch.tolist() for batch in sequences.split(4)]
    assert [batch["ids"].tolist() for batch in merge_shares(shares, 2, by_sequence=by_sequence)] == [
        batch.tolist() for batch in sequences[:8].split(4)
    ]


def test_shares_of_ranks_keep_sequences_of_different_lengths_apart():
    ragged = [[(torch.zeros(2, 5), torch.ones(2))], [(torch.ones(2, 7), torch.ones(2))]]
    ragged[0][0][0][1] = 1.0
    ragged[1][0][0][1] = 2.0
    merged = merge_shares(ragged, 2, by_sequence=True)
    assert [tuple(batch[0].shape) for batch in merged] == [(2, 5), (2, 7)]
    # What cannot be cut into sequences is kept whole, and once.
    whole = {"a": torch.zeros(2, 3), "b": torch.zeros(3)}
    other = {"a": torch.ones(2, 3), "b": torch.zeros(3)}
    assert len(merge_shares([[whole], [other], [whole]], 9, by_sequence=True)) == 2


def test_time_major_batches_are_refused(heldout):
    def time_major(items):
        return {"input_ids": torch.stack([item["input_ids"] for item in items], dim=1)}

    with pytest.raises(ValueError, match=r"shape \(32, \d\) of \d sequences: time-major batches cannot be cut"):
        HeldOutLoss(DataLoader(heldout, 8, collate_fn=time_major), nll=lambda model, batch: (1.0, 1))
    HeldOutLoss(DataLoader(heldout, 32), nll=lambda model, batch: (1.0, 1))  # as long as it is wide
