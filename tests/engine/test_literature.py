"""Methods of the literature by name, on a real run: what they publish is the average that their sources keep."""

import numpy as np
import pytest
import torch
from conftest import AT_ONCE, nll_without_gradients, same_weights, tiny_llama, train_steps, warnings_of
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, Subset
from transformers import AutoModelForCausalLM

from traj_merge_callback import MergeConfig, Search, TrajectoryMerger, read_merge
from traj_merge_callback.search.recipes import half_life_rate

STEPS = 40


@pytest.fixture
def run(loader, train, tmp_path):
    """A function that trains with a search: the record of the last merge, and the weights after every step."""

    def training(search, options, steps=STEPS, **more):
        model, trajectory = tiny_llama(), {}
        often = {"capture_every": 2, "merge_every": 8, "heldout_batches": 4} | AT_ONCE
        chosen = {"search": search, "search_options": options, "output_dir": tmp_path / "merged", "on_error": "raise"}
        merger = TrajectoryMerger(loader, **often, **chosen, **more)

        def each(step):
            merger.step(model, step)
            trajectory[step] = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()

        train_steps(model, train, steps, each, lr=3e-2)
        record = merger.records[-1]
        merger.close()
        return record, trajectory

    return training


def published(record):
    """The parameters of the snapshot."""
    return torch.nn.utils.parameters_to_vector(AutoModelForCausalLM.from_pretrained(record.snapshot).parameters())


def running_average(trajectory, rate):
    average = trajectory[1].clone()
    for step in range(2, STEPS + 1):
        average.lerp_(trajectory[step], rate(step))
    return average


def test_mean_of_steps_is_the_mean_of_the_last_steps(run):
    record, trajectory = run("mean-of-steps", {"last": 8}, window_size=6)
    assert record.row_spans[-1] == (STEPS, STEPS, 1)  # live, beside rows that are means of every step
    expected = torch.stack([trajectory[step] for step in range(STEPS - 7, STEPS + 1)]).mean(dim=0)
    torch.testing.assert_close(published(record), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("search", "options", "rate"),
    [
        ("half-life", {"fraction": 0.2}, lambda step: half_life_rate(step, fraction=0.2)),
        ("posthoc-ema", {"length": 0.2}, lambda step: 1 - (1 - 1 / step) ** 2.83),
        ("tail-ema", {"tau": 5.0, "lambda_": 1.0}, lambda step: 1 / 5),
    ],
)
def test_a_running_average_is_made_of_the_rows_nearly(run, search, options, rate):
    record, trajectory = run(search, options)
    live, average = trajectory[STEPS], running_average(trajectory, rate)
    assert record.source == "merge"
    assert (published(record) - average).norm() < 0.25 * (live - average).norm()


@pytest.mark.parametrize("row", ["last", "mean", "multiscale"])
@pytest.mark.parametrize("search", ["tail-ema", "half-life", "mean-of-steps", "posthoc-ema", "sparse"])
def test_every_method_merges_rows_of_every_kind(run, search, row):
    record, _ = run(search, {}, steps=16, row=row, evaluations=5)
    assert record.search == search
    assert sum(record.weights) == pytest.approx(1)
    assert np.isfinite(record.merged_loss)
    assert record.search_losses["merged"] <= record.search_losses["live"]


@pytest.mark.parametrize("search", ["fisher", "regmean", "df-merge"])
def test_methods_that_weigh_each_parameter_merge_checkpoints(run, search):
    record, trajectory = run(search, {}, evaluations=15, window_size=3)
    assert record.source == "merge"
    assert record.search_losses["merged"] < record.search_losses["live"]
    learnt = (1 if search == "regmean" else 3) * 3 / 4
    assert record.forward_equivalents == pytest.approx(learnt + record.evaluations, abs=1)
    assert record.forward_equivalents <= 15
    assert read_merge(record.snapshot)["weighing"] == ("regmean" if search == "regmean" else "fisher")
    if search != "df-merge":
        assert record.weights == pytest.approx([1 / 3] * 3)
    merged, rows = published(record), torch.stack([trajectory[step] for step in record.checkpoint_steps])
    mean = torch.tensor(record.weights, dtype=rows.dtype) @ rows
    assert (merged - mean).norm() > 2e-3  # it is no weighted mean of checkpoints
    if search != "regmean":  # each parameter is between its largest and its smallest value
        used = rows[[weight > 0 for weight in record.weights]]
        assert (merged <= used.amax(dim=0) + 1e-6).all()
        assert (merged >= used.amin(dim=0) - 1e-6).all()


