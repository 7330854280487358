"""The engine in a hand-written loop: training is untouched, numbers are what they say, failures stay contained."""

import json
import logging
import math
import re

import numpy as np
import pytest
import torch
from conftest import AT_ONCE, same_weights, tiny_llama, train_steps
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from traj_merge_callback import HeldOutLoss, Search, TrajectoryMerger, find_snapshot, load_merged, read_merge
from traj_merge_callback.engine.capturing import passed
from traj_merge_callback.metrics import MEANINGS
from traj_merge_callback.search import recipes

OPTIONS = {"window_size": 4, "capture_every": 2, "merge_every": 8, "evaluations": 8, "heldout_batches": 4} | AT_ONCE
TIMES = {"seconds", "overhead", "longest_pause"}


@pytest.fixture
def loader(heldout):
    return DataLoader(heldout, batch_size=8, shuffle=True)


def engine(loader, tmp_path, **options):
    return TrajectoryMerger(loader, **{**OPTIONS, "output_dir": str(tmp_path / "merged"), **options})


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "merged" / "metrics.jsonl").read_text().splitlines()]


def timeless(records):
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


MEAN_ROWS = {"row": "mean", "samples_per_row": 2}


@pytest.mark.parametrize(
    "options",
    [
        {"search": "auto"},
        {"search": "auto", "row": "last"},
        {"search": "greedy"},
        {"search": "bema", "dtype": "bfloat16"},
        {"search": "trajectory", "evaluations": 20},
        {"groups": "blocks", "evaluations": 14, **MEAN_ROWS},
        {"row": "multiscale", "window_size": 3, "capture_every": 4},
    ],
)
def test_training_is_bit_identical_with_and_without(loader, train, tmp_path, options):
    plain = train_steps(tiny_llama(), train, 25)
    model = tiny_llama()
    merger = engine(loader, tmp_path, **options)
    train_steps(model, train, 25, lambda step: merger.step(model, step))
    merger.finish(model)
    assert len(merger.records) == 4  # 8, 16, 24, and the last step
    assert same_weights(plain, model)


def test_the_published_model_has_the_reported_loss(loader, train, tmp_path):
    model = tiny_llama()
    merger = engine(loader, tmp_path, keep_last=9)
    train_steps(model, train, 24, lambda step: merger.step(model, step))
    report = HeldOutLoss(loader, batches=4)
    for record in merger.records:
        reloaded = AutoModelForCausalLM.from_pretrained(record.snapshot)
        found = report.evaluate(reloaded, "report")
        assert found.loss == pytest.approx(record.merged_loss, abs=1e-6)
        # The reported numbers are of the split that weights were not chosen on.
        assert report.evaluate(reloaded, "search").loss == pytest.approx(record.search_losses["merged"], abs=1e-6)
        assert record.search_losses["merged"] <= record.search_losses["live"]
        assert record.gain == pytest.approx(record.live_loss - record.merged_loss, abs=1e-12)
        assert record.merged_perplexity == pytest.approx(math.exp(record.merged_loss))
        rows = [record.weights[i] for i in range(len(record.weights))]
        assert len(rows) == len(record.checkpoint_steps) <= 4 + 1  # live
        assert sum(rows) == pytest.approx(1)
        assert record.checkpoint_steps[-1] == record.step


def test_weights_in_the_record_reproduce_the_snapshot(loader, train, tmp_path):
    model = tiny_llama()
    merger = engine(loader, tmp_path, search="wma")
    checkpoints = {}

    def each(step):
        merger.step(model, step)
        checkpoints[step] = {name: p.detach().clone() for name, p in model.named_parameters()}

    train_steps(model, train, 40, each, lr=1e-2)
    record = merger.records[-1]
    assert np.count_nonzero(record.weights) == 4  # the average, not live, won
    best = AutoModelForCausalLM.from_pretrained(record.snapshot)
    for name, parameter in best.named_parameters():
        by_hand = sum(w * checkpoints[s][name] for w, s in zip(record.weights, record.checkpoint_steps))
        torch.testing.assert_close(parameter.detach(), by_hand, atol=1e-6, rtol=1e-5)


