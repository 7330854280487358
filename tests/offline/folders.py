"""Text, models and checkpoints of many kinds for the offline commands."""

import random

import lightning.pytorch as pl
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

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
