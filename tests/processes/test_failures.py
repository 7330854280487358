"""Two real processes of a trainer, one of which fails where files are written or read: all of them train on."""

import json

import pytest
from test_distributed import records, run_ranks, same_weights

WARN = {"on_error": "warn", "strategy": "ddp"}
# How a state is damaged, and what is said of it.
DAMAGES = {
    "torn": r"state.json is damaged",
    "missing": r"FileNotFoundError: ",
    "cut": r"FailedOnAllRanks: rank 1 failed: ValueError: ",
}


@pytest.mark.parametrize("trainer", ["transformers", "lightning"])
def test_saving_and_resuming_that_fail_on_one_rank_end_no_training(tmp_path, trainer):
    runs = [{"name": "plain", "merging": False}, {"name": "full", "limit": 40_000}, {"name": "panic", "panic": 9}]
    damages = DAMAGES if trainer == "transformers" else {"cut": DAMAGES["cut"]}
    for how in damages:
        runs += [{"name": how, "damage": how, "steps": 8}, {"name": f"{how}-resumed", "resume": how}]
    runs.append({"name": "plain-resumed", "resume": "cut", "merging": False})
    output = run_ranks(
        "trainers.py", 2, str(tmp_path), json.dumps([{"trainer": trainer, **WARN, **run} for run in runs])
    )
    for run in ("full", "panic"):
        assert same_weights(tmp_path / run, tmp_path / "plain"), run
    for how in damages:
        assert same_weights(tmp_path / f"{how}-resumed", tmp_path / "plain-resumed"), how
    # A disk that is full for one rank: its window is not saved, and nothing half-written stays.
    assert [record["step"] for record in records(tmp_path, "full")] == [6, 12]
    assert "saving the window failed: " in output
    assert not list((tmp_path / "full").rglob("row-*"))
    # What is no Exception is a failure too, and known on all ranks at once.
    assert [record["step"] for record in records(tmp_path, "panic")] == [12]
    assert "FailedOnAllRanks: rank 1 failed: PanicException: called `Option::unwrap()`" in output
    for how, said in damages.items():
        assert said in output
        # All ranks begin with an empty window.
        found = [records(tmp_path, f"{how}-resumed", rank) for rank in (0, 1)]
        assert [[record["checkpoint_steps"] for record in one] for one in found] == [[[10, 12, 12]]] * 2


@pytest.mark.parametrize("row", ["last", "multiscale"])
def test_what_is_not_finite_on_one_rank_is_left_out_on_all(tmp_path, row):
    output = run_ranks("not_finite.py", 2, str(tmp_path), row)
    one, two = (json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(2))
    # Rank 0 learns it when the next checkpoint is due, at the latest.
    assert one["records"] == two["records"]
    assert {8, 16, 20} <= set(one["records"])
    assert 12 not in one["records"]
    assert one["spans"]["20"] == two["spans"]["20"]
    assert all(one["spans"][step] == two["spans"][step] for step in ("8", "14", "16"))
    assert not {10, 12} & {last for _, last, _ in one["spans"]["15"]}
    assert output.count("not finite when a checkpoint was taken") == 1
    assert "windows of the ranks differ" not in output


MISFITS = [
    {"name": "plain", "merging": False},
    {"name": "misfit", "happens": "misfit", "at": [1]},
    {"name": "short", "happens": "short", "at": [1]},
]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_batch_that_fails_on_one_rank_before_training_is_known_on_all(tmp_path, strategy):
    runs = [{"strategy": strategy, "on_error": "warn", **run} for run in MISFITS]
    output = run_ranks("loop.py", 2, str(tmp_path), json.dumps(runs))
    # Nothing is merged on either rank, which rank 0 says, without a traceback.
    assert output.count("Nothing is merged. Training goes on.") == 1
    assert "rank 1 failed: ValueError: nll=nll fails on a batch of heldout" in output
    assert "Traceback" not in output
    assert [records(tmp_path, "misfit", rank) for rank in (0, 1)] == [[], []]
    # Memory that was short before training is tried again.
    assert [[record["step"] for record in records(tmp_path, "short", rank)] for rank in (0, 1)] == [[6, 12]] * 2
    for run in ("misfit", "short"):
        assert same_weights(tmp_path / run, tmp_path / "plain")


def test_memory_that_is_short_in_one_process_is_known_in_all_at_once(tmp_path):
    output = run_ranks("short_of_memory.py", 2, str(tmp_path))
    one, two = (json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(2))
    for name, run in one.items():
        assert run["records"] == two[name]["records"], name
        assert [run["same"], two[name]["same"]] == [True, True], name
        assert run["seconds"] < 30, name  # of 60 that a process may be waited for
    merges = {name: run["records"] for name, run in one.items()}
    assert merges["giant"] == merges["allocation"] == []
    assert merges["kept"] == [6, 8]  # begun with the next checkpoint
    assert merges["share"] == merges["passes"] == merges["passes-fsdp"] == [4, 8]
    # What both processes would take together; rank 0 says it for both.
    assert output.count("window_size=1000000000: 1000000000 rows of float32") == 1
    assert " of memory in 2 ranks; " in output
    assert "[0] window_size=3: the memory could not be taken (RuntimeError: " in output
    assert "[0] trajectory merging failed: FailedOnAllRanks: rank 1 failed: RuntimeError: DefaultCPUAllocator" in output
    assert output.count("[0] memory ran out in a held-out pass") == 2
    assert "did not answer" not in output
