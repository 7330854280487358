"""A merge at every ``merge_every``, as asked for; what that costs is said once, and a budget still limits it."""

import logging
import re

import pytest
from conftest import tiny_llama, train_steps
from torch.utils.data import DataLoader

from traj_merge_callback import TrajectoryMerger

OPTIONS = {"capture_every": 5, "merge_every": 10, "heldout_batches": 2, "evaluations": 6, "progress": False}


def trained(train, heldout, tmp_path, **options):
    model = tiny_llama()
    options = {**OPTIONS, "output_dir": str(tmp_path), **options}
    merger = TrajectoryMerger(DataLoader(heldout, batch_size=8), **options)
    train_steps(model, train, 45, lambda step: merger.step(model, step))
    merger.finish(model)
    return merger.records


@pytest.mark.parametrize(
    ("row", "schedule"), [(row, "interleaved") for row in ("last", "mean", "multiscale")] + [("multiscale", "blocking")]
)
def test_every_merge_asked_for_is_made_of_rows_up_to_its_step(train, heldout, tmp_path, row, schedule):
    records = trained(train, heldout, tmp_path, row=row, schedule=schedule)
    assert [record.step for record in records] == [10, 20, 30, 40, 45]
    for record in records:
        assert record.row_spans[-1][1] == record.step
        assert record.finished_step <= record.step + 10


def test_what_much_overhead_means_is_said_once_and_a_limit_makes_merges_wait(train, heldout, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "traj_merge_callback"):
        trained(train, heldout, tmp_path / "without", schedule="blocking")
    (said,) = [record.getMessage() for record in caplog.records]
    share, every = re.search(r"merges take (\d+) % .* merge_every=(\d+)", said).groups()
    assert int(share) > 5
    assert int(every) > 10
    assert int(every) % 5 == 0
    assert "max_overhead=0.02" in said
    caplog.clear()
    records = trained(train, heldout, tmp_path / "with", max_overhead=0.02)
    assert [record.step for record in records] == [45]
    assert "merges take" not in caplog.text