def test_metrics_file_and_scalars_have_the_documented_names(loader, train, tmp_path):
    model = tiny_llama()
    logged = []
    merger = TrajectoryMerger(
        {"code": loader, "more": DataLoader(train, batch_size=4)},
        log=lambda record: logged.append(record.scalars()),
        **{**OPTIONS, "output_dir": str(tmp_path / "merged")},
    )
    train_steps(model, train, 16, lambda step: merger.step(model, step))
    promised = """step search checkpoint_steps weights live_loss merged_loss gain gain_stderr live_perplexity
        merged_perplexity steps_saved evaluations forward_equivalents seconds overhead window_bytes domains snapshot"""
    assert all(record.keys() >= set(promised.split()) for record in lines(tmp_path))
    documented = {name.split("<")[0] for name in MEANINGS}
    for scalars in logged:
        for name in scalars:
            assert name in MEANINGS or any(name.startswith(stem) and stem.endswith("/") for stem in documented), name
        # Of on_spike="rollback", and of on_publish.
        plain = {name for name in MEANINGS if "<" not in name} - {"merge_details/rollbacks", "merge/eval/step"}
        details = {"weight/0", "weight/3", "loss/code", "live_loss/more"}
        assert plain | {f"merge_details/{name}" for name in details} <= scalars.keys()
    few = set(merger.records[-1].scalars(details=False))
    assert few == {f"merge/{name}" for name in ("loss", "live_loss", "gain", "steps_saved", "overhead", "spike")}
    merge = read_merge(find_snapshot(tmp_path / "merged"))
    assert merge["packages"].keys() >= {"torch", "traj-merge-callback"}
    assert merge["search_split"]["merged_loss"] <= merge["search_split"]["live_loss"]


def test_steps_saved_is_when_a_snapshot_was_already_as_good_as_live_is_now(loader, train, tmp_path):
    model = tiny_llama()
    merger = engine(loader, tmp_path, search="lawa", merge_every=4)
    train_steps(model, train, 60, lambda step: merger.step(model, step), lr=3e-2)
    records = merger.records
    for record in records:
        as_good = [past.step for past in records if past.step <= record.step and past.merged_loss <= record.live_loss]
        assert record.steps_saved == record.step - min(as_good, default=record.step)
    assert max(record.steps_saved for record in records) > 0


