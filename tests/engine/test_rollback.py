"""on_spike="rollback": when a run goes back to its last merge, what it finds there, and when it does not go back."""

import copy
import gc
import logging
import time
import weakref

import pytest
import torch
from conftest import AT_ONCE, same_weights, tiny_llama, train_steps, warnings_of
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers.optimization import Adafactor

from traj_merge_callback import TrajectoryMerger, find_snapshot, load_merged
from traj_merge_callback.disk import model_files
from traj_merge_callback.engine import merge, rollback

OPTIONS = {"capture_every": 5, "merge_every": 10, "progress": False, "on_spike": "rollback", **AT_ONCE}


def blow_up(model, size=0.3):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)


def spoil(model):
    with torch.no_grad():
        next(model.parameters())[0, 0] = torch.nan


def run(train, heldout, folder, happens, steps=60, told=lambda step, loss: loss, each=None, scheduled=None, **options):
    """Train with a merger; ``happens`` maps steps to what is done to the model after them, ``told`` gives its losses.

    Returns:
        The model, the merger, and copies of the weights after each step.
    """
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    merger = TrajectoryMerger(
        DataLoader(heldout, batch_size=6), output_dir=str(folder), optimizer=optimizer, **{**OPTIONS, **options}
    )
    scheduler = None if scheduled is None else scheduled(optimizer)
    torch.manual_seed(1)
    after = {}
    for step in range(1, steps + 1):
        batch = train.blocks[torch.randint(len(train), (8,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        if step in happens:
            merger.settle()
            happens[step](model)
        merger.step(model, step, loss=told(step, loss.detach()))
        after[step] = copy.deepcopy(model.state_dict())
        if each is not None:
            each(step, merger, optimizer)
    merger.finish(model)
    return model, merger, after


def rolled_back(caplog):
    return [message for message in warnings_of(caplog) if "rolled back to" in message]


@pytest.fixture(autouse=True)
def said(caplog):
    with caplog.at_level(logging.INFO, "traj_merge_callback"):
        yield


@pytest.mark.parametrize("what", [blow_up, spoil])
@pytest.mark.parametrize("row", ["last", "multiscale"])
def test_the_last_merge_from_before_takes_the_place_of_the_weights(train, heldout, tmp_path, caplog, row, what):
    kept = {}

    def each(step, merger, optimizer):
        if step == 40:
            snapshot = find_snapshot(tmp_path, "latest")
            assert snapshot.name.endswith("40")
            kept["merge"] = load_file(snapshot / "model.safetensors")
        if merger.records and "state" not in kept and merger._rollback.count:
            kept["step"], kept["state"], kept["spans"] = step, len(optimizer.state), merger.window.spans

    model, merger, after = run(train, heldout, tmp_path, {41: what}, each=each, row=row)
    assert len(rolled_back(caplog)) == 1
    assert "merge of step 40" in rolled_back(caplog)[0]
    assert kept["step"] in (45, 50, 55)
    for name, tensor in after[kept["step"]].items():
        if name in kept["merge"]:
            assert torch.equal(tensor, kept["merge"][name]), name
    assert kept["state"] == 0  # the optimizer begins anew
    # Nothing of the spike is in the window: all that was captured since is the merge itself.
    assert all(span.last <= 40 or span.first >= kept["step"] for span in kept["spans"])
    last = merger.records[-1]
    assert last.step == 60
    assert last.rollbacks == 1
    assert last.live_loss < merger.records[2].live_loss
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_without_the_training_loss_a_merge_tells(train, heldout, tmp_path, caplog):
    _, merger, _ = run(train, heldout, tmp_path, {41: blow_up}, told=lambda step, loss: None)
    assert [record.spike for record in merger.records] == [False] * 4 + [True, False]
    assert len(rolled_back(caplog)) == 1
    assert rolled_back(caplog)[0].startswith("step 55")
    assert "merge of step 40" in rolled_back(caplog)[0]


def test_by_default_a_spike_is_in_the_logs_and_the_run_untouched(train, heldout, tmp_path, caplog):
    logged = []
    options = {"on_spike": None, "log": lambda record: logged.append(record.scalars())}
    model, merger, _ = run(train, heldout, tmp_path / "on", {41: blow_up}, **options)
    assert [scalars["merge/spike"] for scalars in logged] == [0, 0, 0, 0, 1, 1]
    assert not any("merge_details/rollbacks" in scalars for scalars in logged)
    plain, _, _ = run(train, heldout, tmp_path / "off", {41: blow_up}, merge_every=1000, on_spike=None)
    assert same_weights(model, plain)
    assert not warnings_of(caplog)
    assert merger.records[4].merged_loss < merger.records[3].merged_loss + 0.01


def test_other_data_with_a_higher_loss_are_no_reason(train, heldout, tmp_path, caplog):
    """The training loss jumps, as after a change of the data; what is held out stays where it was."""
    model, merger, _ = run(train, heldout, tmp_path / "on", {}, told=lambda step, loss: loss + 3.0 * (step > 30))
    assert "a spike" in caplog.text
    assert not rolled_back(caplog)
    assert [record.step for record in merger.records] == [10, 20, 30, 40, 50, 60]
    assert [record.spike for record in merger.records] == [False] * 3 + [True] * 3
    plain, _, _ = run(train, heldout, tmp_path / "off", {}, on_spike=None)
    assert same_weights(model, plain)


def test_what_spikes_again_before_another_merge_is_left_alone(train, heldout, tmp_path, caplog):
    happens = dict.fromkeys(range(41, 61), blow_up)
    _, merger, _ = run(train, heldout, tmp_path, happens)
    assert len(rolled_back(caplog)) == 1
    (said,) = [message for message in warnings_of(caplog) if "not rolled back any more" in message]
    assert "before another merge" in said
    assert merger.records[-1].rollbacks == 1


def test_a_second_spike_after_another_merge_is_rolled_back_too(train, heldout, tmp_path, caplog):
    _, merger, _ = run(train, heldout, tmp_path, {31: blow_up, 71: blow_up}, steps=90)
    assert ["merge of step 30" in rolled_back(caplog)[0], len(rolled_back(caplog))] == [True, 2]
    assert merger.records[-1].rollbacks == 2


def test_a_spike_before_the_first_merge_is_said(train, heldout, tmp_path, caplog):
    run(train, heldout, tmp_path, {25: spoil}, steps=45, merge_every=40, capture_every=5)
    assert not rolled_back(caplog)
    assert sum("no merge from before it" in message for message in warnings_of(caplog)) == 1


def test_schedulers_see_their_own_learning_rate(train, heldout, tmp_path, caplog):
    def each(step, merger, optimizer):
        rates.setdefault(merger.output_dir, []).append(optimizer.param_groups[0]["lr"])

    rates = {}
    # Computes each rate from the last one.
    options = {"each": each, "scheduled": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)}
    run(train, heldout, tmp_path / "on", {41: spoil}, **options)
    assert rolled_back(caplog)
    run(train, heldout, tmp_path / "off", {}, **options)
    assert rates[tmp_path / "on"] == rates[tmp_path / "off"]


class Steps:
    """Steps of plain SGD at a rate of 1 on a gradient of 1: how far each goes is the rate that it took."""

    def __init__(self, steps):
        self.parameter = torch.nn.Parameter(torch.zeros(1))
        self.optimizer = torch.optim.SGD([self.parameter], lr=1.0)
        self.warm_up = rollback._WarmUp(self.optimizer, steps)

    def take(self, count, closure=None):
        taken = []
        for _ in range(count):
            before = self.parameter.item()
            self.parameter.grad = torch.ones(1)
            self.optimizer.step(closure)
            taken.append(before - self.parameter.item())
            assert self.optimizer.param_groups[0]["lr"] == 1.0  # what a scheduler sees
        return pytest.approx(taken)


def test_the_learning_rate_grows_over_the_steps_asked_for():
    steps = Steps(3)
    assert steps.take(2) == [1.0, 1.0]
    steps.warm_up.begin()
    assert steps.take(5) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_second_rollback_begins_the_warm_up_anew():
    steps = Steps(3)
    steps.warm_up.begin()
    assert steps.take(2) == [0.25, 0.5]
    steps.warm_up.begin()
    assert steps.take(4) == [0.25, 0.5, 0.75, 1.0]


def test_other_hooks_of_the_optimizer_do_not_mind():
    steps, called = Steps(2), []
    steps.warm_up.begin()
    steps.optimizer.register_step_post_hook(lambda *_: called.append("after"))
    assert steps.take(4) == [1 / 3, 2 / 3, 1.0, 1.0]
    steps.warm_up.end()
    assert steps.take(1) == [1.0]
    assert called == ["after"] * 5


def test_a_step_that_raises_does_not_lower_the_rate_for_good():
    steps = Steps(2)
    steps.warm_up.begin()

    def out_of_memory():
        raise MemoryError

    with pytest.raises(MemoryError):
        steps.take(1, out_of_memory)
    assert steps.take(2) == [2 / 3, 1.0]


def test_groups_without_a_rate_are_left_alone():
    parameter = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = Adafactor([parameter], lr=None, relative_step=True, warmup_init=True)
    rollback._WarmUp(optimizer, 3).begin()
    parameter.grad = torch.ones(4, 4)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] is None


@pytest.mark.parametrize("spikes", [False, True])
def test_snapshots_hold_what_is_said_of_them_whatever_is_looked_at(train, heldout, tmp_path, monkeypatch, spikes):
    """The training loss gives reason to look at live while a snapshot is being written, from memory that this takes."""
    write = model_files._write

    def slowly(*arguments):
        time.sleep(1.0)
        return write(*arguments)

    monkeypatch.setattr(model_files, "_write", slowly)
    options = {"schedule": "interleaved", "max_pause": 30.0, "merge_every": 20, "keep_last": 5}
    told = lambda step, loss: loss + 3.0 * (step > 21)  # noqa: E731
    _, merger, _ = run(train, heldout, tmp_path, {22: blow_up} if spikes else {}, told=told, **options)
    assert [record.step for record in merger.records] == [20, 40, 60]
    assert merger.rollbacks == spikes
    for record in merger.records:
        model = tiny_llama()
        load_merged(record.snapshot, model)
        assert merger.heldout.evaluate(model, "report").loss == pytest.approx(record.merged_loss, abs=1e-5)


def test_a_healthy_merge_after_a_rollback_counts_as_one(train, heldout, tmp_path, caplog):
    """Two spikes with one merge between them: the run goes back twice, the second time to that merge."""
    _, merger, _ = run(train, heldout, tmp_path, {21: blow_up, 31: blow_up}, steps=50)
    assert len(rolled_back(caplog)) == 2
    assert "merge of step 30" in rolled_back(caplog)[1]
    assert [record.spike for record in merger.records] == [False, False, True, True, False]


def test_live_is_looked_at_a_few_times_and_merges_go_on(train, heldout, tmp_path, monkeypatch):
    looks, live_loss = [], merge.Merge.live_loss
    monkeypatch.setattr(merge.Merge, "live_loss", lambda *arguments: looks.append(1) or live_loss(*arguments))
    options = {"schedule": "interleaved", "max_pause": 1e-4, "capture_every": 2, "merge_every": 40}
    told = lambda step, loss: loss + 3.0 * (step > 25)  # noqa: E731
    _, merger, _ = run(train, heldout, tmp_path, {}, steps=120, told=told, **options)
    assert 0 < len(looks) <= 6
    assert len(merger.records) >= 2


@pytest.mark.parametrize("loss", [torch.ones(3), "much", object()])
def test_a_loss_that_is_no_number_is_said_once_and_harms_nothing(train, heldout, tmp_path, caplog, loss):
    _, merger, _ = run(train, heldout, tmp_path, {}, steps=10, told=lambda *_: loss, on_error="raise")
    assert len(merger.records) == 1
    assert caplog.text.count("is no number") == 1


def test_the_window_is_released_with_the_merger(train, heldout, tmp_path):
    seen = []
    _, merger, _ = run(train, heldout, tmp_path, {}, steps=10, each=lambda step, merger, _: seen.append(merger.window))
    window = weakref.ref(seen.pop())
    seen.clear()
    gc.collect()
    assert merger.window is None
    assert window() is None


def test_moments_are_kept_where_that_is_asked_for(train, heldout, tmp_path, caplog):
    states = {}

    def each(step, merger, optimizer):
        states[step] = (merger._rollback.count, len(optimizer.state))

    run(train, heldout, tmp_path, {41: blow_up}, each=each, spike_moments="keep")
    assert rolled_back(caplog)
    assert {size for _, size in states.values()} == {max(size for _, size in states.values())}


def test_moments_that_are_no_numbers_are_not_kept(train, heldout, tmp_path, caplog):
    model, merger, _ = run(train, heldout, tmp_path, {41: spoil}, spike_moments="keep")
    assert len(rolled_back(caplog)) == 1
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert merger.records[-1].step == 60


def test_what_goes_wrong_in_a_rollback_does_not_end_the_run(train, heldout, tmp_path, caplog, monkeypatch):
    def fails(*_):
        raise RuntimeError("no way back")

    monkeypatch.setattr(merge.Merge, "put_back", fails)
    _, merger, _ = run(train, heldout, tmp_path, {41: blow_up})
    assert any("no way back" in message for message in warnings_of(caplog))
    assert merger.records[-1].step == 60


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"on_spike": "reload"}, "on_spike='reload'"),
        ({"on_spike": "rollback", "spike_moments": "halve", "optimizer": "given"}, "spike_moments='halve'"),
        ({"on_spike": "rollback", "spike_warmup": -1, "optimizer": "given"}, "spike_warmup=-1"),
        ({"on_spike": "rollback"}, "needs optimizer="),
        ({"on_spike": "rollback", "spike_warmup": 0, "optimizer": 3}, "optimizer=3"),
        ({"on_spike": "rollback", "optimizer": [torch.nn.Linear(1, 1)]}, "must be a torch optimizer"),
    ],
)
def test_wrong_options_are_refused_at_construction(loader, tmp_path, options, told):
    if options.get("optimizer") == "given":
        options = {**options, "optimizer": torch.optim.SGD(tiny_llama().parameters(), lr=0.1)}
    with pytest.raises((ValueError, TypeError), match=told):
        TrajectoryMerger(loader, output_dir=str(tmp_path / "merged"), **options)


def test_without_anything_to_do_to_it_no_optimizer_is_needed(loader, tmp_path, train):
    options = {**OPTIONS, "spike_moments": "keep", "spike_warmup": 0, "capture_every": 2, "merge_every": 4}
    merger, model = TrajectoryMerger(loader, output_dir=str(tmp_path), **options), tiny_llama()
    train_steps(model, train, 8, lambda step: merger.step(model, step))
    merger.close()
    assert [record.rollbacks for record in merger.records] == [0, 0]
