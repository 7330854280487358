"""What is published where merging does not help, and which rows a mean is of."""

import json
import logging

import numpy as np
import pytest
import torch
from conftest import AT_ONCE, tiny_llama, train_steps, warnings_of
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from traj_merge_callback import Search, TrajectoryMerger, find_snapshot, read_merge
from traj_merge_callback.evaluate.language_model import language_model_nll

OPTIONS = {"window_size": 4, "capture_every": 2, "merge_every": 8, "heldout_batches": 4, "progress": False} | AT_ONCE


class Far(Search):
    """Proposes one merge, far behind live."""

    def __init__(self, problem):
        self.candidates = [np.array([3.0] + [0.0] * (problem.size - 2) + [-2.0])]

    def ask(self):
        return self.candidates.pop() if self.candidates else None


def test_live_itself_is_published_where_no_merge_is_better(train, heldout, tmp_path, caplog):
    model = tiny_llama()
    merger = TrajectoryMerger(
        DataLoader(heldout, 8), output_dir=str(tmp_path), search=f"{__name__}:Far", on_error="raise", **OPTIONS
    )
    with caplog.at_level(logging.INFO, "traj_merge_callback"):
        train_steps(model, train, 8, lambda step: merger.step(model, step))
    merger.close()
    (record,) = merger.records
    assert (record.source, record.gain, record.weights) == ("live", 0.0, [0.0, 0.0, 0.0, 1.0])
    assert caplog.text.count("step 8: no merge was better than live") == 1
    found = find_snapshot(tmp_path, "latest")
    assert read_merge(found)["source"] == "live"
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["source"] == "live"
    live, published = model.state_dict(), load_file(found / "model.safetensors")
    assert all(torch.equal(value, live[name]) for name, value in published.items())


def test_a_merge_that_is_worse_on_the_report_split_says_so(train, heldout, tmp_path, caplog):
    reported = set()

    def nll(model, batch):
        value, tokens = language_model_nll(model, batch)
        # What is better on the search split is worse here.
        return (10.0 * tokens - value if batch["input_ids"].sum().item() in reported else value), tokens

    model = tiny_llama()
    merger = TrajectoryMerger(DataLoader(heldout, 8), nll=nll, output_dir=str(tmp_path), on_error="raise", **OPTIONS)
    reported |= {batch.data["input_ids"].sum().item() for batch in merger.heldout._batches["report"]}
    train_steps(model, train, 8, lambda step: merger.step(model, step))
    merger.close()
    (record,) = merger.records
    assert record.source == "merge"
    assert record.search_losses["merged"] < record.search_losses["live"]
    assert record.gain < 0
    assert caplog.text.count("step 8: the merge is worse than live by") == 1
    assert read_merge(record.snapshot)["report_split"]["gain"] == record.gain


@pytest.mark.parametrize(("mean", "expected"), [(False, [4, 12, 16, 20]), (True, [4, 16, 20])])
def test_a_mean_row_is_of_its_own_span_whole(train, heldout, tmp_path, mean, expected):
    options = {**OPTIONS, "capture_every": 4, "merge_every": 1000, "row": "mean", "samples_per_row": 4}
    # Rows that are being read are not waited for, and the trial of what merges take is over at once.
    options |= {"schedule": "interleaved", "on_error": "raise", "max_pause": 100.0}
    merger = TrajectoryMerger(DataLoader(heldout, 8), output_dir=str(tmp_path), **options)
    model, weights = tiny_llama(), {}
    merger.prepare(model)

    def each(step):
        weights[step] = torch.cat([p.detach().flatten() for p in model.parameters()])
        if 6 <= step <= 9:
            with merger.window.in_use(mean=mean):
                merger.step(model, step)
        else:
            merger.step(model, step)

    train_steps(model, train, 20, each)
    assert merger.window.steps == (*expected, 20)  # live
    for one, step in enumerate(expected):
        mean = torch.stack([weights[s] for s in range(step - 3, step + 1)]).mean(0)
        torch.testing.assert_close(merger.window.combine(np.eye(len(expected) + 1)[one]), mean, atol=1e-6, rtol=1e-5)
    merger.close()


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "xlnet"])
def test_experts_that_no_token_uses_and_models_that_do_not_shift_labels(train, heldout, tmp_path, kind, caplog):
    sizes = {"vocab_size": tiny_llama().config.vocab_size, "hidden_size": 32, "intermediate_size": 32}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 1}
    configs = {
        "mixtral": {**sizes, "num_local_experts": 16, "output_router_logits": True},
        "qwen2_moe": {**sizes, "num_experts": 32, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        "xlnet": {"vocab_size": sizes["vocab_size"], "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 32},
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **configs[kind]))
    merger = TrajectoryMerger(DataLoader(heldout, 8), output_dir=str(tmp_path), on_error="raise", **OPTIONS)
    train_steps(model, train, 8, lambda step: merger.step(model, step))
    merger.close()
    (record,) = merger.records
    assert record.gain > 0.05
    assert "could not search with gradients" not in caplog.text
    again = AutoModelForCausalLM.from_pretrained(record.snapshot)
    assert all(value.isfinite().all() for value in again.state_dict().values())


@pytest.mark.parametrize("row", ["last", "multiscale"])
def test_weights_that_are_not_finite_for_a_while_cost_those_merges_only(train, heldout, tmp_path, caplog, row):
    """Weights are NaN when checkpoints are taken at steps 20 to 24, and are restored after."""
    model = tiny_llama(dropout=0.0)
    options = OPTIONS | {"on_error": "warn", "row": row, "capture_every": 4, "merge_every": 4}
    options |= {} if row == "last" else {"samples_per_row": 2}
    merger = TrajectoryMerger(DataLoader(heldout, 8), search="auto", output_dir=str(tmp_path), **options)

    def each(step):
        parameter = model.get_input_embeddings().weight
        kept = parameter.detach().clone()
        if 20 <= step <= 24:
            parameter.data[3, 5] = float("nan")
        merger.step(model, step)
        merger.settle()
        parameter.data.copy_(kept)

    train_steps(model, train, 48, each, lr=1e-2)
    records = {record.step: record for record in merger.records}
    # Beside rows that are means live makes two rows at step 4.
    assert sorted({*records} - {4}) == [8, 12, 16, 28, 32, 36, 40, 44, 48]
    for record in records.values():
        assert not {20, 24} & set(record.checkpoint_steps)
        assert np.isfinite(record.merged_loss)
        # Before that the loss falls so fast that live may be the best.
        assert record.step < 36 or record.search_losses["merged"] < record.search_losses["live"]
    said = warnings_of(caplog)
    assert sum("not finite when a checkpoint was taken" in line for line in said) == 1
    assert sum("so there is no merge of them" in line for line in said) == 1
    assert not any("could not search with gradients" in line for line in said)
    # With gradients, as ever: without them a merge has as many candidates as passes.
    assert records[48].evaluations < records[48].forward_equivalents
    merger.close()