@pytest.mark.parametrize(
    "options",
    [
        {"search": "auto"},
        {"search": "perplexity"},
        {"search": "bema"},
        {"search": "trajectory", "evaluations": 20},
        {"groups": "blocks", "evaluations": 14, **MEAN_ROWS},
        {"row": "multiscale", "window_size": 3, "capture_every": 4},
    ],
)
def test_resuming_continues_as_if_nothing_had_happened(loader, train, tmp_path, options):
    def continued(resume):
        folder = tmp_path / str(resume)
        model = tiny_llama(dropout=0.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        merger = engine(loader, folder, **options)
        train_steps(model, train, 13, lambda step: merger.step(model, step), optimizer=optimizer)
        if resume:
            train_steps(model, train, 5, lambda step: merger.step(model, step), start=13)  # lost work
            merger.save_state(folder / "lost")
            merger.wait()
            model = tiny_llama(dropout=0.0)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            merger = engine(loader, folder, **options)
            saved = engine(loader, folder, **options)
            train_steps(model, train, 13, lambda step: saved.step(model, step), optimizer=optimizer)
            state = torch.get_rng_state()
            saved.save_state(folder / "state")
            saved.wait()
            merger.load_state(folder / "state", model, 13)
            torch.set_rng_state(state)
        train_steps(model, train, 12, lambda step: merger.step(model, step), start=13, optimizer=optimizer)
        merger.finish(model)
        return model, [{**record, "snapshot": None, "run": None} for record in timeless(lines(folder))]

    (plain, expected), (resumed, found) = continued(False), continued(True)
    assert same_weights(plain, resumed)
    assert [record["step"] for record in expected] == [8, 16, 24, 25]
    assert [record for record in found if record["step"] > 13] == expected[1:]


def test_a_state_that_does_not_fit_is_refused(loader, train, tmp_path):
    model = tiny_llama()
    merger = engine(loader, tmp_path, row="last")
    train_steps(model, train, 6, lambda step: merger.step(model, step))
    merger.save_state(tmp_path / "state")
    merger.wait()
    with pytest.raises(ValueError, match="checkpoints up to step 6, but training is at step 4"):
        engine(loader, tmp_path).load_state(tmp_path / "state", model, 4)
    with pytest.raises(ValueError, match="other parameters"):
        engine(loader, tmp_path).load_state(tmp_path / "state", tiny_llama(num_hidden_layers=1), 6)
    with pytest.raises(ValueError, match="running sums"):
        engine(loader, tmp_path, search="bema").load_state(tmp_path / "state", model, 6)
    with pytest.raises(ValueError, match="rows are means"):
        engine(loader, tmp_path).load_state(tmp_path / "state", model, 6)
    with pytest.raises(FileNotFoundError, match="no merging state"):
        engine(loader, tmp_path).load_state(tmp_path / "elsewhere", model, 6)


def test_bema_equals_trls_callback(loader, train, tmp_path):
    trl = pytest.importorskip("trl")
    model = tiny_llama()
    theirs = trl.BEMACallback(update_freq=2, update_after=2)
    theirs.on_train_begin(None, None, None, model=model)

    class State:
        global_step = 0

    merger = engine(loader, tmp_path, search="bema", merge_every=2)
    found = []

    def each(step):
        State.global_step = step
        theirs.on_step_end(None, State, None, model=model)
        merger.step(model, step)
        if step % 2 == 0 and len(merger.window) >= 2:
            weights = recipes.bema(len(merger.window), step)
            found.append(merger.window.combine(weights).clone())
            expected = torch.cat([p.detach().flatten() for p in theirs.running_model.parameters()])
            torch.testing.assert_close(found[-1], expected, atol=1e-6, rtol=1e-5)

    train_steps(model, train, 20, each)
    assert len(found) == 9


class Broken(Search):
    def __init__(self, problem):
        pass

    def ask(self):
        raise RuntimeError("the search fell over")


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("search", "RuntimeError: the search fell over"),
        ("nan", "loss on the search split is nan"),
        ("nll", "ZeroDivisionError"),
        ("log", "KeyError: 'no such logger'"),
        ("readonly", "publishing a snapshot failed: .*Error"),
    ],
)
def test_failures_are_logged_once_and_leave_training_alone(loader, train, tmp_path, caplog, trouble, message):
    options: dict = {}
    now = {"step": 0}
    if trouble == "search":
        options["search"] = f"{__name__}:Broken"
    elif trouble == "nan":
        options["nll"] = lambda model, batch: (torch.tensor(math.nan), 8)
    elif trouble == "nll":
        # Not before training, where it would end merging.
        options["nll"] = lambda model, batch: (1 / 0, 8) if now["step"] > 1 else (model(**batch).loss, 8)
    elif trouble == "log":

        def log(record):
            raise KeyError("no such logger")

        options["log"] = log
    elif trouble == "readonly":
        (tmp_path / "merged").write_text("a file where the folder should be")
    plain = train_steps(tiny_llama(), train, 25)
    model = tiny_llama()
    merger = engine(loader, tmp_path, **options)

    def each(step):
        now["step"] = step
        merger.step(model, step)

    with caplog.at_level(logging.WARNING, "traj_merge_callback"):
        train_steps(model, train, 25, each)
        during = [r for r in caplog.records if "Training goes on" in r.message]
        merger.finish(model)
    vars(model)["_modules"].pop("extra", None)
    assert same_weights(plain, model)
    kinds = {record.message.split(" failed:")[0] for record in during}
    assert len(during) == len(kinds), "each kind of failure is logged once"
    assert any(re.search(message, record.message) for record in during)
    assert any("failures while merging" in record.message for record in caplog.records)


def test_on_error_raise_lets_failures_through(loader, train, tmp_path):
    merger = engine(loader, tmp_path, search=f"{__name__}:Broken", on_error="raise")
    model = tiny_llama()
    with pytest.raises(RuntimeError, match="fell over"):
        train_steps(model, train, 8, lambda step: merger.step(model, step))


