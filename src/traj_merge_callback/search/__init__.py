"""Choosing merge weights (k-world): one base class, and the recipes and searches behind its names.

A search proposes candidates and is told their held-out loss on the search split. The engine evaluates live first,
and the best *evaluated* candidate wins, so a search can only improve on live. Ten lines make a new one::

    @register_search("random")
    class RandomSearch(Search):
        def __init__(self, problem):
            self.problem, self.rng = problem, np.random.default_rng(problem.seed)

        def ask(self):
            return self.rng.dirichlet(np.ones(self.problem.size))

and ``search="random"``, or without registering ``search="my_module:RandomSearch"``, uses it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from .problem import GRADIENT_COST, Observed, Problem, Search

__all__ = [
    "GRADIENT_COST",
    "Observed",
    "Problem",
    "Search",
    "available_searches",
    "register_search",
    "resolve_search",
]

SearchClass = TypeVar("SearchClass", bound=type[Search])

_BUILT_IN = {
    "auto": "surrogate:SurrogateSearch",
    "surrogate": "surrogate:SurrogateSearch",
    "trajectory": "trajectory:TrajectorySearch",
    "reach": "gp:ReachSearch",
    "gp": "gp:GaussianProcessSearch",
    "pairwise": "gp:PairwiseSearch",
    "greedy": "greedy:GreedySearch",
    "lawa": "recipes:lawa_search",
    "ema": "recipes:ema_search",
    "wma": "recipes:wma_search",
    "wsm": "recipes:wsm_search",
    "mwa-loss": "recipes:mwa_loss_search",
    "mwa-step": "recipes:mwa_step_search",
    "perplexity": "recipes:perplexity_search",
    "bema": "recipes:BemaSearch",
}
_registered: dict[str, type[Search]] = {}


def register_search(name: str) -> Callable[[SearchClass], SearchClass]:
    """Decorator that makes a subclass of :class:`Search` available as ``search=name``.

    Raises:
        ValueError: the name belongs to a built-in search or recipe, or what is registered is no subclass.
    """
    if name in _BUILT_IN:
        raise ValueError(f"name={name!r} is a built-in search; choose another name")

    def register(search: SearchClass) -> SearchClass:
        _registered[name] = _checked(name, search)
        return search

    return register


def available_searches() -> list[str]:
    """The names that ``search=`` takes, registered ones included."""
    return sorted([*_BUILT_IN, *_registered])


def resolve_search(name: str, options: dict[str, Any] | None = None) -> type[Search]:
    """The search behind a name or a ``"package.module:Class"`` path, with ``options`` checked against it.

    Raises:
        ValueError: no such search, no subclass of :class:`Search`, or one that does not take these options.
    """
    search = _checked(name, _load(name))
    options = options or {}
    try:
        inspect.signature(search).bind(None, **options)
    except TypeError as error:
        raise ValueError(f"search_options={options} do not fit search={name!r}: {error}") from error
    search.check_options(**options)
    return search


def _checked(name: str, search: Any) -> Any:
    if not (isinstance(search, type) and issubclass(search, Search)):
        raise ValueError(
            f"search={name!r} is {search!r}: must be a subclass of traj_merge_callback.Search, whose defaults leave "
            "only ask to be written"
        )
    return search


def _load(name: str) -> Any:
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
