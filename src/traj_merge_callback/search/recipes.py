"""Recipes: closed-form merge weights as functions of the rows' number, steps, spans or losses; and as searches.

Every function returns float64 weights of shape ``(k,)``, oldest row first, that sum to 1. Where a source's exact
constant could not be verified, the docstring says which part is ours. The classes below the functions are the same
recipes as searches, with the functions' keyword arguments as their options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.polynomial import Polynomial
from scipy.special import digamma

from .checks import integer, number, share
from .problem import Observed, Problem, Search
from .spans import Span, live_is_beside, stretches


def lawa(k: int) -> np.ndarray:
    """Uniform average of the k rows, ``a_i = 1/k``.

    LAWA: Kaddour 2022, arXiv 2209.14981; Sanyal et al., arXiv 2306.03241. SMA in PMA, arXiv 2505.12082.
    """
    return np.full(k, 1.0 / k)


def ema(k: int, *, decay: float = 0.8) -> np.ndarray:
    """Exponential weights ``a_i ~ decay^(k-1-i)`` (PMA's EMA, arXiv 2505.12082; its alpha is ``1 - decay``).

    Raises:
        ValueError: ``decay`` not in (0, 1].
    """
    if not 0.0 < decay <= 1.0:
        raise ValueError(f"decay={decay}: must be in (0, 1]")
    return _normalised(decay ** np.arange(k - 1, -1, -1.0))


def wma(k: int) -> np.ndarray:
    """Linearly growing weights ``a_i ~ i + 1`` (PMA's WMA, arXiv 2505.12082)."""
    return _normalised(np.arange(1.0, k + 1))


WSM_PROFILES = {
    "linear": lambda x, c: 1.0 - x,
    "cosine": lambda x, c: 0.5 * (1.0 + np.cos(np.pi * x)),
    "1-sqrt": lambda x, c: 1.0 - np.sqrt(x),
    "inverse-sqrt": lambda x, c: ((1 + c * x) ** -0.5 - (1 + c) ** -0.5) / (1 - (1 + c) ** -0.5),
    "exponential": lambda x, c: (np.exp(-c * x) - np.exp(-c)) / (1 - np.exp(-c)),
}


def wsm(k: int, *, profile: str = "1-sqrt", steepness: float = 4.0) -> np.ndarray:
    """The average that imitates a learning-rate decay over the window (WSM, arXiv 2507.17634).

    ``w_j`` is the decayed learning rate as a share of the full one at ``x = j/k`` of the window,
    ``1 >= w_1 >= ... >= w_{k-1} >= 0``. The merge weights are its decrements, ``a_0 = 1 - w_1``,
    ``a_j = w_j - w_{j+1}``, ``a_{k-1} = w_{k-1}``, so that ``w_i = sum_{j >= i} a_j``.

    Args:
        k: number of rows.
        profile: "linear" (gives the uniform average), "cosine", "1-sqrt", "inverse-sqrt" or "exponential".
        steepness: c > 0 of "inverse-sqrt" and "exponential"; their normalisation to end at 0 and c = 4 are ours.

    Raises:
        ValueError: an unknown profile, or ``steepness`` not positive.
    """
    if profile not in WSM_PROFILES:
        raise ValueError(f"profile={profile!r} is not one of {sorted(WSM_PROFILES)}")
    if not steepness > 0:
        raise ValueError(f"steepness={steepness}: must be positive")
    w = np.concatenate([[1.0], WSM_PROFILES[profile](np.arange(1.0, k) / k, steepness), [0.0]])
    return w[:-1] - w[1:]


def mwa_loss(losses: Sequence[float], *, power: float = 1.0) -> np.ndarray:
    """Metrics-weighted averaging by loss, ``a_i ~ L_i^-power`` (arXiv 2504.18580; the normalisation is ours).

    Raises:
        ValueError: a loss that is not positive.
    """
    values = np.asarray(losses, dtype=np.float64)
    if not (values > 0).all():
        raise ValueError(f"losses={values.tolist()}: mwa-loss needs positive losses")
    # In logarithms and relative to the best loss, so that a large power neither overflows nor underflows.
    return _normalised(np.exp(-power * (np.log(values) - np.log(values.min()))))


def mwa_step(steps: Sequence[int], *, power: float = 1.0) -> np.ndarray:
    """Metrics-weighted averaging by step, ``a_i ~ s_i^power`` (arXiv 2504.18580; the normalisation is ours)."""
    values = np.asarray(steps, dtype=np.float64)
    return _normalised((values / values.max()) ** power)


def perplexity(losses: Sequence[float], *, temperature: float = 0.05) -> np.ndarray:
    """Better perplexity, larger weight: ``a_i ~ ppl_i^(-1/temperature)``, a softmax of ``-L_i / temperature``.

    After "Dynamic checkpoint merging via generation quality", Information Fusion 125 (2026) 103415; the softmax form,
    which is LM-Cocktail's, and the temperature in nats are ours.

    Raises:
        ValueError: ``temperature`` not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be positive")
    values = np.asarray(losses, dtype=np.float64)
    return _normalised(np.exp(-(values - values.min()) / temperature))


def bema_rate(step: int, *, kappa: float = 0.5, rho: float = 10.0, gamma: float = 1.0) -> float:
    """``beta_t = (rho + gamma t)^-kappa``, the weight of theta_t in BEMA's running average (arXiv 2508.00180)."""
    return float((rho + gamma * step) ** -kappa)


def bema(k: int, step: int, *, eta: float = 0.2, rho: float = 10.0, gamma: float = 1.0) -> np.ndarray:
    """BEMA as weights of the leading rows theta_0 and EMA_t and the k rows, shape ``(k + 2,)`` (arXiv 2508.00180).

    ``theta' = alpha_t (theta_t - theta_0) + EMA_t`` with ``alpha_t = (rho + gamma t)^-eta`` and ``t = step``: the
    weights ``-alpha_t, 1, 0, ..., 0, alpha_t`` sum to 1.
    """
    alpha = (rho + gamma * step) ** -eta
    weights = np.zeros(k + 2)
    weights[0], weights[1], weights[-1] = -alpha, 1.0, alpha
    return weights


# Averages over the steps of the run, which their sources keep up to date at every optimizer step. From the rows of a
# window they are made as nearly as can be: a row stands for all steps since the row before. What they have of steps
# before the oldest row is left out, and the rest sums to 1.


def tail_ema(spans: Sequence[Span], *, tau: float = 150.0, lambda_: float = 0.6) -> np.ndarray:
    """Live blended with an EMA of the last steps: ``(1 - lambda) theta_t + lambda EMA_t``.

    ``EMA_t = EMA_{t-1} + (theta_t - EMA_{t-1}) / tau``. For runs whose learning rate has decayed. From the NanoGPT
    speedruns (modded-nanogpt, pull requests 325 and 328), with their tau and lambda; there the EMA begins 330 steps
    before the end, and the token embedding is left out.

    Args:
        spans: of the rows, oldest first, and live's.
        tau: time constant of the EMA in optimizer steps.
        lambda_: share of the EMA.

    Raises:
        ValueError: ``tau`` below 1, or ``lambda_`` not in (0, 1].
    """
    if not number("tau", tau, right := "at least 1 optimizer step") >= 1.0:
        raise ValueError(f"tau={tau}: must be {right}")
    if not 0.0 < number("lambda_", lambda_, right := "a share above 0, at most 1") <= 1.0:
        raise ValueError(f"lambda_={lambda_}: must be {right}")
    now = spans[-1].last
    weights = lambda_ * _averaged(spans, lambda steps: (1.0 - 1.0 / tau) ** (now - steps))
    weights[-1] += 1.0 - lambda_
    return weights


def half_life_rate(step: int, *, fraction: float = 0.05) -> float:
    """``1 - 2^(-1 / (fraction t))``, the weight of theta_t in torchtitan's running average; see :func:`half_life`."""
    return float(1.0 - 0.5 ** (1.0 / (fraction * step)))


def half_life(spans: Sequence[Span], *, fraction: float = 0.05) -> np.ndarray:
    """The EMA whose half-life is a share of the run so far: its decay at step t is ``2^(-1 / (fraction t))``.

    Default of torchtitan's EMA (pull request 3985), after Anytime, arXiv 2602.03702. A checkpoint of step s and all
    before it have the weight ``2^(-(H_t - H_s) / fraction)``, with ``H_n = 1 + 1/2 + ... + 1/n``.

    Args:
        spans: of the rows, oldest first, and live's.
        fraction: the half-life, as a share of the run so far.

    Raises:
        ValueError: ``fraction`` not in (0, 1).
    """
    share("fraction", fraction)
    now = digamma(spans[-1].last + 1.0)
    return _averaged(spans, lambda steps: 2.0 ** ((digamma(steps + 1.0) - now) / fraction))


def mean_of_steps(spans: Sequence[Span], *, last: int = 500) -> np.ndarray:
    """The uniform mean of the checkpoints of the last optimizer steps, as OLMo-core's ``ModelMergeCallback`` keeps it.

    A row counts by how many of its checkpoints are of these steps. It cannot be divided: where only some of them are,
    the others come with it.

    Args:
        spans: of the rows, oldest first, and live's.
        last: how many steps (OLMo-core's ``merge_last_n_steps``).

    Raises:
        ValueError: ``last`` below 1.
    """
    begin = spans[-1].last - integer("last", last, 1)
    counts = [float((np.linspace(span.first, span.last, span.samples) > begin).sum()) for span in spans]
    if live_is_beside(spans):  # it is in the newest mean
        counts[-1] = 0.0
    return _normalised(np.array(counts))


def posthoc_ema(spans: Sequence[Span], *, length: float = 0.05) -> np.ndarray:
    """The power-function EMA of a length, by least squares from what the rows are averages of (arXiv 2312.02696).

    The profile of an average says how much of it is of each step s of the run. That of a power-function EMA is
    ``(gamma + 1) s^gamma / t^(gamma + 1)`` (section 3.1); its standard deviation, as a share of the run so far, is the
    length, ``sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)`` (Eq. 123). The weights are those with which the rows' own
    profiles come nearest to it, in least squares (section 3.2). In the paper rows are power-function EMAs themselves.
    Ours: a row's profile is constant over the steps it stands for, live's over the last step, and weights sum to 1.

    Args:
        spans: of the rows, oldest first, and live's.
        length: standard deviation of the profile, as a share of the run so far.

    Raises:
        ValueError: ``length`` not in (0, 0.288]; 0.2887 is that of the uniform mean of the whole run.
    """
    if not 0.0 < number("length", length, right := "a share of the run above 0, at most 0.288") <= 0.288:
        raise ValueError(f"length={length}: must be {right}")
    cubic = length**2 * Polynomial([2.0, 1.0]) ** 2 * Polynomial([3.0, 1.0]) - Polynomial([1.0, 1.0])
    gamma = float(cubic.roots().real.max())
    edges = stretches(spans) / spans[-1].last
    begins, ends = edges[:-1].copy(), edges[1:]
    if live_is_beside(spans):
        begins[-1] = 1.0 - 1.0 / spans[-1].last
    # Inner products of the profiles over the run: of the rows with each other, and with the one that is wanted.
    lengths, size = ends - begins, len(spans)
    common = np.minimum.outer(ends, ends) - np.maximum.outer(begins, begins)
    products = np.maximum(common, 0.0) / np.outer(lengths, lengths)
    wanted = (ends ** (gamma + 1.0) - begins ** (gamma + 1.0)) / lengths
    # With a Lagrange multiplier for the sum of the weights.
    ones = np.ones((size, 1))
    system = np.block([[products, ones], [ones.T, np.zeros((1, 1))]])
    return _normalised(np.linalg.solve(system, np.append(wanted, 1.0))[:size])


def _averaged(spans: Sequence[Span], remaining: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Merge weights of rows that make a running average.

    Args:
        spans: of the rows, oldest first.
        remaining: of steps, the weight that all checkpoints up to them have in the average; 1 at the newest step.
    """
    return _normalised(np.diff(remaining(stretches(spans))))


def _normalised(values: np.ndarray) -> np.ndarray:
    return values / values.sum()


_Argument = Literal["size", "steps", "spans", "losses"]


class RecipeSearch(Search):
    """A recipe as a search: its weights are the one candidate.

    A recipe of losses first evaluates rows alone, newest first, as many as the budget allows beside that candidate.
    The weights are then those of these newest rows, and 0 for the older ones.

    Attributes:
        recipe: the function.
        argument: what the function takes as its first argument: the rows' "size", "steps", "spans" or "losses".
    """

    recipe: ClassVar[Callable[..., np.ndarray]]
    argument: ClassVar[_Argument]

    def __init__(self, problem: Problem, **options: Any) -> None:
        super().__init__(problem)
        self._options = options
        # Losses of the newest rows, by age.
        self._losses = {0: problem.live_loss}
        # One evaluation is kept for the candidate itself; live's loss is known.
        measurable = min(len(problem.steps), problem.evaluations - 1 + len(self._losses))
        self._wanted = measurable if self.argument == "losses" else 0
        self._done = False

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Raise the recipe's ValueError for these options."""
        two = (Span(1, 1, 1), Span(2, 2, 1))
        cls.recipe({"size": 2, "steps": [1, 2], "spans": two, "losses": [1.0, 1.0]}[cls.argument], **options)

    def ask(self) -> np.ndarray | None:
        if len(self._losses) < self._wanted:
            return self.problem.row(age=len(self._losses))
        if self._done:
            return None
        self._done = True
        losses = [self._losses[age] for age in reversed(range(len(self._losses)))]
        # Beside rows that are means, live is no row of a recipe that knows neither losses nor spans: the rows are all
        # but free of noise.
        behind = int(self.argument in ("size", "steps") and live_is_beside(self.problem.spans))
        rows = self.problem.size - behind
        spans = self.problem.spans or tuple(Span(step, step, 1) for step in self.problem.steps)
        known = {"size": rows, "steps": self.problem.steps[:rows], "spans": spans, "losses": losses}
        weights = self.recipe(known[self.argument], **self._options)
        return np.pad(weights, (rows - len(weights), behind))

    def tell(self, weights: np.ndarray, loss: float, observed: Observed) -> None:
        if not self._done:
            self._losses[len(self._losses)] = loss


def _search_of(recipe: Callable[..., np.ndarray], name: str, argument: _Argument) -> type[RecipeSearch]:
    """A subclass of :class:`RecipeSearch` whose signature is ``(problem, *, <the recipe's keyword arguments>)``."""
    options = [p for p in inspect.signature(recipe).parameters.values() if p.kind is p.KEYWORD_ONLY]
    problem = inspect.Parameter("problem", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    attributes = {
        "recipe": staticmethod(recipe),
        "argument": argument,
        "closed_form": argument != "losses",
        # An average over all steps of far back is best made of rows that are such averages.
        "multiscale": argument == "spans",
        "__signature__": inspect.Signature([problem, *options]),
        "__doc__": recipe.__doc__,
        "__module__": __name__,
    }
    return type(name, (RecipeSearch,), attributes)


Lawa = _search_of(lawa, "Lawa", "size")
Ema = _search_of(ema, "Ema", "size")
Wma = _search_of(wma, "Wma", "size")
Wsm = _search_of(wsm, "Wsm", "size")
MwaStep = _search_of(mwa_step, "MwaStep", "steps")
MwaLoss = _search_of(mwa_loss, "MwaLoss", "losses")
Perplexity = _search_of(perplexity, "Perplexity", "losses")
TailEma = _search_of(tail_ema, "TailEma", "spans")
HalfLife = _search_of(half_life, "HalfLife", "spans")
MeanOfSteps = _search_of(mean_of_steps, "MeanOfSteps", "spans")
PosthocEma = _search_of(posthoc_ema, "PosthocEma", "spans")


class Fisher(Lawa):  # type: ignore[misc, valid-type]
    """The mean of the rows, each parameter weighted by its Fisher information in each row (arXiv 2111.09832).

    The information is the square of the gradient on one part of the search split. It takes as much memory as the rows
    do in float32, and 3 passes over that part for each row.
    """

    weighing = "fisher"
    closed_form = False


class RegMean(Lawa):  # type: ignore[misc, valid-type]
    """The mean of the rows, with linear layers merged by least squares on their inputs (arXiv 2212.09849).

    It takes a pass over one part of the search split for each row.
    """

    weighing = "regmean"
    closed_form = False


class Bema(Search):
    """BEMA as a search (arXiv 2508.00180), with the paper's symbols as options; see :func:`bema`.

    Args:
        problem: the merge's problem, with two leading rows, theta_0 and EMA_t.
        eta: bias power. kappa: EMA power. rho: lag. gamma: multiplier. Defaults are those of TRL's BEMACallback.
    """

    closed_form = True

    def __init__(
        self, problem: Problem, *, eta: float = 0.2, kappa: float = 0.5, rho: float = 10.0, gamma: float = 1.0
    ) -> None:
        super().__init__(problem)
        weights = bema(len(problem.steps), problem.steps[-1], eta=eta, rho=rho, gamma=gamma)
        self._candidates = [weights]

    @staticmethod
    def average_rate(
        step: int, *, eta: float = 0.2, kappa: float = 0.5, rho: float = 10.0, gamma: float = 1.0
    ) -> float:
        """beta_t, with which the window keeps EMA_t up to date; takes all options of the search, and ignores eta."""
        return bema_rate(step, kappa=kappa, rho=rho, gamma=gamma)

    def ask(self) -> np.ndarray | None:
        return self._candidates.pop() if self._candidates else None
