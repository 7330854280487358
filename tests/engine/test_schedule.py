"""Merges between training steps and at once: same merges, same training, nothing left behind."""

import json
import logging
import math
import threading

import pytest
import torch
from conftest import AT_ONCE, same_weights, tiny_llama, train_steps
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from traj_merge_callback import HeldOutLoss, TrajectoryMerger, find_snapshot, read_merge
from traj_merge_callback.disk.state import save_state
from traj_merge_callback.distributed import Processes
from traj_merge_callback.engine.budget import Durations, MergeCost, Overhead, affordable, budgets
from traj_merge_callback.engine.schedule import Run
from traj_merge_callback.evaluate.parking import Parking
from traj_merge_callback.window.pieces import COMBINE, FORWARD

OPTIONS = {"window_size": 4, "capture_every": 2, "merge_every": 12, "evaluations": 8, "heldout_batches": 8}
# A limit that no piece keeps: one piece after each step, so that a merge is spread as far as it can be.
INTERLEAVED = {"schedule": "interleaved", "max_overhead": None, "max_pause": 1e-6, "progress": False}
ROWS = [{}, {"row": "mean", "samples_per_row": 2}, {"dtype": "int8"}, {"window_storage": "disk"}, {"row": "multiscale"}]


@pytest.fixture
def loader(heldout):
    return DataLoader(heldout, batch_size=1)  # which cannot be cut


def engine(loader, tmp_path, **options):
    return TrajectoryMerger(
        loader, **{**OPTIONS, "output_dir": str(tmp_path / "merged"), "on_error": "raise", **options}
    )


def run(loader, train, tmp_path, steps=120, each=lambda step, model, merger: None, **options):
    model = tiny_llama()
    merger = engine(loader, tmp_path, **options)

    def step_taken(step):
        merger.step(model, step)
        each(step, model, merger)

    train_steps(model, train, steps, step_taken)
    merger.finish(model)
    return model, merger


@pytest.mark.parametrize("rows", ROWS, ids=["last", "mean", "int8", "disk", "multiscale"])
def test_training_is_bit_identical_and_nothing_stays_behind(loader, train, tmp_path, rows, our_threads):
    before = torch.get_rng_state()
    plain = train_steps(tiny_llama(), train, 120)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    model, merger = run(loader, train, tmp_path, **INTERLEAVED, **rows)
    assert same_weights(plain, model)
    assert torch.equal(torch.get_rng_state(), after)
    assert len(merger.records) >= 2
    assert our_threads() == []
    assert {path.name for path in (tmp_path / "merged").iterdir()} >= {"best", "latest", "index.json", "metrics.jsonl"}
    assert not list((tmp_path / "merged").glob(".*"))


@pytest.mark.parametrize("rows", ROWS, ids=["last", "mean", "int8", "disk", "multiscale"])
@pytest.mark.parametrize("options", [{"search": "auto"}, {"search": "greedy"}, {"groups": "blocks", "evaluations": 14}])
def test_every_schedule_makes_the_same_merge_of_the_same_rows(loader, train, tmp_path, rows, options):
    found = []
    for name, schedule in (("blocking", AT_ONCE), ("interleaved", INTERLEAVED)):
        _, merger = run(loader, train, tmp_path / name, 40, **schedule, **rows, **options, keep_last=9)
        record = merger.records[0]
        assert record.step == 12
        assert (record.finished_step == 12) is (name == "blocking")
        weights = AutoModelForCausalLM.from_pretrained(record.snapshot)
        merge = read_merge(record.snapshot)
        del merge["run"], merge["checksum"]  # which differ from run to run
        found.append(
            (record.weights, record.group_weights, record.live_loss, record.merged_loss, record.search_losses, merge)
        )
        if name == "blocking":
            expected = weights
        assert same_weights(weights, expected)
    assert found[0] == found[1]


