"""One merge, in pieces: live, the search, the report, the snapshot."""

from __future__ import annotations

import functools
import logging
import math
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import MergeConfig
from ..evaluate.by_parameter.fisher import FisherInformation
from ..evaluate.by_parameter.regmean import RegressionMean
from ..evaluate.candidate import ByParameter, Candidates, weights_in
from ..evaluate.fsdp import Units
from ..evaluate.heldout import HeldOutLoss, Ready, device_of
from ..evaluate.kept import Keeper, Kept
from ..evaluate.parking import Parking
from ..evaluate.untouched.isolation import isolated
from ..metrics import MergeRecord, report_losses
from ..search import resolve_search
from ..search.problem import SearchState
from ..window.matrix import Matrix
from ..window.memory import refused_on_all
from ..window.names import unwrap
from ..window.pieces import PUBLISH, Pieces
from .choose import Chooser
from .first_pass import first_pass
from .publish import Publisher

logger = logging.getLogger("traj_merge_callback")


@dataclass
class LastMerge:
    """A merge that is kept.

    Args:
        row: this rank's columns, float32 in CPU memory, shape ``(N,)``.
        step: of the merge; None: there is none yet.
        loss: the objective on the search split.
    """

    row: Tensor
    step: int | None = None
    loss: float = math.nan

    def take(self, row: Tensor, step: int, loss: float) -> None:
        """Keep another one."""
        self.row.copy_(row)
        self.step, self.loss = step, loss


