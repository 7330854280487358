"""Snapshots of Hugging Face models have a card, and can be pushed to the Hub."""

import json

import pytest
import torch
from conftest import AT_ONCE, same_weights, tiny_llama, train_steps
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import OfflineModeIsEnabled
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from traj_merge_callback import TrajectoryMerger, load_merged, read_merge
from traj_merge_callback.transformers import push_to_hub

OPTIONS = {"window_size": 3, "capture_every": 1, "merge_every": 2, "evaluations": 3, "heldout_batches": 2} | AT_ONCE


def published(folder, heldout, model, train=None, **options):
    """The snapshot of a short run."""
    merger = TrajectoryMerger(heldout, output_dir=folder, on_error="raise", **{**OPTIONS, **options})
    if train is None:
        for step in (1, 2):
            merger.settle()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.01)
            merger.step(model, step)
    else:
        train_steps(model, train, 4, lambda step: merger.step(model, step))
    merger.finish(model)
    return merger.best_snapshot, merger.records[-1]


def block_of(card):
    """The Python block of a card, to be run."""
    return card.text.split("```python\n")[1].split("```")[0]


def test_the_card_says_what_the_model_is_worth_and_its_block_loads_it(tmp_path, loader, heldout, train):
    other = DataLoader(heldout, batch_size=4)
    model = tiny_llama()
    model.config.name_or_path = "HuggingFaceTB/SmolLM2-135M"
    snapshot, _ = published(tmp_path, {"code": loader, "more": other}, model, train)
    merge, card = read_merge(snapshot), ModelCard.load(snapshot / "README.md")
    report = merge["report_split"]
    for name, losses in {"all": report, **report["domains"]}.items():
        assert (
            f"| {name} | {losses['live_loss']:.4f} | {losses['merged_loss']:.4f} | {losses['gain']:.4f} ± "
            f"{losses['gain_stderr']:.4f} |" in card.text
        )
    for span, weight in zip(merge["row_spans"], merge["weights"]):
        assert f"| {span[2]} | {weight:.4f} |" in card.text
    assert merge["run"] in card.text
    assert f"torch {torch.__version__}" in card.text
    assert (card.data.library_name, card.data.base_model) == ("transformers", "HuggingFaceTB/SmolLM2-135M")
    assert "checkpoint-merging" in card.data.tags
    loaded: dict = {}
    exec(block_of(card).replace("<this folder or repository>", str(snapshot)), loaded)
    assert same_weights(loaded["model"], AutoModelForCausalLM.from_pretrained(snapshot))


def test_a_card_may_be_edited_and_weights_may_not(tmp_path, loader, train):
    snapshot, _ = published(tmp_path, loader, tiny_llama(), train)
    (snapshot / "README.md").write_text("Mine.")
    load_merged(snapshot, tiny_llama(), verify=True)
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        push_to_hub(snapshot, "me/model")


def test_an_adapter_keeps_what_peft_says_of_it(tmp_path, loader):
    peft = pytest.importorskip("peft")
    base = tiny_llama()
    base.name_or_path = base.config.name_or_path = str(tmp_path)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    snapshot, _ = published(tmp_path / "merged", loader, model)
    card = ModelCard.load(snapshot / "README.md")
    assert card.data.library_name == "peft"
    assert "AutoPeftModelForCausalLM" in block_of(card)


def test_a_plain_module_has_no_card_and_is_not_pushed(tmp_path):
    model, batch = nn.Linear(2, 2), {"x": torch.randn(8, 2)}
    snapshot, _ = published(tmp_path, [batch], model, nll=lambda m, b: (m(b["x"]).square().sum(), len(b["x"])))
    assert not (snapshot / "README.md").exists()
    with pytest.raises(ValueError, match="is of Linear, which is no Hugging Face model"):
        push_to_hub(snapshot, "me/model")


def test_pushing_checks_follows_the_link_once_and_asks_the_hub(tmp_path, loader, train):
    snapshot, _ = published(tmp_path, loader, tiny_llama(), train)
    # Everything up to the network, which tests do without.
    with pytest.raises(OfflineModeIsEnabled):
        push_to_hub(tmp_path / "best", "me/model")
    uploaded = HfApi()._prepare_upload_folder_additions(
        snapshot,
        "",
        repo_type="model",
        token=False,
        ignore_patterns=["README.md"],  # whose metadata the Hub checks
    )
    names = {one.path_in_repo for one in uploaded}
    assert names == {"config.json", "generation_config.json", "merge.json", "model.safetensors"}
    with pytest.raises(FileNotFoundError, match=r"no merge\.json"):
        push_to_hub(tmp_path, "me/model")
    merge = json.loads((snapshot / "merge.json").read_text())
    (snapshot / "merge.json").write_text(json.dumps({**merge, "sharded": {"parts": {}}}))
    with pytest.raises(ValueError, match="is in parts: make a model folder of it first"):
        push_to_hub(snapshot, "me/model")
