"""Which number is a model's loss, where its output leaves room for doubt."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional

from traj_merge_callback import HeldOutLoss
from traj_merge_callback.evaluate.language_model import LanguageModelNll


class Model(nn.Module):
    """Logits and a loss, in whatever form is asked for."""

    def __init__(self, form, extra=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.out = nn.Embedding(16, 8), nn.Linear(8, 16)
        self.form, self.extra = form, extra

    def forward(self, input_ids, labels, topic=None):
        logits = self.out(self.inside(input_ids))
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss = loss + (0.5 if topic is not None else 0.0) + self.extra
        return self.form(logits, loss)


def batches(**more):
    ids = torch.randint(16, (8, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": pair, "labels": pair, **more} for pair in ids.split(2)]


def expected(model, split_of):
    model.form, model.extra = (lambda logits, loss: {"loss": loss, "logits": logits}), 0.0
    return HeldOutLoss(batches()).evaluate(model, split_of).loss


@pytest.mark.parametrize(
    "form",
    [
        lambda logits, loss: (logits, loss),
        lambda logits, loss: (loss, logits),
        lambda logits, loss: {"loss": loss, "prediction_logits": logits},
    ],
    ids=["(logits, loss)", "(loss, logits)", "other name"],
)
def test_the_loss_is_the_scalar_and_logits_are_found_by_their_shape(form):
    model = Model(form, extra=0.25)
    found = HeldOutLoss(batches()).evaluate(model, "report").loss
    assert found == pytest.approx(expected(model, "report"), rel=1e-5)


def test_two_scalars_in_a_tuple_are_refused():
    with pytest.raises(TypeError, match="pass nll="):
        LanguageModelNll()(Model(lambda logits, loss: (loss, loss * 2, logits)), batches()[0])


def test_what_a_loss_holds_later_or_in_some_batches_only_is_left_out_too():
    model = Model(lambda logits, loss: {"loss": loss, "logits": logits})
    held, plain = HeldOutLoss(batches()), expected(model, "report")
    assert held.evaluate(model, "report").loss == pytest.approx(plain, rel=1e-5)
    model.extra = 0.3
    assert held.evaluate(model, "report").loss == pytest.approx(plain, rel=1e-5)
    mixed = [*batches()[:2], *[{**batch, "topic": torch.zeros(2)} for batch in batches()[2:]]]
    model = Model(model.form)
    assert HeldOutLoss(mixed).evaluate(model, "report").loss == pytest.approx(plain, rel=1e-5)


def test_a_loss_without_logits_is_said_to_be_taken_as_it_is(caplog):
    with caplog.at_level(logging.INFO, logger="traj_merge_callback"):
        HeldOutLoss(batches()).evaluate(Model(lambda logits, loss: {"loss": loss}), "report")
    assert len([line for line in caplog.messages if "taken as it is" in line]) == 1
