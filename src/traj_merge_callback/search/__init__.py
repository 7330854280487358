"""Choosing merge weights (k-world): one small protocol, and the recipes and searches behind its names.

A search proposes candidates and is told their held-out loss on the search split. The engine evaluates live first,
and the best *evaluated* candidate wins, so a search can only improve on live. Ten lines make a new one::

    @register_search("random")
    class RandomSearch:
        def __init__(self, problem):
            self.problem, self.rng = problem, np.random.default_rng(problem.seed)

        def ask(self):
            return self.rng.dirichlet(np.ones(self.problem.size))

        def tell(self, weights, loss):
            pass

and ``search="random"``, or without registering ``search="my_module:RandomSearch"``, uses it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .evaluation import Gradient
from .objective import Objective


@dataclass(frozen=True)
class Problem:
    """What a search may know.

    Args:
        steps: optimizer steps of the window's rows, oldest first.
        evaluations: what may be spent, in forward passes over the search split: a candidate costs 1, with its gradient
            3. Live is evaluated beside that.
        objective: the loss, how it is made of those of several domains, and live's.
        previous: the last merge's weights, shape ``(size,)``, aligned so that ages match; None at the first merge.
        seed: for the search's own random numbers; differs from merge to merge.
        running_sums: number of rows in front of the window that are no checkpoints (BEMA's two), else 0.
        live_is_row: whether the newest row is live; else the rows are means, and live is no merge of them.
        gram: inner products of the rows' deltas to the newest row, shape ``(size, size)``, or ``(groups, size, size)``
            where merge weights are grouped; for searches that take gradients.
        batches: number of batches of the search split.
        parts: number of parts of it that can be evaluated alone.
        memory: what the search keeps from one merge of a run to the next, plain JSON values with strings as keys; it
            may write to it.
    """

    steps: tuple[int, ...]
    evaluations: int
    objective: Objective
    previous: np.ndarray | None = None
    seed: int = 0
    running_sums: int = 0
    live_is_row: bool = True
    gram: np.ndarray | None = None
    batches: int = 1
    parts: int = 1
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def live_loss(self) -> float:
        """The objective of live on the search split, in nats per token."""
        return self.objective.score(self.objective.live)

    @property
    def size(self) -> int:
        """The number of merge weights."""
        return self.running_sums + len(self.steps)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a candidate: ``(size,)``, or ``(groups, size)``."""
        return (self.size,) if self.gram is None or self.gram.ndim == 2 else self.gram.shape[:-1]

    @property
    def live(self) -> np.ndarray | None:
        """The candidate that is live, None if live is no row."""
        return self.row(age=0) if self.live_is_row else None

    @property
    def live_losses(self) -> dict[int, float]:
        """Losses of single rows, by age, that are known from the beginning."""
        return {0: self.live_loss} if self.live_is_row else {}

    def row(self, age: int) -> np.ndarray:
        """The candidate that is one row alone; age 0 is the newest."""
        weights = np.zeros(self.size)
        weights[self.size - 1 - age] = 1.0
        return weights


@dataclass(frozen=True)
class Observed:
    """What searches that take gradients are told of a candidate beside its loss.

    Args:
        losses: losses of the objective's components, shape ``(components,)``.
        gradients: their gradients in the merge weights, shape ``(components, *problem.shape)``, known up to a constant
            that weights which sum to 1 do not feel; None where no gradient was wanted.
        parts: the gradient by parts of the search split, from which its standard error follows.
    """

    losses: np.ndarray
    gradients: np.ndarray | None = None
    parts: Gradient | None = None


class Search(Protocol):
    """The protocol: built as ``Search(problem, **search_options)`` for each merge, then asked and told in turn.

    A class with ``needs_gradients = True`` gets ``problem.gram``; where its attribute ``wants_gradient`` is true,
    the candidate is evaluated with its gradient; ``tell`` has a third argument, :class:`Observed`. Any class may have
    an attribute ``wants_parts``: with fewer than ``problem.parts`` a candidate is evaluated on so many parts of the
    search split, at their share of the cost; it can then not win.
    """

    def ask(self) -> np.ndarray | None:
        """The next candidate, shape ``(problem.size,)``, summing to 1; None when there is nothing left to try."""

    def tell(self, weights: np.ndarray, loss: float) -> None:
        """The candidate's loss on the search split, in nats per token; ``inf`` if it was not finite."""


class GradientSearch(Protocol):
    """A search that is told more."""

    needs_gradients: bool
    wants_gradient: bool

    def ask(self) -> np.ndarray | None:
        """As :meth:`Search.ask`."""

    def tell(self, weights: np.ndarray, loss: float, observed: Observed) -> None:
        """As :meth:`Search.tell`, with what else was observed."""


SearchFactory = Callable[..., Search | GradientSearch]

_BUILT_IN = {
    "auto": "surrogate:SurrogateSearch",
    "surrogate": "surrogate:SurrogateSearch",
    "trajectory": "trajectory:TrajectorySearch",
    "reach": "gp:ReachSearch",
    "gp": "gp:GaussianProcessSearch",
    "pairwise": "gp:PairwiseSearch",
    "greedy": "greedy:GreedySearch",
    "lawa": "recipe:lawa",
    "ema": "recipe:ema",
    "wma": "recipe:wma",
    "wsm": "recipe:wsm",
    "mwa-loss": "recipe:mwa_loss",
    "mwa-step": "recipe:mwa_step",
    "perplexity": "recipe:perplexity",
    "bema": "recipe:Bema",
}
_registered: dict[str, SearchFactory] = {}


def register_search(name: str) -> Callable[[SearchFactory], SearchFactory]:
    """Decorator that makes a search class available as ``search=name``.

    Raises:
        ValueError: the name belongs to a built-in search or recipe.
    """
    if name in _BUILT_IN:
        raise ValueError(f"name={name!r} is a built-in search; choose another name")

    def register(factory: SearchFactory) -> SearchFactory:
        _registered[name] = factory
        return factory

    return register


def available_searches() -> list[str]:
    """The names that ``search=`` takes, registered ones included."""
    return sorted([*_BUILT_IN, *_registered])


def resolve_search(name: str, options: dict[str, Any] | None = None) -> SearchFactory:
    """The factory behind a name or a ``"package.module:Class"`` path, with ``options`` checked against it.

    Raises:
        ValueError: no such search, or one that does not take these options.
    """
    factory = _load(name)
    options = options or {}
    try:
        inspect.signature(factory).bind(None, **options)
    except TypeError as error:
        raise ValueError(f"search_options={options} do not fit search={name!r}: {error}") from error
    # A recipe's numbers can only be wrong, not merely unlucky: let a bad one fail now and not at the first merge.
    if check := getattr(factory, "check_options", None):
        check(**options)
    return factory


def _load(name: str) -> SearchFactory:
    if name in _registered:
        return _registered[name]
    if name in _BUILT_IN:
        module_name, _, attribute = _BUILT_IN[name].partition(":")
        return getattr(importlib.import_module(f".{module_name}", __name__), attribute)
    if ":" in name:
        module_name, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"search={name!r} cannot be imported: {error}") from error
    raise ValueError(f"search={name!r} is not one of {available_searches()}, nor a 'package.module:Class' path")
