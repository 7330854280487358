"""Real text and small real models, shared by all tests."""

import os
import sys
import threading
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

import realtext
from traj_merge_callback import Evaluation
from traj_merge_callback.distributed import Processes
from traj_merge_callback.engine import choose
from traj_merge_callback.evaluate.language_model import language_model_nll
from traj_merge_callback.window.pieces import finish

torch.set_num_threads(1)
transformers_logging.set_verbosity_error()
LENGTH = 32
# Every merge is made, whole, at the step where it is due.
AT_ONCE = {"schedule": "blocking", "max_overhead": None}


@pytest.fixture(scope="session")
def text() -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out blocks of the standard library, shape (blocks, 32)."""
    files = realtext.python_source()[:60]
    return realtext.split_blocks(files, LENGTH)


@pytest.fixture
def train(text) -> realtext.Blocks:
    return realtext.Blocks(text[0][:2000])


@pytest.fixture
def heldout(text) -> realtext.Blocks:
    return realtext.Blocks(text[1][:48])


@pytest.fixture
def loader(heldout) -> DataLoader:
    """The held-out data in order."""
    return DataLoader(heldout, batch_size=8)


@pytest.fixture
def our_threads():
    """The names of the threads that the library has started since the test began, and that are still there."""
    before = set(threading.enumerate())
    return lambda: [t.name for t in threading.enumerate() if t not in before and t.name.startswith("traj-merge")]


def tiny_llama(seed: int = 0, dropout: float = 0.1, **config) -> LlamaForCausalLM:
    """A two-layer Llama with dropout and tied embeddings, about 25 thousand parameters."""
    torch.manual_seed(seed)
    options = {
        "vocab_size": realtext.VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "attention_dropout": dropout,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**options, **config}))


def warnings_of(caplog) -> list[str]:
    """The messages of all warnings, but for the one that merges take most of the time, as they do of tiny models."""
    found = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    return [message for message in found if not message.startswith("merges take")]


def nll_without_gradients(model, batch):
    """The loss of a language model, detached from its parameters."""
    nll, tokens = language_model_nll(model, batch)
    return nll.detach(), tokens


def overflow_at(model: torch.nn.Module, backward_passes: set[int]) -> None:
    """Let the gradients of these backward passes (counted from 1) overflow, as fp16 gradients sometimes do."""
    count = 0

    def hook(gradient):
        nonlocal count
        count += 1
        return gradient * float("inf") if count in backward_passes else gradient

    model.get_output_embeddings().weight.register_hook(hook)


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two models' state dicts are equal, bit for bit."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train_steps(model, blocks, steps: int, each=None, start: int = 0, lr: float = 3e-3, optimizer=None):
    """A plain training loop whose data order depends on torch's global generator; ``each(step)`` after every step."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(start + 1, start + steps + 1):
        batch = blocks.blocks[torch.randint(len(blocks), (8,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if each is not None:
            each(step)
    return model


def select(search, problem, measure, start, row_losses):
    """``choose.select`` at once, with a ``measure`` that is a plain function."""

    def measuring(*arguments):
        return measure(*arguments)
        yield  # which makes it a generator, as pieces are

    alone = Processes(alone=True)
    return finish(choose.select(lambda: search, problem, measuring, start, row_losses, alone))


def evaluation(*losses):
    """An evaluation with one batch of one token for each loss."""
    return Evaluation(np.array(losses), np.ones(len(losses)), ("",) * len(losses), tuple(range(len(losses))))
