"""A merge under way where the device has no room for it beside training."""

import logging
import sys

import pytest
import torch
from conftest import same_weights, tiny_llama, train_steps
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from traj_merge_callback import CheckpointWindow, TrajectoryMerger, read_merge
from traj_merge_callback.evaluate.parking import Parking
from traj_merge_callback.window import devices

OPTIONS = {"window_size": 4, "capture_every": 2, "merge_every": 12, "evaluations": 8, "heldout_batches": 8}
INTERLEAVED = {"schedule": "interleaved", "max_overhead": None, "max_pause": 1e-6, "progress": False}


def held_on_the_device(merger):
    """Bytes of the merge under way's tensors that stay on the device while training goes on."""
    parking = merger._schedule._merge.parking
    return sum(tensor.untyped_storage().nbytes() for tensor, _ in parking._held)


@pytest.fixture
def merges(heldout, train, tmp_path, monkeypatch):
    # As on a GPU, each merge has a row of its own.
    monkeypatch.setattr(CheckpointWindow, "staging_on", lambda self, device: torch.empty(self.layout.numel))

    def run(name, **options):
        model, held = tiny_llama(), []
        loader = DataLoader(heldout, batch_size=1)
        folder = str(tmp_path / name)
        merger = TrajectoryMerger(
            loader, **{**OPTIONS, **INTERLEAVED, "output_dir": folder, "on_error": "raise", "keep_last": 9, **options}
        )

        def step_taken(step):
            run.step = step
            merger.step(model, step)
            if merger._schedule.under_way:
                held.append(held_on_the_device(merger))

        train_steps(model, train, 60, step_taken)
        merger.finish(model)
        return model, merger.records, held

    return run


@pytest.mark.parametrize("options", [{}, {"row": "mean", "samples_per_row": 2}], ids=["last", "mean"])
def test_where_memory_is_tight_a_merge_leaves_the_device_to_training_and_stays_the_same(
    merges, monkeypatch, caplog, options
):
    model, records, _ = merges("roomy", **options)
    monkeypatch.setattr(devices, "free_memory", lambda device: (1e5, 1e6))
    with caplog.at_level(logging.WARNING):
        other, others, held = merges("tight", **options)
    assert same_weights(model, other)
    assert held
    assert sum(held) == 0
    assert len([line for line in caplog.messages if "training leaves 0.0001 GB" in line]) == 1
    assert len(others) >= 2
    # When later merges begin depends on how long the files of the first took.
    one, two = records[0], others[0]
    assert one.finished_step > one.step
    assert (one.step, one.weights, one.merged_loss) == (two.step, two.weights, two.merged_loss)
    saved, again = (AutoModelForCausalLM.from_pretrained(record.snapshot) for record in (one, two))
    assert same_weights(saved, again)
    merges = [read_merge(record.snapshot) for record in (one, two)]
    for merge in merges:
        del merge["run"], merge["checksum"]  # which differ from run to run
    assert merges[0] == merges[1]


def test_where_memory_is_tight_each_pause_ends_with_an_empty_cache(merges, monkeypatch):
    emptied = set()
    monkeypatch.setattr(devices, "free_memory", lambda device: (1e5, 1e6))
    monkeypatch.setattr(devices, "empty_cache", lambda device: emptied.add(merges.step))
    _, records, _ = merges("tight")
    pauses = {step for record in records for step in range(record.step + 1, record.finished_step + 1)}
    assert len(pauses) > len(records) >= 2
    assert pauses <= emptied


def test_with_room_nothing_is_moved(merges, monkeypatch, caplog):
    monkeypatch.setattr(devices, "free_memory", lambda device: (1e9, 2e9))
    monkeypatch.setattr(devices, "empty_cache", lambda device: pytest.fail("the cache was emptied"))
    with caplog.at_level(logging.WARNING):
        merges("roomy")
    assert not [line for line in caplog.messages if "training leaves" in line]


def test_what_a_merge_has_kept_counts_as_free_for_the_next(merges, monkeypatch, caplog):
    # torch's allocator does not give memory back: after the first merge only 5 % and a little are left.
    left = iter([1e9])
    monkeypatch.setattr(devices, "free_memory", lambda device: (next(left, 6e7), 1e9))
    with caplog.at_level(logging.WARNING):
        _, records, _ = merges("roomy")
    assert len(records) >= 2
    assert not [line for line in caplog.messages if "training leaves" in line]


def test_a_device_that_has_no_room_left_ends_the_merge_and_not_the_run(merges, monkeypatch, caplog):
    plain, _, _ = merges("roomy")
    monkeypatch.setattr(devices, "free_memory", lambda device: (1e5, 1e6))

    def no_room(self):
        failures.append(merges.step)
        raise torch.OutOfMemoryError("CUDA out of memory")

    failures, emptied = [], []
    monkeypatch.setattr(Parking, "bring_back", no_room)
    monkeypatch.setattr(devices, "empty_cache", lambda device: emptied.append((merges.step, sys.exc_info()[1])))
    with caplog.at_level(logging.WARNING):
        model, _, _ = merges("full", on_error="warn", merge_at_end=False)
    assert same_weights(plain, model)
    failed = [line for line in caplog.messages if "CUDA out of memory" in line and "Training goes on" in line]
    assert len(failed) == 1
    # An exception that is still handled holds the tensors of the frames that it passed.
    assert failures
    assert {(step, None) for step in failures} <= set(emptied)