def test_live_is_what_it_was_at_the_step_of_the_merge_and_rows_are_not_overwritten(loader, train, tmp_path):
    losses, held = {}, {}
    report = HeldOutLoss(loader, batches=8)

    def each(step, model, merger):
        losses[step] = report.evaluate(model, "report").loss
        if merger._schedule.merge_under_way and merger.window.is_in_use:
            # A merge is under way; capture_every=1 would have brought a new row at every step.
            held.setdefault(merger._state.last_merge_step, set()).add(merger.window.steps)

    _, merger = run(loader, train, tmp_path, each=each, capture_every=1, row="last", **INTERLEAVED)
    first = merger.records[0]
    assert first.finished_step > first.step + 5
    for record in merger.records:
        assert record.live_loss == pytest.approx(losses[record.step], abs=1e-6)
        assert record.checkpoint_steps[-1] == record.step
    assert held[12] == {(9, 10, 11, 12)}
    # Captures go on afterwards.
    assert merger.records[1].checkpoint_steps[-1] >= first.finished_step


def test_a_merge_under_way_at_the_end_of_training_is_finished(loader, train, tmp_path):
    _, merger = run(loader, train, tmp_path, steps=14, **INTERLEAVED)
    assert [record.step for record in merger.records] == [12, 14]
    assert find_snapshot(tmp_path / "merged", "latest").name == "step-00000014"
    lines = (tmp_path / "merged" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [12, 14]


def test_ctrl_c_with_a_merge_under_way_leaves_whole_files_and_live_weights(loader, train, tmp_path, our_threads):
    model = tiny_llama()

    def interrupted(step):
        merger.step(model, step)
        if step == 27:
            assert merger._schedule.under_way
            raise KeyboardInterrupt

    merger = engine(loader, tmp_path, merge_every=26, **INTERLEAVED)
    with pytest.raises(KeyboardInterrupt), merger:
        train_steps(model, train, 60, interrupted)
    plain = train_steps(tiny_llama(), train, 27)
    assert same_weights(plain, model)
    assert our_threads() == []
    for snapshot in (tmp_path / "merged").glob("step-*"):
        AutoModelForCausalLM.from_pretrained(snapshot)
    assert not list((tmp_path / "merged").glob(".*"))


def test_a_merge_under_way_is_made_again_after_resuming(loader, train, tmp_path):
    _, whole = run(loader, train, tmp_path / "whole", 14, **INTERLEAVED)
    model = tiny_llama()
    merger = engine(loader, tmp_path / "cut", **INTERLEAVED)
    train_steps(model, train, 14, lambda step: merger.step(model, step))
    assert merger._schedule.under_way
    merger.save_state(tmp_path / "state")
    merger.wait()
    merger.close()
    resumed = engine(loader, tmp_path / "cut", **INTERLEAVED)
    resumed.load_state(tmp_path / "state", model, 14)
    resumed.finish(model)
    assert (resumed.records[0].step, resumed.records[0].weights) == (12, whole.records[0].weights)
    assert resumed.records[0].merged_loss == whole.records[0].merged_loss


def test_a_merge_that_is_made_again_has_its_own_live_weights(loader, train, tmp_path):
    # With mean rows live weights are sampled while a merge is being published, without a new row.
    options = {**INTERLEAVED, "row": "mean", "samples_per_row": 2, "capture_every": 4, "search": "lawa"}
    live, model = {}, tiny_llama()
    merger = engine(loader, tmp_path, **options)
    report = HeldOutLoss(loader, batches=8)
    states = []

    def each(step):
        live[step] = report.evaluate(model, "report").loss
        merger.step(model, step)
        if merger._schedule.merge_under_way:
            merger.save_state(tmp_path / f"state-{step}")
            merger.wait()
            states.append(step)

    train_steps(model, train, 60, each)
    again = 0
    for step in states:
        resumed = engine(loader, tmp_path / "resumed", **{**options, "merge_at_end": False})
        resumed.load_state(tmp_path / f"state-{step}", model, step)
        if (record := resumed.finish(model)) is not None:
            again += 1
            assert record.live_loss == pytest.approx(live[record.step], abs=1e-6)
    assert again >= 5


def test_a_search_that_fails_between_steps_is_logged_and_the_next_merge_goes_on(loader, train, tmp_path, caplog):
    calls = []

    def failing(model, batch):
        calls.append(1)
        if 6 <= len(calls) < 8:
            raise RuntimeError("no loss today")
        output = model(**batch)
        return output.loss * 31, 31

    plain = train_steps(tiny_llama(), train, 60)
    model = tiny_llama()
    merger = TrajectoryMerger(
        loader, nll=failing, **{**OPTIONS, **INTERLEAVED, "search": "greedy", "output_dir": str(tmp_path)}
    )
    train_steps(model, train, 60, lambda step: merger.step(model, step))
    merger.finish(model)
    assert same_weights(plain, model)
    assert len([record for record in caplog.records if "no loss today" in record.message and record.exc_info]) == 1
    assert merger.records[-1].step == 60


def test_rows_on_their_way_to_the_disk_are_not_overwritten(loader, train, tmp_path, monkeypatch):
    model = tiny_llama()
    merger = engine(loader, tmp_path, capture_every=1, merge_every=1000, row="last", **INTERLEAVED)
    train_steps(model, train, 10, lambda step: merger.step(model, step))
    hold, save = threading.Event(), save_state

    def held(*args, **options):
        return hold.wait(20) and save(*args, **options)

    monkeypatch.setattr("traj_merge_callback.engine.saving.save_state", held)
    merger.save_state(tmp_path / "state")
    expected = merger.window.combine([0, 0, 0, 1]).clone()
    train_steps(model, train, 3, lambda step: merger.step(model, step), start=10)
    assert merger.window.steps == (7, 8, 9, 10)
    hold.set()
    merger.wait()
    train_steps(model, train, 3, lambda step: merger.step(model, step), start=13)
    assert merger.window.steps == (10, 14, 15, 16)
    other = engine(loader, tmp_path / "other", capture_every=1, merge_every=1000, row="last", **INTERLEAVED)
    other.load_state(tmp_path / "state", model, 10)
    assert other.window.steps == (7, 8, 9, 10)
    assert torch.equal(other.window.combine([0, 0, 0, 1]), expected)


# The budget


@pytest.mark.parametrize("search", ["auto", "wma"])
def test_what_cannot_be_paid_for_is_neither_measured_nor_published(loader, train, tmp_path, caplog, search):
    caplog.set_level(logging.INFO)
    plain = train_steps(tiny_llama(), train, 60)
    model, merger = run(loader, train, tmp_path, 60, search=search, max_overhead=1e-9, merge_at_end=False)
    assert merger.records == []
    assert same_weights(plain, model)
    assert not list((tmp_path / "merged").glob("step-*"))


def test_a_merge_waits_until_it_can_be_paid_for_and_a_recipe_needs_two_passes(loader, train, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    model = tiny_llama()
    merger = engine(loader, tmp_path, search="wma", max_overhead=0.5, merge_at_end=False, keep_last=9)
    merger.prepare(model)
    # Evaluating a single batch takes an hour here, by measurement.
    merger._schedule._durations.learn(FORWARD, 3600.0)
    merger._schedule._durations.learn(COMBINE, 1e-6)
    train_steps(model, train, 24, lambda step: merger.step(model, step))
    assert merger.records == []
    assert any("it waits for the next checkpoint" in entry.message for entry in caplog.records)
    for _ in range(20):
        merger._schedule._durations.learn(FORWARD, 1e-6)
    train_steps(model, train, 24, lambda step: merger.step(model, step), start=24)
    merger.finish(model)
    record = merger.records[0]
    assert record.step == 26
    assert record.allowed == {"evaluations": 2}
    assert math.isfinite(record.gain)


@given(
    evaluations=st.integers(2, 60),
    forward=st.floats(1e-4, 10),
    combine=st.floats(0, 1),
    batches=st.integers(1, 50),
)
def test_smaller_budgets_cost_less_and_the_largest_affordable_one_is_taken(evaluations, forward, combine, batches):
    durations = Durations()
    durations.learn(FORWARD, forward)
    durations.learn(COMBINE, combine)
    cost = MergeCost(batches, batches, min(4, batches), 1)
    wanted = budgets(evaluations, 2)
    seconds = [cost.seconds(budget, durations) for budget in wanted]
    assert wanted[0] == evaluations
    assert seconds == sorted(seconds, reverse=True)
    assert all(budget >= min(evaluations, 5) for budget in wanted)
    for budget, needed in zip(wanted, seconds):
        chosen = affordable(wanted, cost, durations, needed)
        assert chosen is not None
        assert cost.seconds(chosen, durations) <= needed <= cost.seconds(chosen, durations) + 1e-9
        assert chosen >= budget
    assert affordable(wanted, cost, durations, seconds[-1] * 0.99) is None


def test_overhead_is_the_share_of_wall_time_taken(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("traj_merge_callback.engine.budget.time.perf_counter", lambda: now[0])
    overhead = Overhead(0.1, None)
    for _ in range(10):
        now[0] += 0.9  # a training step
        overhead.enter(now[0])
        now[0] += 0.1
        overhead.leave()
    assert overhead.share == pytest.approx(0.1)
    assert overhead.allowance == pytest.approx(0.0)
    assert overhead.max_pause == pytest.approx(3 * 0.9)
    overhead.enter(now[0])
    now[0] += 1.0
    overhead.hide(0.4)  # the GPU was still training
    overhead.spend(0.2)  # an optimizer step waited
    assert overhead.share == pytest.approx((1.0 + 0.6 + 0.2) / now[0])  # also before it is left
    overhead.leave()
    assert overhead.busy_s == pytest.approx(1.0 + 0.6 + 0.2)
    overhead.begin(busy_s=3.0, wall_s=30.0)
    assert overhead.allowance == pytest.approx(0.0)


def test_a_slice_ends_before_a_piece_that_would_take_too_long(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("traj_merge_callback.engine.budget.time.perf_counter", lambda: now[0])

    def pieces():
        for kind, seconds in [("a", 1.0), ("a", 1.0), ("b", 3.0), ("a", 1.0), ("a", 1.0), ("b", 3.0), ("a", 1.0)] * 2:
            yield kind
            now[0] += seconds
        return "result"

    durations = Durations()
    alone = Processes(alone=True)
    cpu, slices = torch.device("cpu"), []
    run = Run(pieces(), durations, cpu, lambda: None, alone, Parking(cpu, alone))
    while not run.done:
        before = now[0]
        run.advance(2.5)
        slices.append(now[0] - before)
    assert run.result == "result"
    # The first piece of a kind has to be tried alone; after that nothing but a single long piece exceeds the limit.
    assert max(slices) == 3.0
    assert slices.count(2.0) >= 4
    assert run.seconds == now[0] == 22.0


def test_long_batches_are_cut_so_that_pauses_are_kept(loader, train, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    model = tiny_llama()
    merger = engine(DataLoader(loader.dataset, batch_size=48), tmp_path, **{**INTERLEAVED, "max_pause": 0.002})
    train_steps(model, train, 12, lambda step: merger.step(model, step))
    assert any("held-out batches are cut" in entry.message for entry in caplog.records)
    whole = HeldOutLoss(DataLoader(loader.dataset, batch_size=48), batches=4)
    cut = merger.heldout
    assert cut.num_batches("report") > whole.num_batches("report")
    assert cut.evaluate(model, "report").loss == pytest.approx(whole.evaluate(model, "report").loss, abs=1e-6)
    assert cut.evaluate(model, "search").tokens.sum() == whole.evaluate(model, "search").tokens.sum()
    merger.close()
