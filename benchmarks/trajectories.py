"""Real pretraining runs for the benchmarks: constant learning rate, with twins whose learning rate decays to zero.

Each run keeps its weights every few optimizer steps; made once, then read from ``runs/trajectories``.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from realtext import VOCABULARY, cpp_headers, language_reference, python_source, split_blocks

CACHE = Path(__file__).parents[1] / "runs" / "trajectories"
LENGTH = 128
BATCH = 16
WARM_UP = 100
# Lightning's EMAWeightAveraging keeps one average, updated after every step; these are the decays swept over.
EMA_DECAYS = (0.9, 0.99, 0.999)
# TRL's BEMACallback: defaults of BEMA (arXiv 2508.00180), updated every 400 steps.
BEMA_EVERY, BEMA_BIAS_POWER, BEMA_EMA_POWER, BEMA_LAG = 400, 0.2, 0.5, 10.0
TEXTS = {"python": python_source, "cpp": cpp_headers}


@dataclass(frozen=True)
class Spec:
    """One trajectory.

    Args:
        family: "llama" or "gpt2".
        text: "python" or "cpp".
        learning_rate: constant after a warm-up of ``WARM_UP`` steps.
        steps: optimizer steps.
        points: steps at which merges are studied; each has a decayed twin.
        sample_every: optimizer steps between two kept checkpoints.
        width: hidden size.
        layers: number of blocks.
    """

    family: str
    text: str
    learning_rate: float
    steps: int = 2000
    points: tuple[int, ...] = (1000, 1500, 2000)
    sample_every: int = 10
    width: int = 128
    layers: int = 4

    @property
    def name(self) -> str:
        """A name for people."""
        return f"{self.family} {self.text} {self.learning_rate:g}"

    @property
    def folder(self) -> Path:
        """Where the cached run lies."""
        return CACHE / f"{self.family}-{self.text}-{self.learning_rate:g}-{self.width}x{self.layers}-{self.steps}"

    def build(self) -> nn.Module:
        """The untrained model, the same one every time."""
        torch.manual_seed(0)
        if self.family == "llama":
            return LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=VOCABULARY,
                    hidden_size=self.width,
                    intermediate_size=3 * self.width,
                    num_hidden_layers=self.layers,
                    num_attention_heads=4,
                    max_position_embeddings=LENGTH,
                    tie_word_embeddings=True,
                    bos_token_id=0,
                    eos_token_id=0,
                )
            )
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=LENGTH,
                n_embd=self.width,
                n_layer=self.layers,
                n_head=4,
                bos_token_id=0,
                eos_token_id=0,
            )
        )


@dataclass(frozen=True)
class Trajectory:
    """A finished run.

    Args:
        spec: how it was made.
        samples: checkpoints at steps ``sample_every, 2 sample_every, ...``, shape ``(samples, N)``, memory-mapped.
        finals: per point a dict of rows of shape ``(N,)``: "decayed" and the baselines' running averages.
    """

    spec: Spec
    samples: np.ndarray
    finals: dict[int, dict[str, np.ndarray]]

    def at(self, step: int) -> Tensor:
        """The checkpoint after ``step`` optimizer steps."""
        return torch.from_numpy(np.array(self.samples[step // self.spec.sample_every - 1]))


def blocks_of(text: str) -> tuple[Tensor, Tensor]:
    """Training and held-out blocks of a text."""
    return split_blocks(TEXTS[text](), length=LENGTH)


def prose_blocks() -> Tensor:
    """English prose that no run is trained on."""
    return split_blocks(language_reference(), length=LENGTH, heldout_every=2)[1]


def load(specs: list[Spec]) -> list[Trajectory]:
    """The trajectories, trained first if they are not cached."""
    missing = [spec for spec in specs if not (spec.folder / "spec.json").exists()]
    if missing:
        _train_all(missing)
    return [_read(spec) for spec in specs]


def _read(spec: Spec) -> Trajectory:
    finals = {point: dict(np.load(spec.folder / f"averages-{point}.npz")) for point in spec.points}
    for point, rows in finals.items():
        rows["decayed"] = np.load(spec.folder / f"decayed-{point}.npy")
    return Trajectory(spec, np.load(spec.folder / "samples.npy", mmap_mode="r"), finals)


def _train_all(specs: list[Spec]) -> None:
    # Each process trains on one thread: models this small do not gain from more.
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        trunks = {pool.submit(_train_constant, spec): spec for spec in specs}
        branches: list[Future[None]] = []
        for done in as_completed(trunks):
            done.result()
            branches += [pool.submit(_train_decayed, trunks[done], point) for point in trunks[done].points]
        for branch in branches:
            branch.result()
    for spec in specs:
        for point in spec.points:
            (spec.folder / f"fork-{point}.pt").unlink()
        (spec.folder / "spec.json").write_text(json.dumps(asdict(spec)))


def _fork_step(point: int) -> int:
    """The twin's learning rate decays over the last 40 % of its steps; before that the runs are one."""
    return point * 3 // 5