class Merge:
    """What a merge of one run does; it knows nothing of time.

    Args:
        model: the model being trained.
        window: its checkpoints.
        config: the options.
        heldout: the held-out loss.
        chooser: of merge weights.
        publisher: of snapshots.
    """

    def __init__(
        self,
        model: nn.Module,
        window: Matrix,
        config: MergeConfig,
        heldout: HeldOutLoss,
        chooser: Chooser,
        publisher: Publisher,
    ) -> None:
        self.window = window
        self.chooser = chooser
        self._config = config
        self._heldout = heldout
        self._publisher = publisher
        self.parking = Parking(device_of(model), window.processes)
        with window.processes.raise_on_all():
            self._keeper = Keeper(model, {slot.name for slot in window.layout.slots if slot.is_parameter})
        #: The last merge made when training was well; None where none is kept.
        self.last: LastMerge | None = None
        if config.on_spike is not None:
            with refused_on_all(window.processes, config.num_rows):
                self.last = LastMerge(torch.empty(window.layout.numel))
        self._by_parameter = self._weighing(model)
        self._said_costly = False
        self._units = Units(model, window.layout, window.processes) if window.layout.sharding.units else None

    def first_pass(self, model: nn.Module) -> None:
        """Evaluate live on one held-out batch of each domain, before there are rows; see :func:`first_pass`."""
        try:
            with self.window.processes.raise_on_all():
                first_pass(model, self._heldout, self._as_it_is(model))
        finally:
            self.parking.release()

    def _as_it_is(self, model: nn.Module) -> Ready:
        """A context in which the model computes with its own weights as they are now."""
        if self._units is None:
            isolate = functools.partial(isolated, unwrap(model), self._heldout.seed)
            return lambda gradients: isolate(gradients=gradients)
        # FSDP itself begins with the first forward pass of training, and its collectives are training's.
        layout, weights = self.window.layout, self._candidates(model, Kept()).weights
        tensors = layout.locals(layout.tensors(model))
        for columns, tensor in layout.pairs(weights.row, tensors, [True] * len(tensors)):
            columns.copy_(tensor)
        return weights.ready

    def live_loss(self, model: nn.Module) -> Pieces[float]:
        """The objective of live on the search split, with its weights as they are now."""
        found = yield from self._heldout.evaluate_pieces(model, "search", self._as_it_is(model))
        return self.chooser.objective(found).live_loss

    def put_back(self, model: nn.Module) -> Pieces[bool]:
        """Write the last merge into the model, between two optimizer steps; True when that is done."""
        assert self.last is not None
        weights = self._candidates(model, Kept()).weights
        weights.row.copy_(self.last.row)
        yield from weights.gather()
        weights.write()
        return True

    def probe(self, model: nn.Module) -> Pieces[None]:
        """Do pieces of the commonest kinds, to learn how long they take."""
        self.window.settle_together()
        if not len(self.window):  # the first checkpoint was not finite: another time
            return
        candidates = self._candidates(model, Kept())
        with self.window.in_use():
            yield from candidates.load(None)
        for _ in range(2):  # the first forward pass of a kind is slow
            yield from candidates.sample()

    def keep(self, model: nn.Module) -> Kept:
        """What a merge of the window as it is now takes from live: that of the step of the newest row."""
        return self._keeper.keep(model)

    def pieces(
        self, model: nn.Module, kept: Kept, state: SearchState, step: int, evaluations: int
    ) -> Pieces[MergeRecord]:
        """Merge the window as it is now; nothing is captured until its rows are not needed any more.

        Args:
            model: the model being trained.
            kept: see :meth:`keep`.
            state: what the last merge remembers; what this one learns is written to it.
            step: optimizer step, that of the window's newest row.
            evaluations: what may be spent, in passes over the search split, live included.

        Returns:
            The record, but for what is known when the merge is done: its times.
        """
        in_use = ExitStack()
        in_use.enter_context(self.window.in_use())
        return self._pieces(model, kept, state, step, evaluations, in_use)

    def _pieces(
        self, model: nn.Module, kept: Kept, state: SearchState, step: int, evaluations: int, in_use: ExitStack
    ) -> Pieces[MergeRecord]:
        window = self.window
        with in_use:
            if self._by_parameter is not None:
                in_use.callback(self._by_parameter.release)
            window.settle_together()
            if window.steps[-1:] != (step,):
                raise ValueError("the model's weights are not finite, so there is no merge of them")
            steps = list(window.steps)
            candidates = self._candidates(model, kept)
            yield from candidates.prepare()
            yield from candidates.load(None)
            left_out = self._heldout.left_out
            live_search = yield from candidates.evaluate_live("search")
            if not math.isfinite(live_search.loss):
                raise ValueError(f"the live model's held-out loss on the search split is {live_search.loss}")
            live = merged = yield from candidates.evaluate_live("report")
            if self._heldout.left_out > left_out:
                state.forget()  # losses of earlier merges are of more sequences
            learnt = yield from candidates.learn()
            left = evaluations - math.ceil(learnt)
            if left < 2 and not self._said_costly and window.processes.is_rank_zero:
                self._said_costly = True
                logger.warning(
                    "search=%r takes %.3g passes to learn of %d rows, as the search split has no more than %d parts: "
                    "merges cost more than evaluations=%d; give more held-out sequences, or a smaller window_size",
                    self._config.search,
                    learnt,
                    len(window),
                    self._heldout.parts,
                    evaluations,
                )
            chosen, described = yield from self.chooser.choose(
                candidates.measure, window, live_search, state, step, max(2, left)
            )
            yield from candidates.load(chosen.weights)
            if chosen.weights is not None:
                merged = yield from candidates.evaluate("report")
            if self.last is not None and not state.in_a_spike:
                yield PUBLISH
                self.last.take(candidates.weights.row, step, chosen.loss)
        losses = report_losses(live, merged, self._heldout.searched)
        if not math.isfinite(losses["gain"]):
            raise ValueError(f"the held-out loss on the report split is not finite: {losses}")
        if losses["gain"] < 0 and window.processes.is_rank_zero:
            # Within two standard errors of 0 it may as well be as good as live.
            clearly = losses["gain"] < -2 * (losses["gain_stderr"] or 0.0)
            logger.log(
                logging.WARNING if clearly else logging.INFO,
                "step %d: the merge is worse than live by %.3g nats per token on the report split; on the search "
                "split, by which it was chosen, it is better by %.3g",
                step,
                -losses["gain"],
                described["search_losses"]["live"] - described["search_losses"]["merged"],
            )
        snapshot = None
        if self._config.publishes:
            not_finite, at_once = (yield from candidates.not_finite()), self.parking.tight
            snapshot = yield from self._publisher.publish(
                candidates.weights, step, steps, described, losses, not_finite, at_once=at_once
            )
        return MergeRecord(
            step=step,
            search=self._config.search,
            checkpoint_steps=steps,
            **described,
            **losses,
            evaluations=chosen.evaluations,
            forward_equivalents=float(chosen.forward_equivalents + learnt),
            allowed={"evaluations": evaluations},
            window_bytes=window.nbytes,
            snapshot=str(snapshot) if snapshot else None,
        )

    def _candidates(self, model: nn.Module, kept: Kept) -> Candidates:
        beside = 0 if self._by_parameter is None else self._by_parameter.nbytes
        weights = weights_in(
            model, self.window, self._heldout.seed, self.parking, units=self._units, kept=kept, beside=beside
        )
        return Candidates(weights, self.window, self._heldout, self._by_parameter)

    def _weighing(self, model: nn.Module) -> ByParameter | None:
        """How rows are combined, if not as their weighted mean."""
        weighing, window = resolve_search(self._config.search).weighing, self.window
        if weighing == "rows":
            return None
        if window.processes.size > 1 or window.layout.sharding.units:
            raise ValueError(
                f"search={self._config.search!r} makes no weighted mean of rows, which takes a whole model in one "
                "process, without FSDP"
            )
        with refused_on_all(window.processes, self._config.num_rows):
            if weighing == "regmean":
                return RegressionMean(window, model, self.parking)
            return FisherInformation(window, max(self._config.num_rows, len(window)), self.parking)
