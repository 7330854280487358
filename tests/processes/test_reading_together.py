"""Ranks hold out the same sequences, those of one process, whatever share of them their loaders draw."""

import json

import pytest
from test_distributed import run_ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reading")
    for processes in (1, 2):
        run_ranks("reading.py", processes, str(folder))
    return [json.loads((folder / f"found-{name}.json").read_text()) for name in ("0-of-1", "0-of-2", "1-of-2")]


@pytest.mark.parametrize(
    "name", ["all", "distributed, shuffled False", "distributed, shuffled True", "accelerate", "some"]
)
def test_ranks_hold_out_what_one_process_does(found, name):
    one, first, second = (results[name] for results in found)
    assert first == second == one
    assert len(one["search"]) == len(one["report"]) == 32


def test_a_sampler_that_draws_a_share_of_some_sequences_is_put_together(found):
    one, first, second = (results["some, by Lightning"] for results in found)
    assert first == second
    assert {split: first[split] for split in ("search", "report")} == {
        split: found[0]["some"][split] for split in ("search", "report")
    }
    assert one["digest"] == found[0]["some"]["digest"]


@pytest.mark.parametrize("name", ["dealt by hand", "a part each", "iterables", "only one has indices"])
def test_data_of_each_rank_are_shared(found, name):
    _, first, second = (results[name] for results in found)
    assert first == second
    search, report = set(first["search"]), set(first["report"])
    assert not search & report
    assert min(len(search), len(report)) >= 15
    if name == "a part each":
        assert all(min(split) < 500 <= max(split) for split in (search, report))
    if name == "dealt by hand":
        assert {number % 2 for number in search} == {number % 2 for number in report} == {0, 1}
