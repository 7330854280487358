"""The default loss is the language-model loss alone, over the right targets, whatever the model's ``.loss`` holds."""

import logging

import peft
import pytest
import torch
from conftest import tiny_llama
from torch import nn
from torch.nn import functional
from transformers import (
    BartConfig,
    BartForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

from traj_merge_callback import CheckpointWindow, HeldOutLoss
from traj_merge_callback.evaluate.candidate import Candidates, weights_in
from traj_merge_callback.evaluate.parking import Parking
from traj_merge_callback.window.pieces import finish

SMALL = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2}


def mixtral():
    sizes = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**SMALL, **sizes, output_router_logits=True, router_aux_loss_coef=0.02))


def jetmoe():
    sizes = {"intermediate_size": 32, "num_key_value_heads": 1, "kv_channels": 16, "num_local_experts": 4}
    return JetMoeForCausalLM(JetMoeConfig(**SMALL, **sizes, output_router_logits=True))


class Smoothed(LlamaForCausalLM):
    """Trains with label smoothing and a z-loss, inside the model."""

    def forward(self, input_ids, labels=None, **kwargs):
        output = super().forward(input_ids, **kwargs)
        if labels is not None:
            logits, targets = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            output.loss = functional.cross_entropy(logits, targets, label_smoothing=0.1)
            output.loss = output.loss + 1e-4 * logits.logsumexp(-1).square().mean()
        return output


class Wrapped(nn.Module):
    """A model of one's own around another, with a second objective, that returns a dictionary."""

    def __init__(self):
        super().__init__()
        self.model = tiny_llama()

    def forward(self, **batch):
        output = self.model(**batch)
        return {"loss": output.loss + output.logits.square().mean(), "logits": output.logits}


@torch.no_grad()
def by_hand(model, loss, split, shift=1):
    model.eval()
    ids = torch.cat([batch.data["input_ids"] for batch in loss._batches[split]])
    labels = torch.cat([batch.data["labels"] for batch in loss._batches[split]])
    output = model(input_ids=ids)
    logits = (output["logits"] if isinstance(output, dict) else output.logits)[:, -ids.shape[1] :]
    logits, labels = logits[:, : ids.shape[1] - shift], labels[:, shift:]
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item(), int((labels != -100).sum())


@pytest.fixture
def batches(heldout):
    labels = heldout.blocks.clone()
    labels[:, :3] = -100
    return [{"input_ids": heldout.blocks[i : i + 8], "labels": labels[i : i + 8]} for i in range(0, 48, 8)]


def wrapped_by_hand(model):
    return model.model if isinstance(model, Wrapped) else model


@pytest.mark.parametrize(
    "build", [mixtral, jetmoe, lambda: Smoothed(tiny_llama().config), Wrapped], ids=["mixtral", "jetmoe", "own", "dict"]
)
def test_what_else_the_loss_holds_is_left_out_and_said(build, batches, caplog):
    torch.manual_seed(0)
    model = build()
    with caplog.at_level(logging.INFO, "traj_merge_callback"):
        loss = HeldOutLoss(batches)
        found = loss.evaluate(model, "report")
        loss.evaluate(model, "search")
    expected, tokens = by_hand(wrapped_by_hand(model), loss, "report")
    assert found.loss == pytest.approx(expected, abs=1e-5)
    assert found.tokens.sum() == tokens
    assert caplog.text.count("holds more than the language-model loss") == 1
    with torch.no_grad():
        assert model(**batches[0])["loss"].item() != pytest.approx(expected, abs=1e-3)


def test_gradients_are_of_the_language_model_loss(batches):
    model = Wrapped()
    window = CheckpointWindow(model, 2)
    window.push(model, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    window.push(model, 2)
    loss = HeldOutLoss(batches)
    parking = Parking(torch.device("cpu"), window.processes)
    candidates = Candidates(weights_in(model, window, 0, parking), window, loss)

    def measure(weight, gradient):
        weights = torch.tensor([1 - weight, weight], dtype=torch.float64).numpy()
        return finish(candidates.measure(weights, gradient, range(loss.parts), lambda _: False))

    slopes = measure(0.5, True)[1].of(frozenset(["heldout"]))
    rise = measure(0.52, False)[0].loss - measure(0.48, False)[0].loss
    assert slopes[1] - slopes[0] == pytest.approx(rise / 0.04, rel=5e-2, abs=2e-3)


@pytest.mark.parametrize(
    "model",
    [
        lambda: XLNetLMHeadModel(XLNetConfig(vocab_size=256, d_model=16, n_layer=1, n_head=2, d_inner=16)),
        lambda: BartForCausalLM(
            BartConfig(
                vocab_size=256, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16,
                max_position_embeddings=64, is_encoder_decoder=False, is_decoder=True,
            )
        ),
    ],
    ids=["xlnet", "bart"],
)  # fmt: skip
def test_models_that_do_not_shift_are_recognised_by_their_numbers(model, batches, caplog):
    torch.manual_seed(0)
    model = model()
    with caplog.at_level(logging.INFO, "traj_merge_callback"):
        loss = HeldOutLoss(batches)
        found = loss.evaluate(model, "report")
    expected, tokens = by_hand(model, loss, "report", shift=0)
    assert found.loss == pytest.approx(expected, abs=1e-5)
    assert found.tokens.sum() == tokens
    assert "holds more" not in caplog.text


def test_virtual_tokens_of_prompt_tuning_give_the_first_label_a_prediction(heldout):
    model = peft.get_peft_model(
        tiny_llama(dropout=0.0), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    ids = heldout.blocks[:8]
    loss = HeldOutLoss([{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}])
    assert loss.evaluate(model, "report").tokens.tolist() == [32.0] * 4


def test_a_loss_without_logits_is_taken_as_it_is(batches):
    class Fused(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = None
            return output

    model = Fused(tiny_llama().config)
    loss = HeldOutLoss(batches)
    plain = LlamaForCausalLM(model.config)
    plain.load_state_dict(model.state_dict())
    assert loss.evaluate(model, "report").loss == pytest.approx(by_hand(plain, loss, "report")[0], abs=1e-5)
