"""Text, models and checkpoints of many kinds for the offline commands."""

import json
import random

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

WORDS = ["the", "model", "of", "rows", "is", "merged", "and", "read", "by", "a", "loop", "that", "sums", "weights"]


def documents(count, seed):
    """Texts with something to learn, about 300 characters each."""
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(60)) for _ in range(count)]


def blocks(seed, count=64, length=32):
    """Sequences of bytes of such texts."""
    data = torch.tensor(list("\n".join(documents(count, seed)).encode()))
    return data[: len(data) // length * length].view(-1, length)


def llama(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": 256, "max_position_embeddings": 64, **sizes, **options}))


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=256, n_positions=64, n_embd=32, n_layer=2, n_head=4)
        self.net = GPT2LMHeadModel(config)

    def training_step(self, batch, index):
        return self.net(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def perturbed(model, number):
    """The model after a little noise, another for each number."""
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def saved(model, folder, numbers, **options):
    """Folders ``step<number>`` with perturbed versions of a model, as save_pretrained writes them."""
    for number in numbers:
        perturbed(model, number).save_pretrained(folder / f"step{number}", **options)
    return folder


# Fixtures, for tests with pytest_plugins = ["folders"]: a conftest of this folder would hide that of all tests.


@pytest.fixture(scope="session")
def heldout_file(tmp_path_factory):
    """A file of JSON lines with held-out documents."""
    path = tmp_path_factory.mktemp("heldout") / "heldout.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(60, seed=1)))
    return path


@pytest.fixture(scope="session")
def trainer_run(tmp_path_factory):
    """The output folder of transformers.Trainer: checkpoint-20 to checkpoint-120, and the final model beside them."""
    folder = tmp_path_factory.mktemp("trainer")
    train = [{"input_ids": row, "labels": row} for row in blocks(seed=0)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=120,
        save_steps=20,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(llama(), arguments, train_dataset=train)
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture(scope="session")
def lightning_run(tmp_path_factory):
    """The output folder of Lightning's Trainer."""
    folder = tmp_path_factory.mktemp("lightning")
    saving = pl.callbacks.ModelCheckpoint(every_n_train_steps=10, save_top_k=-1)
    trainer = pl.Trainer(
        max_steps=40,
        callbacks=[saving],
        default_root_dir=folder,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(blocks(seed=0), batch_size=8))
    return folder / "lightning_logs"