@pytest.mark.parametrize("search", ["fisher", "regmean", "df-merge"])
def test_methods_that_weigh_each_parameter_leave_training_as_it_is(loader, train, tmp_path, search):
    def training(merging):
        # A weight that is computed anew, with a step of a power iteration, whenever somebody asks for it in training.
        model = tiny_llama()
        spectral_norm(model.model.layers[0].mlp.up_proj)
        merger = TrajectoryMerger(
            loader, output_dir=tmp_path, search=search, capture_every=1, merge_every=3, window_size=3, on_error="raise"
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        train_steps(model, train, 12, (lambda step: merger.step(model, step)) if merging else None, optimizer=optimizer)
        merger.close()
        return model, len(merger.records)

    (alone, _), (with_merges, count) = training(False), training(True)
    assert count > 0
    assert same_weights(alone, with_merges)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"search": "fisher", "evaluations": 7},
            "evaluations=7: search='fisher' takes 6 of them to learn of 8 rows, so",
        ),
        ({"search": "df-merge", "groups": "blocks"}, "groups='blocks' does not go with search='df-merge'"),
        ({"search": "regmean", "row": "mean"}, "row='mean' does not go with search='regmean', which needs single"),
    ],
)
def test_methods_that_weigh_each_parameter_say_what_they_cannot(options, message):
    with pytest.raises(ValueError, match=message):
        MergeConfig(**options)


class Needy(Search):
    weighing = "fisher"

    def __init__(self, problem, *, share):
        super().__init__(problem)
        self._candidates = [np.array([1 - share, 0.0, share])]

    def ask(self):
        return self._candidates.pop() if self._candidates else None


class Confused(Needy):
    needs_gradients = True


def test_a_search_of_ones_own_may_have_required_options_and_use_fisher_information(loader, train, tmp_path):
    options = {"capture_every": 1, "merge_every": 3, "window_size": 3, "on_error": "raise", "output_dir": tmp_path}
    search = f"{Needy.__module__}:Needy"
    with TrajectoryMerger(loader, search=search, search_options={"share": 0.9}, **options, **AT_ONCE) as merger:
        model = tiny_llama()
        train_steps(model, train, 3, lambda step: merger.step(model, step))
        assert merger.records[0].weights in ([pytest.approx(0.1), 0.0, 0.9], [0.0, 0.0, 1.0])
    with pytest.raises(ValueError, match="do not fit"):
        MergeConfig(search=search)
    with pytest.raises(ValueError, match="weighing='fisher': must be one of rows, fisher, regmean, and 'rows' with"):
        MergeConfig(search=f"{Needy.__module__}:Confused", search_options={"share": 0.9})


def test_learning_that_costs_more_than_was_allowed_is_said(heldout, train, tmp_path, caplog):
    options = {"capture_every": 1, "merge_every": 3, "window_size": 3, "evaluations": 5, "output_dir": tmp_path}
    few = DataLoader(Subset(heldout, range(2)), batch_size=1)  # one sequence for each split, so that there is one part
    with TrajectoryMerger(few, search="fisher", **options, **AT_ONCE) as merger:
        model = tiny_llama()
        train_steps(model, train, 6, lambda step: merger.step(model, step))
        assert merger.records[-1].forward_equivalents > 9
    assert sum("takes 9 passes to learn of 3 rows" in message for message in warnings_of(caplog)) == 1


def test_a_loss_without_gradients_is_named(loader, train, tmp_path, caplog):
    options = {"capture_every": 1, "merge_every": 3, "window_size": 3, "output_dir": tmp_path}
    with TrajectoryMerger(loader, nll=nll_without_gradients, search="fisher", **options, **AT_ONCE) as merger:
        train_steps(model := tiny_llama(), train, 6, lambda step: merger.step(model, step))
        assert merger.records == []
    assert "nll must not detach it" in caplog.text
