"""One bad thing costs the merge that it happens at, and no later one."""

import math

import pytest
from conftest import nll_without_gradients, same_weights, tiny_llama, train_steps, warnings_of
from test_merger import engine
from torch.utils.data import DataLoader

from traj_merge_callback.evaluate.language_model import language_model_nll


@pytest.fixture
def loader(heldout):
    return DataLoader(heldout, batch_size=8, shuffle=True)


def test_auto_takes_gradients_and_goes_on_without_them_where_there_are_none(loader, train, tmp_path, caplog):
    for folder, nll in (("with", None), ("without", nll_without_gradients)):
        plain = train_steps(tiny_llama(), train, 32)
        model = tiny_llama()
        merger = engine(loader, tmp_path / folder, nll=nll, on_error="raise")
        train_steps(model, train, 32, lambda step, merger=merger, model=model: merger.step(model, step))
        assert same_weights(plain, model)
        for record in merger.records:
            assert record.evaluations >= 3
            assert record.forward_equivalents <= 9
            assert record.search_losses["merged"] <= record.search_losses["live"]
        # A merge with gradients and without a race has fewer candidates than passes.
        assert any(one.forward_equivalents > one.evaluations for one in merger.records) == (nll is None)
    said = [record.message for record in caplog.records if "could not search with gradients" in record.message]
    assert len(said) == 2
    assert "the next merge tries it again" in said[0]
    assert "at 3 merges in a row, and is not tried again" in said[1]


def test_a_gradient_that_could_not_be_had_once_is_taken_at_the_next_merge(loader, train, tmp_path, caplog):
    model = tiny_llama()
    merger = engine(loader, tmp_path, on_error="raise")

    def fail(gradient):
        raise MemoryError("no memory left")

    def fail_in_backward(module, args, output):
        if output.requires_grad:
            output.register_hook(fail)

    def each(step):
        hook = model.model.norm.register_forward_hook(fail_in_backward) if step == 8 else None
        merger.step(model, step)
        if hook is not None:
            hook.remove()

    train_steps(model, train, 16, each)
    assert [record.step for record in merger.records] == [8, 16]
    assert [one.forward_equivalents > one.evaluations for one in merger.records] == [False, True]
    (said,) = [record.message for record in caplog.records if "could not search with gradients" in record.message]
    assert "MemoryError: no memory left" in said
    assert "the next merge tries it again" in said


def test_groups_go_without_where_there_are_no_gradients(loader, train, tmp_path, caplog):
    model = tiny_llama()
    options = {
        "search": "reach",
        "groups": "blocks",
        "evaluations": 14,
        "on_error": "raise",
        "nll": nll_without_gradients,
    }
    merger = engine(loader, tmp_path, **options)
    train_steps(model, train, 16, lambda step: merger.step(model, step), lr=1e-2)
    assert [record.search for record in merger.records] == ["reach"] * 2
    assert any(record.gain for record in merger.records)
    assert all(record.group_weights == {} for record in merger.records)
    assert caplog.text.count("merge weights by parameter group need gradients") == 1


def test_a_sequence_whose_loss_is_not_finite_is_left_out(loader, heldout, train, tmp_path, caplog):
    """One of each split, the second from step 10 on."""
    splits = {}
    merger = engine(loader, tmp_path, on_error="raise")
    for split in ("search", "report"):
        batch = merger.heldout._batches[split][1].data["input_ids"]
        splits[split] = batch[0]
    merger.close()
    step_now = 0

    def nll(model, batch):
        total, tokens = language_model_nll(model, batch)
        bad = [splits["search"]] + ([splits["report"]] if step_now >= 10 else [])
        if any((batch["input_ids"] == one).all(dim=1).any() for one in bad):
            total = total * math.nan
        return total, tokens

    plain, model = train_steps(tiny_llama(), train, 24), tiny_llama()
    merger = engine(loader, tmp_path / "again", nll=nll, on_error="raise")
    counts = []

    def each(step):
        nonlocal step_now
        step_now = step
        if merger.step(model, step):
            sizes = {split: merger.heldout._batches[split] for split in splits}
            counts.append([sum(len(one.data["input_ids"]) for one in batches) for batches in sizes.values()])

    train_steps(model, train, 24, each)
    assert same_weights(plain, model)
    assert [record.step for record in merger.records] == [8, 16, 24]
    assert all(math.isfinite(record.merged_loss) for record in merger.records)
    assert counts[1] == [counts[0][0], counts[0][1] - 1]
    assert counts[2] == counts[1]
    said = [line for line in warnings_of(caplog) if "left out from now on" in line]
    assert ["search" in line for line in said] == [True, False]


def test_a_model_whose_loss_is_not_finite_anywhere_loses_no_sequences(loader, train, tmp_path, caplog):
    good = False

    def nll(model, batch):
        total, tokens = language_model_nll(model, batch)
        return total if good else total * math.nan, tokens

    model = tiny_llama()
    merger = engine(loader, tmp_path, nll=nll)

    def each(step):
        nonlocal good
        good = step > 10
        merger.step(model, step)

    train_steps(model, train, 16, each)
    assert [record.step for record in merger.records] == [16]
    assert not any("left out" in line for line in warnings_of(caplog))
