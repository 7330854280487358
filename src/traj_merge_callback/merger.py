"""The engine: when to capture, when to merge, and what a merge is. It knows no trainer."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from .candidates import Candidates
from .choice import Choice, Chooser
from .config import MergeConfig
from .evaluation import Evaluation
from .failures import Failures
from .heldout import HeldOutLoss
from .isolation import preserved_rng
from .losses import Nll
from .metrics import MergeRecord, MetricsFile, report_losses
from .parameters import unwrap
from .progress import SlowProgress
from .resume import Memory, load_state, save_state
from .search import resolve_search
from .snapshots import SnapshotStore
from .weights import load_merged, save_weights, weights_format
from .window import CheckpointWindow

logger = logging.getLogger("traj_merge_callback")


class TrajectoryMerger:
    """Keeps a window of checkpoints of one run, merges them at fixed intervals and publishes the results.

    Call :meth:`step` after every optimizer step; the model's weights are read, never written. With several processes
    (DDP) the first one does all the work and ``step`` does nothing in the others.

    Args:
        heldout: held-out batches (a DataLoader, any iterable, or a mapping from domain names to such), read at once.
        nll: ``nll(model, batch) -> (summed NLL in nats, number of target tokens)``; by default the model's ``.loss``.
        precision: returns a context for forward passes, such as ``lambda: torch.autocast("cuda", torch.bfloat16)``.
        to_device: moves a batch to the training device; by default every tensor goes to the model's device.
        log: called with the :class:`MergeRecord` of each merge.
        write: called with a snapshot's folder while the model holds the merged weights, to add files to it.
        **config: the options of :class:`MergeConfig`.

    Example::

        merger = TrajectoryMerger(heldout_loader, capture_every=50, merge_every=500)
        for step, batch in enumerate(loader, start=1):
            ...  # forward, backward, optimizer.step()
            if record := merger.step(model, step):
                print(record.live_loss, record.merged_loss)
        merger.finish(model)

    Raises:
        ValueError, TypeError: an option is wrong, or ``heldout`` has nothing to hold out.
    """

    def __init__(
        self,
        heldout: Iterable[Any] | Mapping[str, Iterable[Any]],
        *,
        nll: Nll | None = None,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
        to_device: Callable[[Any], Any] | None = None,
        log: Callable[[MergeRecord], None] | None = None,
        write: Callable[[Path], None] | None = None,
        **config: Any,
    ) -> None:
        self.config = MergeConfig(**config)
        self.output_dir = Path(self.config.output_dir or "merged")
        self.window: CheckpointWindow | None = None
        self.records: list[MergeRecord] = []
        self._active = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if self.config.load_merged_at_end and torch.distributed.is_initialized():
            raise ValueError(
                "load_merged_at_end=True is not supported with several processes yet; "
                "load the best snapshot with load_merged after training"
            )
        self._log = log
        self._write = write
        self._metrics = MetricsFile(self.output_dir / "metrics.jsonl")
        self._failures = Failures(self.config.on_error)
        self._store = SnapshotStore(self.output_dir, keep_last=self.config.keep_last, keep_best=self.config.keep_best)
        if self._active:
            self.heldout = HeldOutLoss(
                heldout,
                nll=nll,
                batches=self.config.heldout_batches,
                search_fraction=self.config.search_fraction,
                report_only=self.config.report_only,
                precision=precision,
                to_device=to_device,
                seed=self.config.seed,
            )
            if unknown := set(self.config.domain_weights or {}) - self.heldout.searched:
                raise ValueError(
                    f"domain_weights={self.config.domain_weights}: {sorted(unknown)} are not among the domains "
                    f"searched on, {sorted(self.heldout.searched)}"
                )
            self._chooser = Chooser(self.config, self.heldout)
        self._memory = Memory()
        self._began = time.perf_counter()

    def prepare(self, model: nn.Module) -> None:
        """Allocate the window for ``model``. The first ``step`` does it otherwise.

        Raises:
            ValueError: the model cannot be merged (nothing trainable, or sharded parameters).
        """
        if not self._active or self.window is not None:
            return
        average_rate = getattr(resolve_search(self.config.search), "average_rate", None)
        options = self.config.search_options
        self.window = CheckpointWindow(
            model,
            self.config.window_size,
            dtype=self.config.dtype,
            trainable_only=self.config.trainable_only,
            average_rate=(lambda step: average_rate(step, **options)) if average_rate else None,
            mean_rows=self.config.row == "mean",
            groups=self.config.groups,
        )
        self._began = time.perf_counter()

    def step(self, model: nn.Module, step: int, *, skipped: Callable[[], bool] = lambda: False) -> MergeRecord | None:
        """Capture and merge if due. Call after each optimizer step.

        Args:
            model: the model being trained, at an optimizer-step boundary.
            step: the number of optimizer steps taken so far; the first one is 1.
            skipped: tells whether mixed precision skipped this step, so that the weights are the last step's. What is
                due then waits for the next step. Only asked when something is due.

        Returns:
            The record of the merge, if there was one.

        Raises:
            Exception: only with ``on_error="raise"``; otherwise failures are logged once and training goes on.
        """
        if not self._active:
            return None
        started = time.perf_counter()
        record = None
        if self.window is None:
            with self._failures.contained("preparing the window", step):
                self.prepare(model)
            if self.window is None:
                self._active = False
                return None
        previous = step - 1 if self._memory.last_step is None else self._memory.last_step
        with self._failures.contained("trajectory merging", step):
            samples = self.config.samples_per_row if self.config.row == "mean" else 1
            if step >= self.config.start_step and _passed(self.config.capture_every // samples, previous, step):
                if skipped():
                    return None
                self._memory.last_step = step
                if _passed(self.config.capture_every, previous, step):
                    self.window.push(model, step)
                else:
                    self.window.sample(model)
                if _passed(self.config.merge_every, previous, step):
                    record = self._merge(model, step, started)
        self._memory.last_step = step
        self._memory.busy_s += time.perf_counter() - started
        return record

    def merge_at_end(self, model: nn.Module) -> MergeRecord | None:
        """Merge at the last step of training, if ``merge_at_end`` is set and no merge was due there.

        Returns:
            The record of the merge, if one was made.
        """
        step = self._memory.last_step
        if self.window is None or step is None or not self.config.merge_at_end:
            return None
        record = None
        if step > self._memory.last_merge_step and step >= self.config.start_step:
            started = time.perf_counter()
            with self._failures.contained("the merge at the end", step):
                if self.window.steps[-1:] != (step,):
                    self.window.push(model, step)
                record = self._merge(model, step, started)
            self._memory.busy_s += time.perf_counter() - started
        return record

    def finish(self, model: nn.Module) -> MergeRecord | None:
        """The end of training: :meth:`merge_at_end`, load the best snapshot if ``load_merged_at_end``, and close.

        Returns:
            The record of the last merge, if one was made here.
        """
        record = self.merge_at_end(model)
        if self.window is not None and self.config.load_merged_at_end:
            with self._failures.contained("loading the best snapshot", self._memory.last_step or 0):
                if self.best_snapshot is None:
                    raise FileNotFoundError("load_merged_at_end=True, but no snapshot was published")
                load_merged(self.best_snapshot, model)
        self.close()
        return record

    def close(self) -> None:
        """Release the window's memory and sum up what failed. The published snapshots stay."""
        self._failures.summarise()
        self._failures.counts.clear()
        self.window = None

    def __enter__(self) -> TrajectoryMerger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def best_snapshot(self) -> Path | None:
        """The folder of the published snapshot of lowest merged loss so far."""
        return self.output_dir / self._store.best.name if self._store.best else None

    def live_evaluation(self, model: nn.Module) -> Evaluation:
        """The live model's loss on the report split, over the domains that are searched on."""
        return self.heldout.evaluate(model, "report").only(self.heldout.searched)

    # One merge

    def _merge(self, model: nn.Module, step: int, started: float) -> MergeRecord | None:
        window = self.window
        assert window is not None
        if len(window) < 2:
            logger.info("no merge at step %d: the window holds %d checkpoint", step, len(window))
            return None
        total = (
            self.config.evaluations * self.heldout.num_batches("search") + 2 * self.heldout.num_batches("report") + 1
        )
        self._memory.last_merge_step = step
        with preserved_rng(), SlowProgress(f"merging at step {step}", total, enabled=self.config.progress) as progress:
            candidates = Candidates(model, window, self.heldout, progress.advance)
            live_search = candidates.evaluate_live("search")
            if not math.isfinite(live_search.loss):
                raise ValueError(f"the live model's held-out loss on the search split is {live_search.loss}")
            chosen = self._chooser.choose(candidates, window, live_search, self._memory, step)
            live = candidates.evaluate_live("report")
            merged = live if chosen.weights is None else candidates.evaluate(chosen.weights, "report")
            losses = report_losses(live, merged, self.heldout.searched)
            if not math.isfinite(losses["gain"]):
                raise ValueError(f"the held-out loss on the report split is not finite: {losses}")
            snapshot = None
            progress.advance()
            with self._failures.contained("publishing a snapshot", step):
                if self.config.publishes:
                    snapshot = self._publish(model, step, chosen, losses)
        self._memory.history.append((step, losses["merged_loss"]))
        now = time.perf_counter()
        record = MergeRecord(
            step=step,
            search=self.config.search,
            checkpoint_steps=list(window.steps),
            **chosen.described,
            **losses,
            steps_saved=self._steps_saved(step, losses["live_loss"]),
            evaluations=chosen.evaluations,
            forward_equivalents=float(chosen.forward_equivalents),
            seconds=now - started,
            overhead=(self._memory.busy_s + now - started) / (self._memory.wall_s + now - self._began),
            window_bytes=window.nbytes,
            search_losses=chosen.search_losses,
            snapshot=str(snapshot) if snapshot else None,
        )
        self.records.append(record)
        with self._failures.contained("writing metrics.jsonl", step):
            self._metrics.append(record)
        with self._failures.contained("logging", step):
            if self._log is not None:
                self._log(record)
        return record

    def _publish(self, model: nn.Module, step: int, chosen: Choice, losses: dict[str, Any]) -> Path:
        window = self.window
        assert window is not None
        row = None if chosen.weights is None else window.combine(chosen.weights)

        def write(folder: Path) -> None:
            with window.layout.installed(model, row) if row is not None else nullcontext():
                save_weights(folder, model, window.layout)
                if self._write is not None:
                    self._write(folder)

        merge = {
            "step": step,
            "checkpoint_steps": list(window.steps),
            "row": self.config.row,
            "samples_per_row": self.config.samples_per_row if self.config.row == "mean" else 1,
            **chosen.described,
            "search": self.config.search,
            "search_options": self.config.search_options,
            "search_split": {f"{name}_loss": loss for name, loss in chosen.search_losses.items()},
            "report_split": losses,
            "row_dtype": window.dtype,
            "model_class": type(unwrap(model)).__name__,
            "weights_format": weights_format(model),
            "merged_tensors": [slot.name for slot in window.layout.slots],
        }
        return self._store.publish(step, losses["merged_loss"], write, merge)

    def _steps_saved(self, step: int, live_loss: float) -> int:
        return max((step - past for past, merged in self._memory.history if merged <= live_loss), default=0)

    # Resuming

    def save_state(self, folder: str | Path) -> None:
        """Write the window and the search's memory into a folder, which then exists whole or not at all.

        Does nothing before the first step.
        """
        if self.window is None or self._memory.last_step is None:
            return
        started = time.perf_counter()
        with self._failures.contained("saving the window", self._memory.last_step):
            memory = replace(self._memory, wall_s=self._memory.wall_s + started - self._began)
            snapshots = [vars(entry) for entry in self._store.entries]
            extra = {"heldout": self.heldout.digest, "snapshots": snapshots}
            save_state(Path(folder), self.window, memory, extra)
        self._memory.busy_s += time.perf_counter() - started

    def resume_from(self, folder: Path | None, model: nn.Module, step: int) -> None:
        """:meth:`load_state` for a trainer's resume: if nothing usable is found, say so and start an empty window."""
        self._metrics.resumed = True
        with self._failures.contained("restoring the window", step):
            if folder is None:
                raise FileNotFoundError("the checkpoint has no saved window beside it; the window starts empty")
            self.load_state(folder, model, step)

    def load_state(self, folder: str | Path, model: nn.Module, step: int) -> None:
        """Continue from :meth:`save_state`: the merges after it equal those of an uninterrupted run.

        Args:
            folder: where the state was saved.
            model: the model being trained.
            step: the step training resumes from.

        Raises:
            FileNotFoundError: no state there.
            ValueError: it was saved after that step, or belongs to a model with other parameters.
        """
        if not self._active:
            return
        self.prepare(model)
        assert self.window is not None
        self._memory, document = load_state(Path(folder), self.window, step)
        if document["heldout"] == self.heldout.digest:
            self._store.restore(document["snapshots"])
        else:
            logger.info("the held-out data changed since %s was saved: losses measured before are forgotten", folder)
            self._memory.row_losses, self._memory.search, self._memory.history = {}, {}, []
        self._metrics.resumed = True


def _passed(every: int, previous: int, step: int) -> bool:
    """Whether a multiple of ``every`` lies in ``(previous, step]``: also true if the exact step was skipped."""
    return step // every > previous // every