class _Run:
    """A model in training; which sequences a step sees depends on the step alone."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.model = spec.build()
        self.model.train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=spec.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
        )
        self.blocks = blocks_of(spec.text)[0]

    def step(self, step: int, learning_rate: float) -> None:
        """Take optimizer step number ``step``, the first being 1."""
        chosen = torch.arange((step - 1) * BATCH, step * BATCH) % len(self.blocks)
        batch = self.blocks[chosen]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def row(self) -> Tensor:
        """A copy of the weights, shape ``(N,)``."""
        return parameters_to_vector(self.model.parameters()).detach().clone()


def _train_constant(spec: Spec) -> None:
    shutil.rmtree(spec.folder, ignore_errors=True)
    spec.folder.mkdir(parents=True)
    run = _Run(spec)
    start = run.row()
    averages = {f"ema {decay}": start.clone() for decay in EMA_DECAYS} | {"bema": start.clone()}
    bema_average = start.clone()
    shape = (spec.steps // spec.sample_every, len(start))
    samples = np.lib.format.open_memmap(spec.folder / "samples.npy", mode="w+", dtype=np.float32, shape=shape)
    for step in range(1, spec.steps + 1):
        run.step(step, spec.learning_rate * min(1.0, step / WARM_UP))
        row = run.row()
        for decay in EMA_DECAYS:
            averages[f"ema {decay}"].lerp_(row, 1.0 - decay)
        if step % BEMA_EVERY == 0:
            bema_average.lerp_(row, (BEMA_LAG + step) ** -BEMA_EMA_POWER)
            averages["bema"] = bema_average + (BEMA_LAG + step) ** -BEMA_BIAS_POWER * (row - start)
        if step % spec.sample_every == 0:
            samples[step // spec.sample_every - 1] = row.numpy()
        for point in spec.points:
            if step == _fork_step(point):
                state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
                torch.save(state, spec.folder / f"fork-{point}.pt")
            if step == point:
                rows = {name: average.numpy() for name, average in averages.items()}
                np.savez(spec.folder / f"averages-{point}.npz", **rows)  # type: ignore[arg-type]
    samples.flush()


def _train_decayed(spec: Spec, point: int) -> None:
    run = _Run(spec)
    state = torch.load(spec.folder / f"fork-{point}.pt")
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    begin = _fork_step(point)
    for step in range(begin + 1, point + 1):
        left = (point - step) / (point - begin)
        run.step(step, spec.learning_rate * min(1.0, step / WARM_UP) * left)
    np.save(spec.folder / f"decayed-{point}.npy", run.row().numpy())


def put(model: nn.Module, row: Tensor) -> None:
    """Give the model the weights of a row of shape ``(N,)``."""
    assert math.prod(row.shape) == sum(parameter.numel() for parameter in model.parameters())
    vector_to_parameters(row.clone(), model.parameters())
