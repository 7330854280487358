"""Memory that runs out in a merge: it is made with smaller held-out batches, or left out, and training sees nothing."""

import gc

import numpy as np
import pytest
import torch
from conftest import AT_ONCE, same_weights, tiny_llama, train_steps, warnings_of
from torch.utils.data import DataLoader

import realtext
from traj_merge_callback import TrajectoryMerger
from traj_merge_callback.evaluate.language_model import language_model_nll
from traj_merge_callback.window import products

OPTIONS = {"window_size": 4, "capture_every": 2, "merge_every": 8, "evaluations": 5, "heldout_batches": 5}
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8589934592 bytes."),
    MemoryError(),
]


@pytest.fixture(scope="module")
def merged(text, tmp_path_factory):
    train, heldout = realtext.Blocks(text[0][:400]), realtext.Blocks(text[1][:80])

    def run(steps=16, **options):
        folder = tmp_path_factory.mktemp("merged")
        options = {**OPTIONS, **AT_ONCE, "progress": False, "output_dir": str(folder), **options}
        merger, model = TrajectoryMerger(DataLoader(heldout, batch_size=16), **options), tiny_llama()
        train_steps(model, train, steps, lambda step: merger.step(model, step))
        merger.finish(model)
        return model, merger.records

    return run


@pytest.fixture(scope="module")
def expected(merged):
    """The model of a run with enough memory, which is that of a run without merges, and its records."""
    return merged()


class Limited:
    """The loss of a language model, and of passes that have more sequences than fit into memory an exception."""

    def __init__(self, error, most, *, backward=False):
        self.error, self.most, self.backward = error, most, backward
        self.failed = 0

    def fail(self, *_):
        self.failed += 1
        raise self.error

    def __call__(self, model, batch):
        nll, tokens = language_model_nll(model, batch)
        sequences = len(batch["input_ids"])
        if sequences > self.most and not self.backward:
            self.fail()
        if sequences > self.most and nll.requires_grad:
            nll.register_hook(self.fail)
        return nll, tokens


@pytest.mark.parametrize(("error", "backward"), zip(ERRORS, [False, True, True], strict=True), ids=["0", "1", "2"])
def test_a_held_out_pass_that_is_too_large_is_made_smaller_for_good(merged, expected, caplog, error, backward):
    nll, failed = Limited(error, 1, backward=backward), []
    log = lambda record: failed.append(nll.failed)  # noqa: E731
    model, records = merged(nll=nll, log=log, on_error="raise")
    assert same_weights(expected[0], model)
    assert [record.step for record in records] == [8, 16]
    assert [record.live_loss for record in records] == pytest.approx([one.live_loss for one in expected[1]], abs=1e-6)
    # Batches of 4 sequences became 2, and then 1: the second merge did not fail first. The pass before training, which
    # takes no gradients, changes nothing.
    before_training = 0 if backward else 1
    assert failed == [before_training + 2] * 2
    (said,) = warnings_of(caplog)
    assert "memory ran out in a held-out pass of 4 sequences" in said
    assert "from now on one has 1 at most" in said
    # Their gradients could be had.
    assert all(record.forward_equivalents > record.evaluations for record in records)


def test_a_trial_before_the_first_merge_makes_passes_smaller_too(merged, expected, caplog):
    nll = Limited(ERRORS[0], 2)
    model, records = merged(nll=nll, schedule="interleaved", merge_at_end=False)
    assert same_weights(expected[0], model)
    assert records
    assert nll.failed == 2  # once before training, and once in the trial
    assert len(warnings_of(caplog)) == 1


def test_where_not_even_one_sequence_fits_merges_are_left_out_with_one_warning(merged, expected, caplog):
    nll = Limited(ERRORS[1], 0)
    model, records = merged(nll=nll)
    assert same_weights(expected[0], model)
    assert records == []
    said, total = warnings_of(caplog)
    assert "trajectory merging failed: RuntimeError: [enforce fail]" in said
    assert "2 failures while merging" in total


def without_memory(monkeypatch, product, times):
    """Let a product find no memory so many times."""
    compute, failures = getattr(products, product), iter(range(times))

    def short_of_memory(*arguments):
        if next(failures, None) is not None:
            np.empty(2**50)  # which has an exception of its own
        compute(*arguments)

    monkeypatch.setattr(products, product, short_of_memory)
    return failures


@pytest.mark.parametrize("product", ["combine", "project"])
def test_a_product_is_tried_once_more(merged, expected, monkeypatch, product):
    left = without_memory(monkeypatch, product, 1)
    _, records = merged(steps=8, on_error="raise")
    assert not list(left)
    assert records[0].merged_loss == expected[1][0].merged_loss


def test_where_a_product_never_has_memory_merges_are_left_out_with_one_warning(merged, expected, monkeypatch, caplog):
    without_memory(monkeypatch, "combine", 10**9)
    model, records = merged(search="reach")
    assert same_weights(expected[0], model)
    assert records == []
    said, total = warnings_of(caplog)
    assert "trajectory merging failed: MemoryError: Unable to allocate" in said
    assert "2 failures while merging" in total


def test_what_a_failed_attempt_took_is_free_before_the_next_one(merged):
    """Without waiting for the garbage collector: on a GPU it does not know that memory is short."""
    taken = []

    class Activations:
        alive = 0

        def __init__(self):
            Activations.alive += 1

        def __del__(self):
            Activations.alive -= 1

    def nll(model, batch):
        taken.append(Activations.alive)
        activations = Activations()
        if len(batch["input_ids"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        del activations
        return language_model_nll(model, batch)

    gc.disable()
    try:
        _, records = merged(steps=8, nll=nll)
    finally:
        gc.enable()
    assert records
    assert set(taken) == {0}
