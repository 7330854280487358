"""When a merge happens: begun when it can be paid for, driven piece by piece between training steps."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Generic, TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm

from ..config import MergeConfig
from ..distributed import ENDS, CollectiveTimeout, Processes, described
from ..evaluate.heldout import HeldOutLoss, device_of
from ..evaluate.parking import Parking
from ..evaluate.untouched.isolation import delayed_signals, preserved_rng, terminations
from ..metrics import MergeRecord
from ..search.problem import GRADIENT_COST, SearchState
from ..window import devices
from ..window.memory import let_go, ran_out
from ..window.pieces import BACKWARD, FORWARD, WAIT, Pieces
from .budget import Durations, MergeCost, Overhead, Stopwatch, affordable, budgets
from .merge import Merge

logger = logging.getLogger("traj_merge_callback")
T = TypeVar("T")
# Kinds of pieces that the progress bar counts, and what they count for in the budget.
_BATCH = {FORWARD: 1, BACKWARD: GRADIENT_COST}
# Seconds after which the progress bar appears.
_PATIENCE_S = 1.0


class Run(Generic[T]):
    """Pieces under way.

    Args:
        pieces: what is to be done.
        durations: what pieces took in earlier runs.
        device: where they are done.
        wait: waits for what a piece of the kind WAIT waits for.
        processes: the ranks, which do the same pieces in step.
        parking: of the device memory that pieces hold.
    """

    def __init__(
        self,
        pieces: Pieces[T],
        durations: Durations,
        device: torch.device,
        wait: Callable[[], None],
        processes: Processes,
        parking: Parking,
    ) -> None:
        self._pieces = pieces
        self._parking = parking
        self._processes = processes
        self._wait = wait
        self._durations = durations
        self.device = device
        self._next: str | None = None
        self.seconds = 0.0
        self.longest_pause = 0.0
        #: How much of the budget was spent so far, in batches.
        self.batches = 0
        self.result: T | None = None
        self.done = False
        # Whether, in the last piece, some rank was told to end: no more pieces then while training waits.
        self.ends = False
        #: The kind of the piece that failed; None for one before all others.
        self.failed: str | None = None

    @property
    def next_piece(self) -> float:
        """Seconds that the next piece will take at most, by what is known; infinite if nothing is."""
        return 0.0 if self._next in (None, WAIT) else self._durations.longest(str(self._next))

    def advance(self, limit: float) -> None:
        """Do pieces, at least one, as long as the next one is expected to end within ``limit`` seconds.

        Raises:
            Exception: what a piece raised; the run is done then.
        """
        watch = Stopwatch(self.device)
        moved = self._bring_back(watch)
        self._advance(watch, limit - moved)
        if not self.done:
            self._parking.park()
            moved += watch.lap()
        self.seconds += moved
        self.longest_pause = max(self.longest_pause, moved)

    def _bring_back(self, watch: Stopwatch) -> float:
        """Bring back what is parked, which fails on all ranks if it fails on one; how long that took."""
        if not self._parking.away:
            return 0.0
        try:
            with self._processes.raise_on_all():
                self._parking.bring_back()
        except BaseException:
            self.abandon()
            raise
        return watch.lap()

    def _advance(self, watch: Stopwatch, limit: float) -> None:
        spent, kind = 0.0, None
        with preserved_rng():
            while (
                not self.done and (spent == 0.0 or spent + self.next_piece <= limit) and not kind == self._next == WAIT
            ):
                kind = self._next
                took = self._do(watch)
                spent += took
                if kind is not None and kind != WAIT:
                    self._durations.learn(kind, took)
        self.seconds += spent
        self.longest_pause = max(self.longest_pause, spent)

    def complete(self, on_piece: Callable[[str | None], None] = lambda kind: None) -> None:
        """Do all pieces that are left, waiting for what must be waited for; after a SIGTERM, which comes when a cluster
        takes a machine away, as few as may be.
        """
        before = self.seconds
        watch = Stopwatch(self.device)
        self.seconds += self._bring_back(watch)
        self.ends = False
        while not (self.done or self.ends):
            if self._next == WAIT:
                began = time.perf_counter()
                self._wait()
                self.seconds += time.perf_counter() - began
            kind = self._next
            watch.lap()
            self._advance(watch, 0.0)
            on_piece(kind)
        self.longest_pause = max(self.longest_pause, self.seconds - before)

    def abandon(self) -> None:
        """Give up what is left."""
        self.done = True
        self._pieces.close()
        self._parking.release()

    def _do(self, watch: Stopwatch) -> float:
        """Do one piece, which fails on all ranks if it fails on one; the longest of their durations."""
        error: BaseException | None = None
        before = terminations()
        kind = self._next
        self.batches += _BATCH.get(str(kind), 0)
        try:
            with delayed_signals():
                self._next = next(self._pieces)
        except StopIteration as stop:
            self.result, self.done = stop.value, True
            self._parking.release()
        except BaseException as raised:
            error = raised
        try:
            took, ends = self._processes.all_reduce_error(error, watch.lap(), float(terminations() > before))
        except BaseException:
            self.failed = kind
            self.abandon()
            raise
        self.ends |= ends > 0
        return took


class Schedule:
    """Begins merges, and drives them as far as ``schedule`` and the overhead budget allow.

    Args:
        config: the options.
        heldout: the held-out loss.
        merge: what a merge does.
        overhead: the time spent here so far.
        wait: waits for the files being written.
        processes: the ranks; what depends on time is decided by rank 0.
    """

    def __init__(
        self,
        config: MergeConfig,
        heldout: HeldOutLoss,
        merge: Merge,
        overhead: Overhead,
        wait: Callable[[], None],
        processes: Processes,
    ) -> None:
        self._processes = processes
        self._config = config
        self._heldout = heldout
        self._merge = merge
        self._overhead = overhead
        self._wait = wait
        self._durations = Durations()
        self._run: Run[MergeRecord | None] | None = None
        # Begins what is under way once more, if it can be made another way.
        self._again: Callable[[], None] | None = None
        self._retried = False  # whether it was begun again because a product found no memory
        # The sequences of the held-out pass in which memory ran out first, and how; None: that has been said.
        self._ran_out: tuple[int, str] | None = None
        self._worked = False  # whether pieces were done since the last pause ended
        self.learned = SearchState()
        self._step: int | None = None  # of the merge under way; None: it is a trial
        self._logged_budget: int | None = config.evaluations
        self._said_late = False

    @property
    def under_way(self) -> bool:
        """Whether a merge, or a trial of what its pieces take, is not done yet."""
        return self._run is not None

    @property
    def merge_under_way(self) -> bool:
        """Whether a merge is not done yet."""
        return self._run is not None and self._step is not None

    def begin(self, model: nn.Module, state: SearchState, step: int, evaluations: int | None = None) -> bool:
        """Begin a merge of the window, whose newest row is of this step.

        Args:
            model: the model being trained.
            state: what the last merge remembers; :attr:`learned` is what this one does, when it is done.
            step: optimizer step.
            evaluations: what may be spent; by default what the overhead budget can pay for.

        Returns:
            Whether one was begun; it was not if it cannot be paid for yet.
        """
        if not self._heldout.digest:  # nothing is read yet
            return False
        if evaluations is None:
            evaluations = self._processes.from_rank0(lambda: self._affordable(step))
        if evaluations is None:
            return False
        if len(set(self._processes.all_gather_object(self._merge.window.spans))) > 1:
            raise RuntimeError("the windows of the ranks differ, because a checkpoint was lost on one of them")
        budget = evaluations
        with self._processes.raise_on_all():
            kept = self._merge.keep(model)

        def make() -> None:
            self.learned = copy.deepcopy(state)
            self._run = self._in_pieces(self._merge.pieces(model, kept, self.learned, step, budget), model)

        self._make(make, step)
        return True

    def try_out(self, model: nn.Module) -> None:
        """Learn what pieces take, where that matters and is not known."""
        matters = self._config.schedule == "interleaved" or self._config.max_overhead is not None
        if matters and self._heldout.digest and self._run is None and not self._durations.known:

            def make() -> None:
                self._run = self._in_pieces(self._merge.probe(model), model)

            self._make(make, None)

    def _make(self, make: Callable[[], None], step: int | None) -> None:
        self._again, self._step, self._retried = make, step, False
        make()

    def advance(self, *, next_is_due: bool = False) -> MergeRecord | None:
        """Do as many pieces as may be done between two training steps; the record, if a merge is done with them.

        Args:
            next_is_due: whether a merge is due at this step. The one before is then finished while training waits, so
                that there are as many merges as asked for, unless ``max_overhead`` or ``max_pause`` were asked for too.
        """
        if self._run is None:
            return None
        config = self._config
        if next_is_due and config.max_overhead is None and config.max_pause is None:
            self._say_late()
            return self.complete()
        allowance, pause = self._processes.from_rank0(lambda: (self._overhead.allowance, self._overhead.pause))
        # A piece of a new kind has to be tried.
        if allowance <= 0 or allowance < self._run.next_piece < math.inf:
            return None
        return self._drive(lambda run: run.advance(min(allowance, pause)))

    def _say_late(self) -> None:
        if self.merge_under_way and not self._said_late and self._processes.is_rank_zero:
            self._said_late = True
            logger.info(
                "the merge of step %d was not done when the next one was due, and is finished while training waits, as "
                "are later ones: merge_every=%d steps are too few for the pieces of a merge",
                self._step,
                self._config.merge_every,
            )

    def complete(self) -> MergeRecord | None:
        """Do all pieces that are left, while training waits; the record, if a merge is done with them.

        After a SIGTERM that was only noted, for the end of the step, the merge stays under way.
        """
        if self._run is None:
            return None
        heldout, ranks = self._heldout, self._processes.size
        searched, reported = (-(-heldout.num_batches(split) // ranks) for split in ("search", "report"))
        # A search may end before its budget is spent: the bar then goes to its end at once.
        left = max(1, self._config.evaluations * searched + 2 * reported - self._run.batches)
        shown = self._config.progress and self._processes.is_rank_zero
        title = "a trial before the first merge" if self._step is None else f"merging at step {self._step}"
        with tqdm(total=left, desc=title, unit="batch", delay=_PATIENCE_S, leave=False, disable=not shown) as bar:

            def count(kind: str | None) -> None:
                bar.update(min(_BATCH.get(str(kind), 0), left - bar.n))

            began = time.monotonic()
            record = self._drive(lambda run: run.complete(count))
            if not self.under_way:
                bar.update(left - bar.n)
                if time.monotonic() - began > _PATIENCE_S:  # it is there, and may have been drawn a moment ago
                    bar.refresh()
            return record

    def end_pause(self) -> None:
        """Training goes on; called when nobody holds the exception of a piece any more, and with it what it held."""
        if self._worked:
            self._merge.parking.give_back()
        self._worked = False

    def abandon(self) -> None:
        """Give up what is under way."""
        if self._run is not None:
            self._run.abandon()
            self._run = self._again = None

    def at_once(self, pieces: Pieces[T], model: nn.Module) -> T | None:
        """Do pieces of something else while training waits, when nothing is under way; None after a SIGTERM."""
        run = self._in_pieces(pieces, model)
        self._worked = True
        try:
            run.complete()
        finally:
            run.abandon()
        return run.result

    def _in_pieces(self, pieces: Pieces[T], model: nn.Module) -> Run[T]:
        return Run(pieces, self._durations, device_of(model), self._wait, self._processes, self._merge.parking)

    def _drive(self, drive: Callable[[Run[MergeRecord | None]], None]) -> MergeRecord | None:
        self._worked = True
        while True:
            run = self._run
            assert run is not None
            started, before = time.perf_counter(), run.seconds
            try:
                drive(run)
                break
            except ENDS:
                raise
            except BaseException as error:
                if not self._restarts(run, error):
                    raise
            finally:
                # On a GPU the wall time is also that of the training steps queued before.
                self._overhead.hide(time.perf_counter() - started - (run.seconds - before))
                if run.done and run is self._run:
                    self._run = self._again = None
            # Nobody holds the exception any more, and with it what the failed attempt took.
            devices.empty_cache(run.device)
        if not run.done:
            return None
        self._say_ran_out()
        if run.result is None:
            self._cut_batches()
            return None
        return replace(run.result, seconds=run.seconds, longest_pause=run.longest_pause)

    def _restarts(self, failed: Run[MergeRecord | None], error: BaseException) -> bool:
        """Begin what failed again, if it can be made another way; a collective."""
        if isinstance(error, CollectiveTimeout) or self._again is None:
            return False
        short = self._processes.all_reduce_max(float(ran_out(error)))[0] > 0
        if not (short and self._takes_less(failed.failed, error)) and (
            self._step is None or not self._merge.chooser.fall_back(error, self._step)
        ):
            return False
        self._again()
        assert self._run is not None
        self._run.seconds, self._run.longest_pause = failed.seconds, failed.longest_pause
        return True

    def _takes_less(self, kind: str | None, error: BaseException) -> bool:
        """After memory ran out in a piece of this kind: whether another try takes less of it; a collective.

        Held-out passes have half as many sequences from now on. What a product takes cannot be less: it is tried once
        more when all that the merge took has been freed.
        """
        let_go(error)
        longest = self._heldout.longest
        if kind in _BATCH and longest > 1:
            self._ran_out = self._ran_out or (longest, described(error))
            self._heldout.cut(2)
            for passes in _BATCH:
                self._durations.scale(passes, 0.5)
            return True
        again = kind is not None and kind not in _BATCH and not self._retried
        self._retried |= again
        return again

    def _say_ran_out(self) -> None:
        if self._ran_out is not None and self._processes.is_rank_zero:
            logger.warning(
                "memory ran out in a held-out pass of %d sequences (%s): from now on one has %d at most",
                *self._ran_out,
                self._heldout.longest,
            )
        self._ran_out = None

    def _affordable(self, step: int) -> int | None:
        """What the overhead budget can pay for now, if anything; what was decided is logged when it changes."""
        config, heldout = self._config, self._heldout
        evaluations = 2 if self._merge.chooser.closed_form else config.evaluations
        if config.max_overhead is None:
            return evaluations
        if not self._durations.known:
            return None
        searched, reported = (-(-heldout.num_batches(split) // self._processes.size) for split in ("search", "report"))
        cost = MergeCost(searched, reported, heldout.parts, self._merge.window.num_pieces)
        wanted = budgets(evaluations, config.least_evaluations(config.num_rows))
        allowance = self._overhead.allowance
        budget = affordable(wanted, cost, self._durations, allowance)
        if budget != self._logged_budget:
            needed = [cost.seconds(one, self._durations) for one in (wanted[0], wanted[-1])]
            logger.info(
                "step %d: max_overhead=%s leaves %.3g s for a merge, which takes up to %.3g s, and %.3g s at least: %s",
                step,
                config.max_overhead,
                allowance,
                *needed,
                "it waits for the next checkpoint" if budget is None else f"it gets {budget} passes",
            )
            self._logged_budget = budget
        return budget

    def _cut_batches(self) -> None:
        """Cut held-out batches, if evaluating one takes longer than a pause may."""
        passes = 1 if self._merge.chooser.closed_form else GRADIENT_COST
        pause = self._processes.from_rank0(lambda: self._overhead.pause)
        longest = passes * self._durations.expected(FORWARD)
        if longest > pause and self._heldout.longest > 1 and self._config.schedule != "blocking":
            pieces = math.ceil(longest / pause)
            logger.info("held-out batches are cut into %d: one takes %.3g s, a pause %.3g s", pieces, longest, pause)
            self._heldout.cut(pieces)
            self._durations.scale(FORWARD, 1.0 / pieces)