def test_a_read_only_folder_still_gives_the_metrics(loader, train, tmp_path):
    (tmp_path / "merged").write_text("a file where the folder should be")
    model = tiny_llama()
    merger = engine(loader, tmp_path)
    train_steps(model, train, 8, lambda step: merger.step(model, step))
    assert merger.records[0].snapshot is None
    assert math.isfinite(merger.records[0].merged_loss)


@given(every=st.integers(1, 20), steps=st.lists(st.integers(1, 200), min_size=1, max_size=40, unique=True))
def test_what_is_due_is_done_once_even_if_its_exact_step_is_skipped(every, steps):
    steps = sorted(steps)
    done = [step for previous, step in zip([0, *steps], steps) if passed(every, previous, step)]
    multiples = {next((s for s in steps if s >= m), None) for m in range(every, steps[-1] + 1, every)}
    assert done == sorted(multiples - {None})


def test_captures_start_at_start_step_and_a_late_start_keeps_the_grid(loader, train, tmp_path):
    model = tiny_llama()
    merger = engine(loader, tmp_path, start_step=5, merge_at_end=False, row="last")
    train_steps(model, train, 11, lambda step: merger.step(model, step))
    assert merger.window.steps == (6, 8, 10)
    late = engine(loader, tmp_path, row="last")
    late.step(model, 101)
    assert len(late.window) == 0
    late.step(model, 102)
    assert late.window.steps == (102,)


def test_load_merged_at_end_puts_the_best_snapshot_into_the_model(loader, train, tmp_path):
    model = tiny_llama()
    merger = engine(loader, tmp_path, load_merged_at_end=True)
    train_steps(model, train, 20, lambda step: merger.step(model, step))
    merger.finish(model)
    other = tiny_llama(seed=5)
    load_merged(tmp_path / "merged" / "best", other)
    assert same_weights(model, other)
    best = min(merger.records, key=lambda record: record.search_losses["merged"])
    assert find_snapshot(tmp_path / "merged").name == f"step-{best.step:08d}"


def test_another_runs_metrics_are_set_aside_and_a_resumed_runs_continue(loader, train, tmp_path):
    model = tiny_llama()
    for _ in range(2):
        merger = engine(loader, tmp_path, merge_at_end=False)
        train_steps(model, train, 16, lambda step, merger=merger: merger.step(model, step))
        merger.wait()
    assert [record["step"] for record in lines(tmp_path)] == [8, 16]
    assert len((tmp_path / "merged" / "metrics.1.jsonl").read_text().splitlines()) == 2
    merger.save_state(tmp_path / "state")
    merger.wait()
    with (tmp_path / "merged" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 24}\n{"step": 32, "cut o')
    resumed = engine(loader, tmp_path, merge_at_end=False)
    resumed.load_state(tmp_path / "state", model, 16)
    train_steps(model, train, 8, lambda step: resumed.step(model, step), start=16)
    resumed.wait()
    assert [record["step"] for record in lines(tmp_path)] == [8, 16, 24]
    assert {entry.step for entry in resumed._store.entries} <= {8, 16, 24}
    assert len(resumed._store.entries) >= 2


@pytest.mark.parametrize("search", ["lawa", "surrogate"])
def test_a_peft_run_keeps_and_publishes_only_the_adapter(loader, train, tmp_path, search):
    peft = pytest.importorskip("peft")

    def adapted(seed):
        base = tiny_llama(dropout=0.0)
        torch.manual_seed(seed)
        return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))

    plain = train_steps(adapted(0), train, 17)
    model = adapted(0)
    merger = engine(loader, tmp_path, search=search, on_error="raise")
    train_steps(model, train, 17, lambda step: merger.step(model, step))
    assert merger.window.layout.numel == sum(p.numel() for p in model.parameters() if p.requires_grad)
    merger.finish(model)
    assert same_weights(plain, model)
    best = find_snapshot(tmp_path / "merged")
    assert (best / "adapter_model.safetensors").exists()
    assert not (best / "model.safetensors").exists()
    other = adapted(9)
    load_merged(best, other)
    report = HeldOutLoss(loader, batches=4)
    best_loss = min(merger.records, key=lambda record: record.search_losses["merged"]).merged_loss
    assert report.evaluate(other, "report").loss == pytest.approx(best_loss, abs=1e-6)


