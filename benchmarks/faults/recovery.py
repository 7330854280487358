"""Ways out of a loss spike, each in a run of its own: training on, going back to a merge, reloading a checkpoint."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trajectories import VOCABULARY, Spec, blocks_of

from realtext import Blocks
from traj_merge_callback import TrajectoryMerger

KINDS = ("burst", "poison", "overflow")
BATCH = 8
LEARNING_RATE = 1e-3
BURST_FACTOR, BURST_STEPS = 30.0, 10
# The poisoned batch: random bytes, its gradient this much larger and not clipped.
POISON_WEIGHT = 1000.0
MERGE_EVERY = 20
# Steps between two measurements of live.
EVERY = 5
ARMS: dict[str, dict[str, Any]] = {
    "training on": {},
    "rollback": {"on_spike": "rollback"},
    "rollback, moments kept": {"on_spike": "rollback", "spike_moments": "keep"},
    "last checkpoint": {},
}


class SpikedRun:
    """A small Llama on Python source, in whose training something goes wrong after one step.

    Args:
        kind: "burst": the learning rate is far too high for some steps; "poison": one batch is random bytes, with a
            huge gradient; "overflow": the model is trained in bfloat16, and the gradient of one step overflows.
        steps: of the run.
        spike: the step before.
        seed: of the model and of the order of the data.
    """

    def __init__(self, kind: str, steps: int, spike: int, seed: int) -> None:
        self.kind, self.steps, self.spike = kind, steps, spike
        self.spec = Spec("llama", "python", LEARNING_RATE, steps, width=64, layers=2)
        self.model = self.spec.build()
        torch.manual_seed(seed)
        if seed:
            for module in self.model.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
        if kind == "overflow":
            self.model.bfloat16()
        self.blocks = blocks_of(self.spec.text)[0]
        parameters = self.model.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Train; the number and the loss of each optimizer step."""
        for step in range(1, self.steps + 1):
            self.model.train()
            batch = self.blocks[torch.randint(len(self.blocks), (BATCH,))]
            bad = step == self.spike + 1
            if self.kind == "poison" and bad:
                batch = torch.randint(VOCABULARY, batch.shape)
            burst = self.kind == "burst" and self.spike < step <= self.spike + BURST_STEPS
            for group in self.optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, step / 50) * (BURST_FACTOR if burst else 1.0)
            loss = self.model(input_ids=batch, labels=batch).loss
            factors = {"poison": POISON_WEIGHT, "overflow": float("inf")}
            (loss * factors[self.kind] if bad and self.kind in factors else loss).backward()
            if not (self.kind == "poison" and bad):
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            yield step, loss.detach()


def recover(kind: str, arm: str, steps: int, spike: int, heldout: Tensor, seed: int) -> dict[str, Any]:
    """One run; live's loss on the report split every few steps, and the steps at which it went back.

    The last checkpoint (weights and optimizer, of the step of the last merge before the spike) is reloaded at the step
    at which a rollback looks at live.
    """
    torch.set_num_threads(1)
    run = SpikedRun(kind, steps, spike, seed)
    saved: dict[str, Any] = {}
    found: dict[str, Any] = {"steps": [], "live": [], "back_at": []}
    with tempfile.TemporaryDirectory() as folder:
        merger = TrajectoryMerger(
            DataLoader(Blocks(heldout), BATCH),
            output_dir=folder,
            merge_every=MERGE_EVERY,
            capture_every=EVERY,
            heldout_batches=len(heldout) // BATCH,
            schedule="blocking",
            merge_at_end=False,
            progress=False,
            optimizer=run.optimizer,
            **ARMS[arm],
        )
        # The first row after three losses that are far off.
        reload_at = spike + EVERY if kind == "overflow" else spike + 2 * EVERY
        for step, loss in run:
            before = merger.rollbacks
            merger.step(run.model, step, loss=loss)
            if merger.rollbacks > before:
                found["back_at"].append(step)
            if arm == "last checkpoint":
                if step % MERGE_EVERY == 0 and step <= spike:
                    saved = copy.deepcopy({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()})
                if step == reload_at:
                    merger.settle()
                    run.model.load_state_dict(saved["model"])
                    run.optimizer.load_state_dict(saved["optimizer"])
                    found["back_at"].append(step)
            if step % EVERY == 0:
                found["steps"].append(step)
                found["live"].append(merger.heldout.evaluate(run.model, "report").loss)
        merger.close()
    return found
