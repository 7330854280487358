"""The progress bar of a merge."""

import io

import pytest
from conftest import tiny_llama, train_steps
from tqdm.auto import tqdm

from traj_merge_callback import TrajectoryMerger

OPTIONS = {"window_size": 4, "capture_every": 1, "merge_every": 4, "heldout_batches": 4, "on_error": "raise"}
SPREAD = {"schedule": "interleaved", "max_pause": 1e-6}


@pytest.mark.parametrize(
    "options",
    [
        {"evaluations": 9},
        {"evaluations": 30, "search": "ema"},  # a recipe ends after two of them
        {"evaluations": 14, "groups": "blocks"},
        {"evaluations": 9, **SPREAD},  # most of it is done between steps
    ],
)
def test_it_starts_at_0_and_ends_at_100_percent_however_early_the_search_stops(
    tmp_path, loader, train, monkeypatch, options
):
    drawn: list[list[tuple[int, int]]] = []

    class Bar(tqdm):
        def __init__(self, **options):
            drawn.append([])
            super().__init__(**{**options, "delay": 0, "mininterval": 0, "file": io.StringIO()})

        def refresh(self, *args, **kwargs):
            drawn[-1].append((self.n, self.total))
            return super().refresh(*args, **kwargs)

        def close(self):
            drawn[-1].append((self.n, self.total))
            super().close()

    monkeypatch.setattr("traj_merge_callback.engine.schedule.tqdm", Bar)
    model = tiny_llama()
    with TrajectoryMerger(loader, output_dir=tmp_path, **{"schedule": "blocking", **OPTIONS, **options}) as merger:
        train_steps(model, train, 9, lambda step: merger.step(model, step))
        merger.finish(model)
        assert len(merger.records) >= 2
    assert drawn
    for bar in drawn:
        counts, totals = zip(*bar)
        assert counts[0] == 0
        assert counts[-1] == totals[-1] > 0
        assert list(counts) == sorted(counts)


@pytest.mark.parametrize("search", ["auto", "regmean"])
def test_the_last_that_is_drawn_is_100_percent(tmp_path, loader, train, monkeypatch, capfd, search):
    monkeypatch.setattr("traj_merge_callback.engine.schedule._PATIENCE_S", 0.0)
    model, options = tiny_llama(), {"schedule": "blocking", "search": search, "evaluations": 12, **OPTIONS}
    with TrajectoryMerger(loader, output_dir=tmp_path, **options) as merger:
        train_steps(model, train, 4, lambda step: merger.step(model, step))
    drawn = [one for one in capfd.readouterr().err.split("\r") if "merging at step 4" in one]
    assert "  0%" in drawn[0]
    assert "100%" in drawn[-1]
