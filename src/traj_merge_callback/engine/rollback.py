"""The way back to the last merge from before a spike, and what the optimizer makes of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import MergeConfig
from ..distributed import Processes
from ..search.checks import shown
from ..search.problem import SearchState
from ..window.pieces import Pieces
from ..window.window import CheckpointWindow
from .capturing import Capturing
from .merge import LastMerge, Merge
from .training_loss import TrainingLoss

logger = logging.getLogger("traj_merge_callback")
# How often live is looked at for one reason, before that is done only once in a merge interval.
_LOOKS = 3


class Rollback:
    """Takes a run back to the last merge from before a spike, at a step boundary, on all ranks.

    Live's held-out loss is looked at if the training loss is in a spike, if live's own was at the last merge, or if
    weights are not finite. The run goes back if it is far above that of the last merges: the training loss alone may
    be high because the data changed. After a spike that comes before another merge was made nothing is rolled back any
    more in this run, as what causes it is still there.

    Args:
        config: the options.
        training_loss: is watched for spikes.
        capturing: of checkpoints.
        optimizer: of the run, or several.
        processes: the ranks.

    Raises:
        TypeError, ValueError: see :func:`own_optimizers`.
    """

    def __init__(
        self,
        config: MergeConfig,
        training_loss: TrainingLoss,
        capturing: Capturing,
        optimizer: Optimizer | Iterable[Optimizer] | None,
        processes: Processes,
    ) -> None:
        self._config = config
        self._training_loss = training_loss
        self._capturing = capturing
        self._optimizers = own_optimizers(optimizer, config)
        self._warm_ups = [_WarmUp(one, config.spike_warmup) for one in self._optimizers]
        self._processes = processes
        # While there is a window: see :meth:`begin`.
        self._acting: tuple[Merge, CheckpointWindow, Callable[[Pieces[Any], nn.Module], Any]] | None = None
        # What gave reason to look at live, when that was done last, and how often.
        self._since: int | None = None
        self._reason: tuple[Any, ...] = ()
        self._looked_at, self._looks = 0, 0
        self._said_none, self._given_up = False, False
        self._step = 0  # of the last rollback
        #: How often the run was rolled back.
        self.count = 0

    def begin(self, merge: Merge, window: CheckpointWindow, at_once: Callable[[Pieces[Any], nn.Module], Any]) -> None:
        """There is a window.

        Args:
            merge: has the last merge.
            window: the rows.
            at_once: does pieces while training waits, and returns what they return; None after a SIGTERM.
        """
        self._acting = merge, window, at_once

    def end(self) -> None:
        """The window is released."""
        self._acting = None
        for warm_up in self._warm_ups:
            warm_up.end()

    def suspects(self, previous: int, step: int, state: SearchState) -> bool:
        """Whether there is a reason to look at live; a collective.

        A few times for each reason, and again after each merge interval while it lasts.

        Args:
            previous, step: the last optimizer step, and this one; live is looked at where a row is due.
            state: what the last merge remembers.
        """
        if self._config.on_spike is None or self._given_up or not self._capturing.row_is_due(previous, step):
            return False
        self._since, recent = self._processes.from_rank0(lambda: self._training_loss.since), state.live_losses
        rose = bool(recent) and replace(state, live_losses=recent[:-1]).is_astray(recent[-1])
        if self._since is None and not self._capturing.left_out and not rose:
            return False
        reason = (self._since, self._capturing.left_out, *(recent if rose else []))
        if reason != self._reason:
            self._reason, self._looks = reason, 0
        if self._looks >= _LOOKS and step - self._looked_at < self._config.merge_every:
            return False
        self._looks, self._looked_at = self._looks + 1, step
        return True

    def consider(self, model: nn.Module, step: int, state: SearchState) -> None:
        """Look at live, and go back if it went astray; a collective. Nothing is under way, and nothing is written.

        Args:
            model: the model being trained.
            step: the optimizer step.
            state: what the last merge remembers.
        """
        assert self._acting is not None
        merge, window, at_once = self._acting
        assert merge.last is not None
        loss = at_once(merge.live_loss(model), model)
        if loss is None or not self._is_wanted(step, loss, merge.last, state):
            return
        self._capturing.settle(window)
        if not at_once(merge.put_back(model), model):
            return
        assert merge.last.step is not None
        window.drop_since(merge.last.step + 1 if self._since is None else self._since)
        self._capturing.forget()
        self._training_loss.restart()
        # Moments that are not numbers would spoil the next step.
        moments = self._config.spike_moments if math.isfinite(loss) else "reset"
        for optimizer in self._optimizers if moments == "reset" else []:
            optimizer.state.clear()
        for warm_up in self._warm_ups:
            warm_up.begin()
        self.count, self._step = self.count + 1, step
        self._say(
            "step %d: live's held-out loss is %.4g, and was %.4g: rolled back to the merge of step %d, whose loss is "
            "%.4g; spike_moments=%r, spike_warmup=%d",
            step,
            loss,
            min(state.live_losses, default=math.nan),
            merge.last.step,
            merge.last.loss,
            moments,
            self._config.spike_warmup,
        )

    def _is_wanted(self, step: int, loss: float, last: LastMerge, state: SearchState) -> bool:
        """Whether live is to be rolled back, by its held-out loss now and at recent merges."""
        if math.isfinite(loss) and not state.is_astray(loss):
            return False
        if last.step is None:
            if not self._said_none:
                self._say("step %d: the loss is in a spike, and there is no merge from before it to go back to", step)
            self._said_none = True
            return False
        if self.count and last.step <= self._step:
            self._given_up = True
            self._say(
                "step %d: live's held-out loss is %.4g, far up again after the rollback at step %d and before another "
                "merge was made: what causes it is still there. This run is not rolled back any more",
                step,
                loss,
                self._step,
            )
        return not self._given_up

    def _say(self, sentence: str, *values: Any) -> None:
        if self._processes.is_rank_zero:
            logger.warning(sentence, *values)


class _WarmUp:
    """Lowers the learning rate within an optimizer's next steps, and only there: schedulers see their own rate.

    Its hooks stay until :meth:`end`, as an optimizer's hooks must not be removed while they are called.

    Args:
        optimizer: whose groups have a learning rate; those without one (Adafactor's) are left alone.
        steps: over which it grows.
    """

    def __init__(self, optimizer: Optimizer, steps: int) -> None:
        self._optimizer = optimizer
        self._steps, self._left = steps, 0
        self._hooks: list[Any] = []
        # Groups whose rate is lowered now, with their own one.
        self._lowered: list[tuple[dict[str, Any], Any]] = []

    def begin(self) -> None:
        """Begin anew."""
        self._left = self._steps
        if not self._hooks and self._steps:
            before = self._optimizer.register_step_pre_hook(self._before)
            self._hooks = [before, self._optimizer.register_step_post_hook(self._after)]

    def end(self) -> None:
        """Leave the optimizer alone; it takes no step now."""
        self._restore()
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._left = [], 0

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        self._restore()  # where the last step raised
        if not self._left:
            return
        share = 1.0 - self._left / (self._steps + 1)
        self._left -= 1
        for group in optimizer.param_groups:
            if isinstance(rate := group.get("lr"), (float, int, Tensor)):
                self._lowered.append((group, rate))
                group["lr"] = rate * share

    def _after(self, *_: Any) -> None:
        self._restore()

    def _restore(self) -> None:
        for group, rate in self._lowered:
            group["lr"] = rate
        self._lowered = []


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
