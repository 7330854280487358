"""Checkpoints of every kind, searched and merged as their writers left them."""

import json
import re

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from folders import Module, blocks, llama, perturbed, saved
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from traj_merge_callback import HeldOutLoss, load_merged, read_merge
from traj_merge_callback.offline import merge, search
from traj_merge_callback.offline.heldout import ByteTokenizer, heldout_batches

pytest_plugins = ["folders"]

OPTIONS = {"tokenizer": "bytes", "block_size": 32, "sequences": 32, "progress": False}


def averaged(models):
    """The mean of state dicts, in float64."""
    states = [model if isinstance(model, dict) else model.state_dict() for model in models]
    return {name: sum(state[name].double() for state in states) / len(states) for name in states[0]}


def close(found, expected, tolerance=1e-6):
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=tolerance)


def test_a_search_over_a_trainers_folder_is_better_than_its_newest_checkpoint(trainer_run, heldout_file, tmp_path):
    record = search(trainer_run, heldout_file, output=tmp_path / "merged", **OPTIONS)
    assert record.checkpoint_steps == [20, 40, 60, 80, 100, 120]
    assert record.gain > 2 * record.gain_stderr > 0
    assert record.search_losses["merged"] < record.search_losses["live"]
    best = tmp_path / "merged" / "best"
    document = read_merge(best)
    assert document["report_split"]["merged_loss"] == record.merged_loss
    assert [json.loads(line)["step"] for line in (tmp_path / "merged" / "metrics.jsonl").open()] == [120]
    # The weights written are those named, and their loss is the one reported.
    states = [AutoModelForCausalLM.from_pretrained(name).state_dict() for name in document["checkpoints"]]
    model = AutoModelForCausalLM.from_pretrained(best)
    weights = document["weights"]
    close(model.state_dict(), {n: sum(w * s[n].double() for w, s in zip(weights, states)) for n in states[0]}, 1e-5)
    assert load_merged(best, llama(), verify=True)["step"] == 120


@pytest.mark.parametrize(
    "name", ["lawa", "gp", "greedy", "trajectory", "perplexity", "sparse", "half-life", "posthoc-ema"]
)
def test_every_search_goes_by_name(trainer_run, heldout_file, tmp_path, name):
    record = search(
        trainer_run, heldout_file, output=tmp_path / "merged", search=name, last=4, evaluations=7, **OPTIONS
    )
    assert record.search == name
    assert record.checkpoint_steps == [60, 80, 100, 120]
    if name == "lawa" and record.source == "merge":
        assert record.weights == [0.25] * 4


def test_domains_groups_and_report_only(trainer_run, heldout_file, tmp_path):
    text = tmp_path / "plain.txt"
    text.write_text(heldout_file.read_text() * 2)
    record = search(
        trainer_run,
        [f"words={heldout_file}", f"raw={text}"],
        output=tmp_path / "merged",
        groups="blocks",
        evaluations=12,
        report_only=["raw"],
        **OPTIONS,
    )
    assert set(record.domains) == {"words", "raw"}
    assert record.live_loss == record.domains["words"]["live_loss"]


def test_lightning_checkpoints_with_a_module_of_the_users(lightning_run, tmp_path):
    loader = [{"input_ids": part, "labels": part} for part in blocks(seed=1).split(8)]
    module = Module()
    record = search(lightning_run, loader, model=module.net, output=tmp_path / "merged", progress=False)
    assert record.checkpoint_steps == [10, 20, 30, 40]
    assert record.merged_loss <= record.live_loss
    load_merged(tmp_path / "merged" / "best", GPT2LMHeadModel(module.net.config))
    folder = merge(lightning_run, recipe="lawa", last=2, output=tmp_path / "mean")
    files = sorted(lightning_run.rglob("*.ckpt"), key=lambda path: int(re.search(r"step=(\d+)", path.name)[1]))
    load_merged(folder, module)
    close(module.state_dict(), averaged([torch.load(path, weights_only=True)["state_dict"] for path in files[-2:]]))


def test_distributed_checkpoints_are_read_if_that_is_allowed(tmp_path):
    models = [perturbed(llama(), number) for number in (1, 2)]
    for number, model in enumerate(models, start=1):
        state = {"model": model.state_dict(), "optim": {"step": torch.ones(3)}}
        dcp.save(state, checkpoint_id=tmp_path / "run" / f"iter_{number:07d}")
    with pytest.raises(ValueError, match="--allow-pickle"):
        merge(tmp_path / "run", recipe="lawa", output=tmp_path / "mean")
    loader = [{"input_ids": part, "labels": part} for part in blocks(seed=1).split(8)]
    options = {"allow_pickle": True, "progress": False}
    record = search(tmp_path / "run", loader, model=llama(), output=tmp_path / "merged", search="lawa", **options)
    assert record.checkpoint_steps == [1, 2]
    folder = merge(tmp_path / "run", recipe="lawa", output=tmp_path / "mean", **options)
    assert set(read_merge(folder)["merged_tensors"]) == {f"model.{name}" for name in models[0].state_dict()}