def test_gradient_checkpointing_and_autocast_leave_training_alone(loader, train, tmp_path):
    def run(merging):
        model = tiny_llama()
        model.gradient_checkpointing_enable()
        model.train()
        precision = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
        options = {"precision": precision, "search": "surrogate", "on_error": "raise"}
        merger = engine(loader, tmp_path, **options) if merging else None
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(1, 17):
            batch = train.blocks[torch.randint(len(train), (8,))]
            with precision():
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if merger:
                merger.step(model, step)
        return model

    assert same_weights(run(False), run(True))


def test_mean_rows_and_groups_are_what_is_published(loader, train, tmp_path):
    model, states = tiny_llama(), {}
    merger = engine(loader, tmp_path, groups="blocks", evaluations=14, keep_last=9, **MEAN_ROWS)

    def each(step):
        states[step] = {name: value.clone() for name, value in model.state_dict().items()}
        merger.step(model, step)

    train_steps(model, train, 24, each, lr=1e-2)
    merger.finish(model)
    grouped = [record for record in merger.records if record.group_weights]
    assert grouped, "no merge had weights by group"
    for record in grouped:
        assert sum(record.weights) == pytest.approx(1)
        assert record.search_losses["merged"] < record.search_losses["live"]
        published = AutoModelForCausalLM.from_pretrained(record.snapshot).state_dict()
        means = [
            {name: (states[s - 1][name] + states[s][name]) / 2 for name in states[s]}
            for s in record.checkpoint_steps[:-1]
        ] + [states[record.step]]
        for name, group in (("model.embed_tokens.weight", "embeddings"), ("model.norm.weight", "norms")):
            rows = torch.stack([row[name] for row in means])
            weights = torch.tensor(record.group_weights[group])
            assert weights.sum() == pytest.approx(1)
            expected = torch.tensordot(weights, rows, dims=1)
            torch.testing.assert_close(published[name], expected, atol=1e-5, rtol=1e-5)
        merge = read_merge(record.snapshot)
        assert (merge["row"], merge["samples_per_row"]) == ("mean", 2)
        assert merge["group_weights"] == record.group_weights


def test_live_can_win_where_rows_are_means(loader, train, tmp_path):
    # Early in training older weights are much worse: no mean of them is as good as live.
    model = tiny_llama()
    merger = engine(loader, tmp_path, search="lawa", merge_every=4, **MEAN_ROWS)
    train_steps(model, train, 8, lambda step: merger.step(model, step), lr=3e-2)
    first = merger.records[0]
    assert first.weights == [0.0, 0.0, 1.0]
    assert first.gain == 0
    assert first.merged_loss == first.live_loss
    assert first.snapshot is not None


def test_domains_can_be_weighted_and_none_is_harmed(train, heldout, tmp_path):
    domains = {"code": DataLoader(heldout, batch_size=8), "seen": DataLoader(train, batch_size=8)}
    model = tiny_llama()
    records = {}
    for name, options in {
        "mean": {},
        "weighted": {"domain_weights": {"seen": 1.0}},
        "worst": {"objective": "worst"},
        "careful": {"tolerance": 0.0},
    }.items():
        model = tiny_llama()
        merger = engine(domains, tmp_path / name, on_error="raise", **options)
        train_steps(model, train, 24, lambda step, merger=merger, model=model: merger.step(model, step), lr=1e-2)
        records[name] = merger.records[-1]
    for record in records.values():
        assert record.search_losses["merged"] <= record.search_losses["live"]
    assert len({tuple(record.weights) for record in records.values()}) > 1
    with pytest.raises(ValueError, match=r"\['law'\] are not among the domains searched on, \['code', 'seen'\]"):
        engine(domains, tmp_path, domain_weights={"law": 1.0})
