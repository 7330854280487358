"""Lightning's validation loaders: several, or combined, are evaluated as the trainer evaluates them."""

import lightning.pytorch as pl
import pytest
import torch
from conftest import AT_ONCE, tiny_llama
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from traj_merge_callback.lightning import TrajMergeCallback

OPTIONS = {"window_size": 2, "capture_every": 2, "merge_every": 4, "evaluations": 2, "heldout_batches": 99} | AT_ONCE


class Module(pl.LightningModule):
    """The loss of the i-th loader is larger by 10 i, and by 100 i if transfer hooks do not know the loader."""

    def __init__(self):
        super().__init__()
        self.model = tiny_llama(dropout=0.0)

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "loader": dataloader_idx}

    def validation_step(self, batch, batch_idx, dataloader_idx=-1):
        batch, moved_as = dict(batch), batch["loader"]
        del batch["loader"]
        expected = max(0, dataloader_idx)
        loss = self.model(**batch).loss + 10 * dataloader_idx + 100 * (moved_as != expected)
        self.log("val_loss", loss, add_dataloader_idx=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class OnlyStrict(Module):
    """A validation step that must be told the loader."""

    def validation_step(self, batch, batch_idx, dataloader_idx):
        return super().validation_step(batch, batch_idx, dataloader_idx)


class AnyArguments(Module):
    """A validation step whose signature says nothing."""

    def validation_step(self, *args):
        return super().validation_step(*args)


def fit(tmp_path, train, val, module=None, **options):
    callback = TrajMergeCallback(**{**OPTIONS, "output_dir": str(tmp_path / "merged"), "on_error": "raise", **options})
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings |= {"enable_checkpointing": False, "val_check_interval": 4, "check_val_every_n_epoch": None}
    trainer = pl.Trainer(default_root_dir=tmp_path, max_steps=4, accelerator="cpu", callbacks=[callback], **settings)
    trainer.fit(module or Module(), DataLoader(train, batch_size=4), val)
    return trainer, callback.merger.records[-1]


def loaders(heldout):
    parts = [torch.utils.data.Subset(heldout, range(first, first + 16)) for first in (0, 16, 32)]
    return [DataLoader(part, batch_size=4) for part in parts]


GIVEN = {
    "a list": (lambda a, b, c: [a, b, c], ["0", "1", "2"]),
    "a mapping": (lambda a, b, c: {"x": a, "y": b, "z": c}, ["x", "y", "z"]),
    "nested": (lambda a, b, c: [a, {"x": b, "y": c}], ["0", "1", "2"]),
    "combined": (lambda a, b, c: CombinedLoader([a, b, c], "sequential"), ["0", "1", "2"]),
    "combined by name": (lambda a, b, c: CombinedLoader({"x": a, "y": b, "z": c}, "sequential"), ["x", "y", "z"]),
}


@pytest.mark.parametrize(
    ("kind", "given"), [(OnlyStrict, "a list"), (AnyArguments, "combined"), *((Module, given) for given in GIVEN)]
)
def test_batches_of_each_loader_are_evaluated_as_its_own(tmp_path, train, heldout, given, kind):
    make, names = GIVEN[given]
    trainer, record = fit(tmp_path, train, make(*loaders(heldout)), kind())
    assert list(record.domains) == names
    for index, name in enumerate(names):
        assert record.domains[name]["live_loss"] == pytest.approx(10 * index + 6, abs=1.0)
        # What the trainer's own validation of the same weights found for that loader, on all of its batches.
        found = float(trainer.callback_metrics[f"val_loss/dataloader_idx_{index}"])
        assert record.domains[name]["live_loss"] == pytest.approx(found, abs=0.5)


@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: [one], lambda one: CombinedLoader([one], "sequential")])
def test_a_single_loader_is_evaluated_without_an_index_as_lightning_does(tmp_path, train, heldout, wrap):
    trainer, record = fit(tmp_path, train, wrap(loaders(heldout)[0]))
    assert record.live_loss == pytest.approx(6 - 10, abs=1.0)
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(record.live_loss, abs=0.5)


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
@pytest.mark.parametrize("as_option", [False, True])
def test_joint_batches_are_refused_with_a_sentence_that_says_what_to_pass(tmp_path, train, heldout, mode, as_option):
    combined = CombinedLoader(dict(zip("xyz", loaders(heldout), strict=True)), mode)
    options = {"heldout": combined} if as_option else {}
    with pytest.raises(ValueError, match=rf"CombinedLoader\(mode='{mode}'\).*pass heldout=.*with nll="):
        fit(tmp_path, train, combined, JointModule(), **options)


def test_joint_batches_are_no_obstacle_where_held_out_data_is_given(tmp_path, train, heldout):
    def nll(module, batch):
        output = module.model(input_ids=batch["input_ids"], labels=batch["labels"])
        tokens = (batch["labels"][:, 1:] >= 0).sum()
        return output.loss * tokens, tokens

    combined = CombinedLoader(dict(zip("xyz", loaders(heldout), strict=True)), "max_size")
    one = CombinedLoader(dict(zip("xyz", loaders(heldout), strict=True)), "sequential")
    _, record = fit(tmp_path, train, combined, JointModule(), heldout=one, nll=nll)
    assert list(record.domains) == ["x", "y", "z"]


class JointModule(Module):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch

    def validation_step(self, batch, batch_idx):
        return sum(self.model(**one).loss for one in batch.values())