def test_shards_tied_weights_and_bfloat16_stay_as_they_are(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=64, n_embd=32, n_layer=2, n_head=4)).bfloat16()
    saved(model, tmp_path / "run", (1, 2, 3), max_shard_size="20KB")
    assert (tmp_path / "run" / "step1" / "model.safetensors.index.json").exists()
    folder = merge(tmp_path / "run", weights=[0.5, 0.75, -0.25], output=tmp_path / "mean", shard_bytes=20_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    states = [AutoModelForCausalLM.from_pretrained(tmp_path / "run" / f"step{n}").state_dict() for n in (1, 2, 3)]
    made = AutoModelForCausalLM.from_pretrained(folder)
    assert {value.dtype for value in made.state_dict().values()} == {torch.bfloat16}
    for name, value in made.state_dict().items():
        exact = 0.5 * states[0][name].float() + 0.75 * states[1][name].float() - 0.25 * states[2][name].float()
        assert torch.equal(value, exact.bfloat16()), name
    loader = [{"input_ids": part, "labels": part} for part in blocks(seed=1).split(8)]
    record = search(tmp_path / "run", loader, output=tmp_path / "merged", search="lawa", progress=False)
    reported = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "best")
    assert reported.dtype is torch.bfloat16
    assert HeldOutLoss(loader).evaluate(reported, "report").loss == pytest.approx(record.merged_loss, abs=1e-6)


def test_pickled_weights_only_if_allowed_and_never_code(tmp_path):
    for number in (1, 2):
        folder = saved(llama(), tmp_path / "run", [number]) / f"step{number}"
        torch.save(llama(seed=number).state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="pickle"):
        merge(tmp_path / "run", recipe="lawa", output=tmp_path / "mean")
    merge(tmp_path / "run", recipe="lawa", output=tmp_path / "mean", allow_pickle=True)
    torch.save({"state_dict": {}, "code": Module}, tmp_path / "step1.ckpt")
    torch.save({"state_dict": {}, "code": Module}, tmp_path / "step2.ckpt")
    with pytest.raises(ValueError, match=r"folders\.Module, which is not unpickled"):
        merge([tmp_path / "step1.ckpt", tmp_path / "step2.ckpt"], recipe="lawa", output=tmp_path / "other")


def test_adapters_are_merged_as_adapters(tmp_path):
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], r=2))
    for number in (1, 2):
        perturbed(model, number).save_pretrained(tmp_path / "run" / f"step{number}")
    folder = merge(tmp_path / "run", recipe="lawa", output=tmp_path / "mean")
    assert (folder / "adapter_model.safetensors").exists()
    assert (folder / "adapter_config.json").exists()
    load_merged(folder, model)


def test_integers_are_the_newest_checkpoints(tmp_path):
    for number in (1, 2):
        torch.save(
            {"weight": torch.full((3,), float(number)), "count": torch.tensor(number)}, tmp_path / f"step{number}.pt"
        )
    folder = merge([tmp_path / "step1.pt", tmp_path / "step2.pt"], weights=[0.5, 0.5], output=tmp_path / "mean")
    found = load_file(folder / "model.safetensors")
    assert found["count"] == 2
    assert found["weight"].tolist() == [1.5] * 3


def test_of_a_search_no_document_is_in_both_splits(tmp_path):
    path = tmp_path / "numbered.jsonl"
    texts = [chr(33 + number) * 200 for number in range(80)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    dealt = heldout_batches([str(path)], ByteTokenizer(), sequences=64, block_size=50, batch_size=8)["heldout"]
    found = {split: set() for split in ("search", "report")}
    for batch, split in dealt.batches:
        found[split] |= set(np.unique(batch["input_ids"].numpy()).tolist())
    assert not found["search"] & found["report"]
    assert min(map(len, found.values())) > 5


def test_where_memory_runs_out_batches_become_smaller(trainer_run, heldout_file, tmp_path, caplog):
    seen = []

    def nll(model, batch):
        seen.append(len(batch["input_ids"]))
        if len(batch["input_ids"]) > 2:
            raise torch.OutOfMemoryError("no memory")
        output = model(**batch)
        return output.loss * (batch["labels"].numel() - len(batch["labels"])), batch["labels"][:, 1:].numel()

    loader = [{"input_ids": part, "labels": part} for part in blocks(seed=1).split(8)]
    record = search(trainer_run, loader, output=tmp_path / "merged", last=3, nll=nll, progress=False)
    assert record.snapshot is not None
    assert "at most 2 sequences in a batch" in caplog.text
    assert max(seen[-10:]) <= 2
