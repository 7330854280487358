"""The way back to the last merge from before a spike, and what the optimizer makes of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..config import MergeConfig
from ..distributed import Processes
from ..pieces import Pieces
from ..search.checks import shown
from ..search.problem import SearchState
from .capturing import Capturing
from .merge import Merge

logger = logging.getLogger("traj_merge_callback")


class Rollback:
    """Takes a run back to the last merge from before a spike, at a step boundary, on all ranks.

    Live's held-out loss is looked at if the training loss is in a spike, if live's own was at the last merge, or if
    weights are not finite. The run goes back if it is far above that of the last merges: the training loss alone may
    be high because the data changed. After a spike that comes before another merge was made nothing is rolled back any
    more in this run, as what causes it is still there.

    Args:
        config: the options.
        merge: has the last merge.
        capturing: of checkpoints.
        optimizers: of the run, without wrappers.
        processes: the ranks.
        give_up: gives up the merge under way; returns whether there was one.
        at_once: does pieces while training waits, and returns what they return.
    """

    def __init__(
        self,
        config: MergeConfig,
        merge: Merge,
        capturing: Capturing,
        optimizers: Sequence[Optimizer],
        processes: Processes,
        give_up: Callable[[], bool],
        at_once: Callable[[Pieces[Any], nn.Module], Any],
    ) -> None:
        assert merge.last is not None
        self._config = config
        self._merge, self._last = merge, merge.last
        self._give_up, self._at_once = give_up, at_once
        self._capturing = capturing
        self._optimizers = optimizers
        self._processes = processes
        # The losses of merges when live was looked at last, which give no other reason to do so again.
        self._looked_at: list[float] = []
        self._said_none, self._given_up = False, False
        self._step = 0  # of the last rollback
        #: How often the run was rolled back.
        self.count = 0

    def consider(self, model: nn.Module, step: int, since: int | None, state: SearchState) -> bool:
        """Roll back if live went astray; a collective.

        Args:
            model: the model being trained.
            step: the optimizer step, at which a row is due.
            since: the step from which on weights are those of a spike of the training loss; rank 0's counts.
            state: what the last merge remembers.

        Returns:
            Whether a merge under way was given up, which is to be made of the row of this step.
        """
        if self._given_up:
            return False
        since, recent = self._processes.from_rank0(lambda: since), state.live_losses
        rose = False
        if recent and recent != self._looked_at:
            rose = replace(state, live_losses=recent[:-1]).is_astray(recent[-1])
        if since is None and not self._capturing.left_out and not rose:
            return False
        self._looked_at = list(recent)
        # A merge under way holds memory that this takes.
        given_up = self._give_up()
        loss = self._at_once(self._merge.live_loss(model), model)
        if loss is not None and self._is_wanted(step, loss, state):
            self._capturing.settle(self._merge.window)
            self._at_once(self._merge.put_back(model), model)
            assert self._last.step is not None
            self._merge.window.drop_since(self._last.step + 1 if since is None else since)
            self._capturing.forget()
            self._take_up_training()
            self.count, self._step = self.count + 1, step
            self._say(
                "step %d: live's held-out loss is %.4g, and was %.4g: rolled back to the merge of step %d, whose loss "
                "is %.4g; spike_moments=%r, spike_warmup=%d",
                step,
                loss,
                min(recent, default=math.nan),
                self._last.step,
                self._last.loss,
                self._config.spike_moments,
                self._config.spike_warmup,
            )
        return given_up

    def _is_wanted(self, step: int, loss: float, state: SearchState) -> bool:
        """Whether live is to be rolled back, by its held-out loss now and at recent merges."""
        if math.isfinite(loss) and not state.is_astray(loss):
            return False
        if self._last.step is None:
            if not self._said_none:
                self._say("step %d: the loss is in a spike, and there is no merge from before it to go back to", step)
            self._said_none = True
            return False
        if self.count and self._last.step <= self._step:
            self._given_up = True
            self._say(
                "step %d: live's held-out loss is %.4g, far up again after the rollback at step %d and before another "
                "merge was made: what causes it is still there. This run is not rolled back any more",
                step,
                loss,
                self._step,
            )
        return not self._given_up

    def _take_up_training(self) -> None:
        for optimizer in self._optimizers:
            if self._config.spike_moments == "reset":
                optimizer.state.clear()
            if self._config.spike_warmup:
                _WarmUp(optimizer, self._config.spike_warmup)

    def _say(self, sentence: str, *values: Any) -> None:
        if self._processes.is_rank_zero:
            logger.warning(sentence, *values)


class _WarmUp:
    """Lowers the learning rate within an optimizer's next steps, and only there: schedulers see their own rate."""

    def __init__(self, optimizer: Optimizer, steps: int) -> None:
        self._steps, self._taken = steps, 0
        self._rates: list[Any] = []
        before = optimizer.register_step_pre_hook(self._before)
        self._hooks = before, optimizer.register_step_post_hook(self._after)

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        self._taken += 1
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * (self._taken / (self._steps + 1))

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        if self._taken == self._steps:
            for hook in self._hooks:
                hook.remove()


def own_optimizers(given: Optimizer | Iterable[Optimizer] | None, config: MergeConfig) -> list[Optimizer]:
    """The optimizers that take the steps, without wrappers as those of Accelerate; none if nothing is done with them.

    Raises:
        TypeError: something is no optimizer.
        ValueError: there is none, and ``config`` wants something done with it; or it is DeepSpeed's.
    """
    if config.on_spike is None:
        return []
    several = [] if given is None else list(given) if isinstance(given, Iterable) else [given]
    found = []
    for one in several:
        if any(type(part).__module__.startswith("deepspeed") for part in (one, getattr(one, "optimizer", None))):
            raise ValueError(
                f"on_spike={config.on_spike!r} does not go with DeepSpeed, whose optimizer keeps weights of its own"
            )
        while isinstance(inner := getattr(one, "optimizer", None), Optimizer):
            one = inner
        if not isinstance(one, Optimizer):
            raise TypeError(f"optimizer={shown(one)}: must be a torch optimizer, or several")
        found.append(one)
    if not found and (config.spike_moments == "reset" or config.spike_warmup):
        raise ValueError(
            f"on_spike={config.on_spike!r} with spike_moments={config.spike_moments!r} and "
            f"spike_warmup={config.spike_warmup} needs optimizer=, or spike_moments='keep' and spike_warmup=0"
        )
    return found
