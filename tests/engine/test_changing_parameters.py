"""Parameters that are frozen, thawed, replaced or resized while training: a new window each time, said in one line."""

import pytest
import torch
from conftest import AT_ONCE, same_weights, tiny_llama, train_steps
from torch import nn
from torch.utils.data import DataLoader

import realtext
from traj_merge_callback import TrajectoryMerger, load_merged

OPTIONS = {"window_size": 4, "capture_every": 2, "merge_every": 8, "heldout_batches": 4, "evaluations": 5}
OPTIONS |= {"on_error": "raise", "progress": False, "keep_last": 9, "search": "lawa"} | AT_ONCE


def freeze(model, frozen=True):
    model.model.layers[0].requires_grad_(not frozen)


def replace(model):
    with torch.random.fork_rng():
        model.model.norm.weight = nn.Parameter(model.model.norm.weight.detach().clone())


def resize(model):
    with torch.random.fork_rng():
        model.resize_token_embeddings(realtext.VOCABULARY + 8)


def run(blocks, change, at, steps=20, each=lambda model, step: None):
    model = tiny_llama()
    if change is freeze and at is not None:
        freeze(model)

    def changing(step):
        each(model, step)
        if step == at:
            freeze(model, False) if change is freeze else change(model)

    # SGD without a state, over all parameters that there are at a step.
    for step in range(1, steps + 1):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train_steps(model, blocks, 1, changing, start=step - 1, optimizer=optimizer)
    return model


@pytest.mark.parametrize(
    ("change", "windows", "options"),
    [
        (freeze, 2, {}),
        (freeze, 2, {"schedule": "interleaved", "max_overhead": 0.9, "search": "auto"}),
        (freeze, 2, {"window_storage": "disk"}),
        (resize, 2, {"row": "mean", "samples_per_row": 2, "dtype": "int8"}),
        (resize, 2, {"search": "bema"}),
        (replace, 1, {}),
    ],
)
def test_merging_goes_on_with_a_new_window(train, heldout, tmp_path, caplog, change, windows, options):
    plain = run(train, change, 9)
    merger = TrajectoryMerger(DataLoader(heldout, 8), output_dir=str(tmp_path), **{**OPTIONS, **options})
    model = run(train, change, 9, each=merger.step)
    merger.finish(model)
    assert same_weights(plain, model)
    assert caplog.text.count("merging goes on with a new window") == windows - 1
    assert "failed" not in caplog.text
    last = merger.records[-1]
    assert last.step == 20
    assert min(last.checkpoint_steps) > (9 if windows == 2 else 0)
    assert len(last.checkpoint_steps) > 1
    load_merged(last.snapshot, model)


def test_gradual_freezing_of_everything_only_pauses_merging(train, heldout, tmp_path, caplog):
    options = {**OPTIONS, "on_error": "warn"}
    merger = TrajectoryMerger(DataLoader(heldout, 8), output_dir=str(tmp_path), **options)
    model = tiny_llama()
    for step in range(1, 33):
        model.requires_grad_(step < 9 or step > 16)
        merger.step(model, step)
    merger.close()
    assert [record.step for record in merger.records] == [8, 24, 32]
    assert caplog.text.count("there is nothing to merge (step") == 1
    assert min(merger.records[1].checkpoint_steps) == 18


def test_the_merge_at_the_end_counts_as_overhead(train, heldout, tmp_path):
    merger = TrajectoryMerger(DataLoader(heldout, 8), output_dir=str(tmp_path), **{**OPTIONS, "merge_every": 1000})
    model = tiny_llama()
    train_steps(model, train, 4, lambda step: merger.step(model, step))
    record = merger.merge_at_end(model)
    assert record.seconds > 0
    assert record.overhead * merger._overhead.wall_s >= record.seconds
    merger.close()


def test_a_blocking_merge_counts_in_its_own_record(train, heldout, tmp_path):
    merger = TrajectoryMerger(DataLoader(heldout, 8), output_dir=str(tmp_path), **{**OPTIONS, "merge_every": 4})
    model = tiny_llama()
    train_steps(model, train, 4, lambda step: merger.step(model, step))
    (record,) = merger.records
    assert record.overhead * merger._overhead.wall_s >= record.seconds
    merger.close()
