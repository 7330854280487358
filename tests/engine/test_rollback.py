"""on_spike="rollback": when a run goes back to its last merge, what it finds there, and when it does not go back."""

import copy
import logging

import pytest
import torch
from conftest import AT_ONCE, same_weights, tiny_llama, train_steps, warnings_of
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from traj_merge_callback import TrajectoryMerger, find_snapshot
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


def run(train, heldout, folder, happens, steps=60, told=lambda step, loss: loss, each=None, schedule=None, **options):
    """Train with a merger; ``happens`` maps steps to what is done to the model after them, ``told`` gives its losses.

    Returns:
        The model, the merger, and copies of the weights after each step.
    """
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    merger = TrajectoryMerger(
        DataLoader(heldout, batch_size=6), output_dir=str(folder), optimizer=optimizer, **{**OPTIONS, **options}
    )
    scheduler = None if schedule is None else schedule(optimizer)
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
    assert not any("merge/rollbacks" in scalars for scalars in logged)
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
    options = {"each": each, "schedule": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)}
    run(train, heldout, tmp_path / "on", {41: spoil}, **options)
    assert rolled_back(caplog)
    run(train, heldout, tmp_path / "off", {}, **options)
    assert rates[tmp_path / "on"] == rates[tmp_path / "off"]


def test_the_learning_rate_grows_over_the_steps_asked_for():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    rollback._WarmUp(optimizer, 3)
    moved = []
    for _ in range(5):
        before = parameter.item()
        parameter.grad = torch.ones(1)
        optimizer.step()
        moved.append(before - parameter.item())
        assert optimizer.param_groups[0]["lr"] == 1.0
    assert moved == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_moments_are_kept_where_that_is_asked_for(train, heldout, tmp_path, caplog):
    states = {}

    def each(step, merger, optimizer):
        states[step] = (merger._rollback.count, len(optimizer.state))

    run(train, heldout, tmp_path, {41: blow_up}, each=each, spike_moments="keep")
    assert rolled_back(caplog)
    assert {size for _, size in states.values()} == {max(size for _, size in states.values())}


def test_what_goes_wrong_in_a_rollback_does_not_end_the_run(train, heldout, tmp_path, caplog, monkeypatch):
    def fails(*_):
        raise RuntimeError("no way back")

    monkeypatch.setattr(merge.Merge, "put_back", fails)
    _, merger, _ = run(train, heldout, tmp_path, {41: blow_up})
    assert any("rolling back failed" in message for message in warnings_of(caplog))
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
