"""Choosing merge weights, in numpy alone: the base class :class:`Search`, and the recipes and searches by name.

A search proposes candidates and is told their loss on the search split. The engine evaluates live first, and the best
*evaluated* candidate wins, so a search can only improve on live. Ten lines make a new one::

    @register_search("random")
    class RandomSearch(Search):
        def __init__(self, problem, *, concentration=1.0):
            super().__init__(problem)
            self.rng = np.random.default_rng(problem.seed)
            self.concentration = concentration

        def ask(self):
            return self.rng.dirichlet(np.full(self.problem.size, self.concentration))

``search="random"`` uses it, with ``search_options={"concentration": 2.0}`` if wanted; so does
``search="my_module:RandomSearch"`` without registering. A search that learns from losses also overrides ``tell``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from .checks import did_you_mean
from .problem import LEARNING_COST, Observed, Problem, Search

__all__ = ["Observed", "Problem", "Search", "available_searches", "register_search", "resolve_search"]

# As "module:class", so that a search's module is imported when the search is used: some import scikit-learn.
_BUILT_IN = {
    "auto": "race:RacedSearch",
    "surrogate": "race:RacedSearch",
    "trajectory": "trajectory:TrajectorySearch",
    "reach": "without_gradients.gp:ReachSearch",
    "gp": "without_gradients.gp:GaussianProcessSearch",
    "pairwise": "without_gradients.gp:PairwiseSearch",
    "sparse": "without_gradients.sparse:SparseSearch",
    "greedy": "without_gradients.greedy:GreedySearch",
    "lawa": "recipes:Lawa",
    "ema": "recipes:Ema",
    "wma": "recipes:Wma",
    "wsm": "recipes:Wsm",
    "mwa-loss": "recipes:MwaLoss",
    "mwa-step": "recipes:MwaStep",
    "perplexity": "recipes:Perplexity",
    "tail-ema": "recipes:TailEma",
    "half-life": "recipes:HalfLife",
    "mean-of-steps": "recipes:MeanOfSteps",
    "posthoc-ema": "recipes:PosthocEma",
    "bema": "recipes:Bema",
    "fisher": "recipes:Fisher",
    "regmean": "recipes:RegMean",
    "df-merge": "without_gradients.gp:DynamicFisherSearch",
}
_REQUIRED = "a subclass of traj_merge_callback.Search that overrides ask"
_registered: dict[str, type[Search]] = {}
_SearchClass = TypeVar("_SearchClass", bound=type[Search])


def register_search(name: str) -> Callable[[_SearchClass], _SearchClass]:
    """Class decorator that makes a subclass of :class:`Search` available as ``search=name``.

    Raises:
        ValueError: the name belongs to a built-in search or recipe.
        TypeError: no name, or what is decorated is no subclass of :class:`Search`, or one without ``ask``.
    """
    if not isinstance(name, str):
        raise TypeError(f"register_search({name!r}): needs a name, as in @register_search('mine')")
    if name in _BUILT_IN:
        raise ValueError(f"name={name!r} is a built-in search; choose another name")

    def register(search: _SearchClass) -> _SearchClass:
        if not _is_search(search):
            raise TypeError(f"register_search({name!r}): {search!r} must be {_REQUIRED}")
        _registered[name] = search
        return search

    return register


def available_searches() -> list[str]:
    """The names that ``search=`` accepts, registered ones included."""
    return sorted([*_BUILT_IN, *_registered])


def resolve_search(name: str, options: dict[str, Any] | None = None) -> type[Search]:
    """The class behind a name or a ``"package.module:Class"`` path, with ``options`` checked against it if given.

    Raises:
        ValueError, TypeError: no such search, something that is no :class:`Search`, or options that it does not accept.
    """
    search = _load(name)
    if not _is_search(search):
        raise ValueError(f"search={name!r} is {search!r}; it must be {_REQUIRED}")
    if search.weighing not in LEARNING_COST or (search.needs_gradients and search.weighing != "rows"):
        raise ValueError(
            f"search={name!r} has weighing={search.weighing!r}: must be one of {', '.join(LEARNING_COST)}, and 'rows' "
            "with needs_gradients=True, as gradients are those of a weighted mean of rows"
        )
    if options is None:
        return search
    accepted = list(inspect.signature(search).parameters.values())[1:]
    try:
        inspect.signature(search).bind(None, **options)
    except TypeError as error:
        names = [one.name for one in accepted if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
        unknown = next((option for option in options if option not in names), "")
        raise ValueError(
            f"search_options={options} do not fit search={name!r}: {error}; it takes {names}"
            f"{did_you_mean(unknown, names) if unknown else ''}"
        ) from error
    try:
        search.check_options(**options)
    except TypeError as error:  # of a comparison with a value of another type
        raise TypeError(f"search_options={options} do not fit search={name!r}: {error}") from error
    except ValueError as error:
        raise ValueError(f"search_options={options}: {error}") from error
    return search


def _is_search(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, Search) and not inspect.isabstract(found)


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
        except Exception as error:  # whatever the module raises while it is imported
            described = f"{type(error).__name__}: {error}"
            raise ValueError(f"search={name!r} cannot be imported as 'package.module:Class': {described}") from error
    known = available_searches()
    raise ValueError(
        f"search={name!r} is not one of {known}, nor a 'package.module:Class' path{did_you_mean(name, known)}"
    )
