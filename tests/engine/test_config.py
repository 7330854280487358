"""Bad configuration fails at once, and says what would be right."""

import subprocess
import sys

import pytest

from traj_merge_callback import MergeConfig, TrajectoryMerger


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 1}, "window_size=1: must be at least 2"),
        ({"capture_every": 0}, "capture_every=0: must be at least 1"),
        ({"capture_every": 50, "merge_every": 20}, "the nearest multiple is merge_every=50"),
        ({"capture_every": 50, "merge_every": 130}, "the nearest multiple is merge_every=150"),
        ({"evaluations": 1}, "evaluations=1: must be at least 2"),
        ({"search": "bayes"}, "search='bayes' is not one of"),
        ({"search": "ema", "search_options": {"decay": 3.0}}, "decay=3.0"),
        ({"search_fraction": 1.0}, "search_fraction=1.0"),
        ({"dtype": "float16"}, "dtype='float16' is not one of"),
        ({"on_error": "ignore"}, "on_error='ignore' is not one of"),
        ({"schedule": "later"}, "schedule='later' is not one of"),
        ({"window_storage": "cloud"}, "window_storage='cloud' is not one of"),
        ({"max_pause": 0.0}, "max_pause=0.0: must be a positive number"),
        ({"max_overhead": 0.0}, "max_overhead=0.0: must be a share of wall time above 0"),
        ({"max_overhead": 2.0}, "max_overhead=2.0: must be a share of wall time above 0"),
        ({"schedule": "background"}, "schedule='background' was removed; take 'interleaved'"),
        ({"row": "mean", "samples_per_row": 0}, "samples_per_row=0: must be from 1 to capture_every=50"),
        ({"row": "first"}, "row='first' is not one of"),
        ({"row": "mean", "samples_per_row": 7}, "samples_per_row=7 does not divide capture_every=50"),
        ({"row": "mean", "samples_per_row": 5, "search": "bema"}, "row='mean' does not go with search='bema'"),
        ({"search_options": {"space": "ball"}}, "space='ball' is not one of"),
        ({"groups": "layers"}, "groups='layers': must be None, 'blocks', or a dict"),
        ({"groups": "blocks", "evaluations": 6}, "evaluations=6: groups take 5 of them"),
        ({"objective": "best"}, "objective='best' is not one of"),
        ({"domain_weights": {"a": -1.0}}, "domain_weights={'a': -1.0}: must be at least 0"),
        ({"domain_weights": {"a": 1.0}, "objective": "worst"}, "are for objective='mean'"),
        ({"tolerance": -0.1}, "tolerance=-0.1: must be at least 0"),
        ({"keep_last": 0, "keep_best": False, "load_merged_at_end": True}, "load_merged_at_end=True needs snapshots"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MergeConfig(**options)
    with pytest.raises(ValueError, match=message):
        TrajectoryMerger([], **options)


@pytest.mark.parametrize(
    "options",
    [
        {"window_size": "8"},
        {"merge_every": 1.5},
        {"keep_best": 1},
        {"report_only": "law"},
        {"search": None},
        {"groups": 3},
        {"groups": {"first": "model.layers.0.*"}},
    ],
)
def test_bad_types_are_named(options):
    (name,) = options
    with pytest.raises(TypeError, match=name):
        MergeConfig(**options)
    with pytest.raises(TypeError, match="no_such_option"):
        MergeConfig(no_such_option=1)
    with pytest.raises(TypeError, match="eval_device='cuda:1': this option was removed with schedule='background'"):
        MergeConfig(eval_device="cuda:1")


def test_both_callbacks_take_exactly_the_options_of_the_engine():
    from traj_merge_callback.lightning import TrajMergeCallback as Lightning
    from traj_merge_callback.transformers import TrajMergeCallback as Transformers

    options = {**vars(MergeConfig()), "window_size": 3, "search": "wsm"}
    for callback in (Lightning, Transformers):
        assert callback(**options).config == MergeConfig(**options)
        with pytest.raises(ValueError, match="window_size=1"):
            callback(window_size=1)


IMPORTS = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lightning", "transformers", "accelerate", "matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import traj_merge_callback
for trainer in ("lightning", "transformers"):
    try:
        __import__(f"traj_merge_callback.{trainer}")
    except ImportError as error:
        print(error)
"""


def test_the_package_needs_no_trainer_and_adapters_name_their_extra():
    found = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True).stdout
    assert "pip install 'traj-merge-callback[lightning]'" in found
    assert "pip install 'traj-merge-callback[transformers]'" in found


def test_importing_is_light():
    code = (
        "import sys, traj_merge_callback; print({'skopt', 'sklearn', 'transformers', 'lightning'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize(("capture_every", "samples"), [(50, 5), (48, 8), (7, 7), (11, 1), (1, 1), (1000, 8)])
def test_a_mean_row_has_as_many_samples_as_divide_its_interval(capture_every, samples):
    assert MergeConfig(row="mean", capture_every=capture_every, merge_every=capture_every).samples == samples
    assert MergeConfig(row="last", capture_every=capture_every, merge_every=capture_every).samples == 1


@pytest.mark.parametrize(
    ("merge_every", "interval", "samples"),
    [(1, 1, 1), (7, 1, 1), (20, 2, 2), (100, 10, 5), (500, 50, 7), (997, 997, 7), (3_000_000, 300_000, 8)],
)
def test_without_intervals_a_row_comes_every_tenth_of_a_merge_and_has_samples(merge_every, interval, samples):
    config = MergeConfig(merge_every=merge_every)
    assert (config.row_kind, config.num_rows, config.capture_interval) == ("multiscale", 6, interval)
    assert config.samples == samples
    recipe = MergeConfig(merge_every=merge_every, search="lawa")
    assert (recipe.row_kind, recipe.num_rows, recipe.samples) == ("last", 8, 1)
