"""Every option of a merge, with its default, validated when it is built."""

from __future__ import annotations

import functools
import math
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from string import Formatter
from typing import Any, TypeVar

from .metrics import DEFAULT_NAME
from .search import resolve_search
from .search.checks import LARGEST_SEED, choice, did_you_mean, function, integer, number, share, shown
from .search.evaluation import PARTS
from .search.grouped import GroupedSearch
from .search.objective import KINDS
from .search.problem import LEARNING_COST
from .window.layout import check_groups
from .window.storage import DTYPES

T = TypeVar("T")
# Samples that a row is made of, at most, and rows that there are from one merge to the next, where that is not said.
_MOST_SAMPLES = 8
_ROWS_A_MERGE = 10
# Rows of each kind where that is not said: with what is kept beside rows that are means, they take the same memory.
_ROWS = {"last": 8, "mean": 6, "multiscale": 6}


def _knowing_its_options(cls: type[T]) -> type[T]:
    """Say what to use instead of an option that earlier versions had, or that is misspelt."""
    init = cls.__init__
    known = {one.name for one in fields(cls)}  # type: ignore[arg-type]

    @functools.wraps(init)
    def checked(self: T, *args: Any, **options: Any) -> None:
        if "eval_device" in options:
            raise TypeError(
                f"eval_device={options['eval_device']!r}: this option was removed with schedule='background'; "
                "merges are made on the training device, with schedule='interleaved' or 'blocking'"
            )
        for name in options.keys() - known:
            meant = did_you_mean(name, [*known, "heldout", "nll"]) or "; help(MergeConfig) lists the options"
            raise TypeError(f"{name}={options[name]!r}: there is no such option{meant}")
        init(self, *args, **options)

    cls.__init__ = checked  # type: ignore[assignment]
    return cls


@_knowing_its_options
@dataclass(frozen=True)
class MergeConfig:
    """Options of :class:`TrajectoryMerger` and of both callbacks, which take exactly these names.

    Args:
        window_size: k, the number of rows kept, at least 2; live is one more where rows are means. None: 8 checkpoints,
            or 6 means.
        capture_every: optimizer steps between two rows of the window. None: about a tenth of ``merge_every``.
        row: what a row is: "last", a checkpoint as it was at its step; "mean", the mean of ``samples_per_row``
            checkpoints sampled evenly over the ``capture_every`` steps up to it; "multiscale", such a mean, which
            becomes one with its neighbour later, so that spans grow with age and all rows reach back over at least
            half of the run; "auto": "multiscale" for search="auto", "surrogate" and recipes that average over steps
            ("tail-ema", "half-life", "mean-of-steps", "posthoc-ema"), "last" for all others, which were published for
            single checkpoints or are your own.
        samples_per_row: must divide ``capture_every`` if ``row="mean"``. None: the largest number up to 8 that does;
            of multiscale rows 5 to 8, or ``capture_every`` if that is less.
        merge_every: optimizer steps between two merges; a multiple of ``capture_every``, so that live is a row.
        start_step: no checkpoint is taken before this step (for instance the end of warm-up).
        search: how merge weights are chosen: "auto", "surrogate", "trajectory", "reach", "gp", "pairwise", "sparse",
            "greedy", "df-merge", a recipe ("lawa", "ema", "wma", "wsm", "mwa-loss", "mwa-step", "perplexity", "bema",
            "tail-ema", "half-life", "mean-of-steps", "posthoc-ema", "fisher", "regmean"), a registered name or
            "package.module:Class".
        search_options: options of the search or recipe, for instance ``{"decay": 0.9}`` for "ema" or
            ``{"space": "simplex"}`` for "auto".
        groups: merge weights for each parameter group of its own, starting from the best ones for the whole model:
            "blocks" (each block's attention and MLP, norms, embeddings, head), or a mapping from group names to lists
            of name patterns. A step takes 5 of the ``evaluations``, and all that are left are used while they help.
        objective: "mean" of the loss over the held-out domains, or "worst": the largest rise over live in any of them.
        domain_weights: weights of the domains in the mean; by default they count by their tokens.
        tolerance: largest rise over live, in nats per token, that a merge may have in any domain on the search split;
            None: no limit.
        evaluations: what a merge may spend, in forward passes over the search split, live included; a candidate costs
            1, with its gradient 3; at least 2.
        heldout_batches: batches read of each held-out loader, once, and kept on the CPU: an even sample of a dataset
            with indices or of a list, the first of another iterable.
        search_fraction: share of the held-out sequences that weights are chosen on; the rest is reported on.
        report_only: names of held-out domains that are reported but never searched on.
        name: of these merges, where a trainer has several callbacks: metrics are logged as ``<name>/...``. Unless it is
            "merge", folders have it in their names: "merged-<name>", and that of the state beside a checkpoint.
        output_dir: folder for snapshots and metrics.jsonl. None: the callbacks use "merged" inside the trainer's own
            output folder, the engine uses "merged" in the working directory. If another run that is alive writes there,
            this one takes the same name with a number, and says so in a warning.
        keep_last: how many of the newest snapshots are kept; 0 with ``keep_best=False`` publishes none.
        keep_best: whether the snapshot of lowest loss on the search split is kept beside them.
        snapshot_files: under FSDP, "whole": rank 0 gathers and writes the model, "sharded": every rank
            writes its part (``consolidate_snapshot`` makes a model folder of it), or "auto": whole up to 5 GB.
        dtype: how rows are kept: "auto", "float32", "bfloat16" or "int8" (1.0625 bytes per number, and 4 for all rows).
        window_storage: where rows are kept: "memory" (of the CPU), "disk" (memory-mapped files in ``output_dir``), or
            "device" (the memory of the training device, so that no candidate is read over the bus).
        schedule: "interleaved": a merge is done in pieces between training steps; "blocking": at once, while training
            waits.
        max_pause: longest time in seconds that an interleaved merge may take between two training steps; None: three
            training steps' time, except that a merge not done when the next one is due is finished at once. Held-out
            batches that take longer are cut, as far as single sequences.
        max_overhead: largest share of wall time that everything here may take; a merge that is due starts when it is
            paid for, with fewer candidates if that is sooner. None: no limit, so that there is a merge every
            ``merge_every`` steps; if one takes more than 5 % of the time until the next, a warning says what would
            bring that to 2 %. The merge at the end of training is not bound by it, nor by ``max_pause``.
        trainable_only: merge only parameters that require gradients (and floating-point buffers).
        merge_at_end: merge once more at the last step if no merge was due there.
        load_merged_at_end: put the best snapshot into the model when training ends.
        on_spike: None: a spike of the loss is said in the logs, and spoiled checkpoints are left out of merges;
            "rollback": besides, if live's held-out loss has risen far as well, the last merge from before the spike
            takes the place of the model's weights, and training goes on from there. It takes one float32 row of memory.
        spike_moments: what a rollback does with the optimizer's state: "reset", as if training began; "keep", unless
            live's loss is not a number.
        spike_warmup: optimizer steps after a rollback over which the learning rate grows to what it would be.
        process_timeout: seconds that a collective of a merge may take; after that merging is off for the run.
        seed: seed of everything random here; the training run's own random state is never touched.
        on_publish: a command that each published snapshot is given to, in a process of its own beside training, with
            "{snapshot}" in the place of its folder and "{out}" of a folder for results; or a function of that folder, a
            ``Path``, that may return a dict of numbers. Numbers in the JSON that it writes or prints are logged as
            ``merge/eval/<name>``. One runs at a time; of snapshots that wait the newest is next. It sees no GPU, and
            takes none of training's memory, unless it names one itself: ``env CUDA_VISIBLE_DEVICES=7 lm_eval ...``.
        on_publish_timeout: seconds after which it is ended.
        on_error: "warn": a failure during training is logged once with its cause and training goes on; "raise".
        progress: show a progress bar when a merge takes longer than a second.
        log_details: log also what is named ``merge_details/...``; metrics.jsonl has it all.

    Raises:
        ValueError, TypeError: naming the argument, its value and what would be right.
    """

    window_size: int | None = None
    capture_every: int | None = None
    row: str = "auto"
    samples_per_row: int | None = None
    merge_every: int = 500
    start_step: int = 0
    search: str = "auto"
    search_options: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, list[str]] | str | None = None
    objective: str = "mean"
    domain_weights: dict[str, float] | None = None
    tolerance: float | None = None
    evaluations: int = 9
    heldout_batches: int = 16
    search_fraction: float = 0.5
    report_only: list[str] = field(default_factory=list)
    name: str = DEFAULT_NAME
    output_dir: str | None = None
    keep_last: int = 2
    keep_best: bool = True
    snapshot_files: str = "auto"
    dtype: str = "auto"
    window_storage: str = "memory"
    schedule: str = "interleaved"
    max_pause: float | None = None
    max_overhead: float | None = None
    trainable_only: bool = True
    merge_at_end: bool = True
    load_merged_at_end: bool = False
    on_spike: str | None = None
    spike_moments: str = "reset"
    spike_warmup: int = 20
    on_publish: Callable[..., Any] | str | None = None
    on_publish_timeout: float = 3600.0
    process_timeout: float = 600.0
    seed: int = 0
    on_error: str = "warn"
    progress: bool = True
    log_details: bool = True

    def __post_init__(self) -> None:
        self._check_integers()
        for name in ("keep_best", "trainable_only", "merge_at_end", "load_merged_at_end", "progress", "log_details"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r}: must be True or False")
        if self.merge_every % self.capture_interval:
            nearest = max(1, round(self.merge_every / self.capture_interval)) * self.capture_interval
            raise ValueError(
                f"merge_every={self.merge_every} is not a multiple of capture_every={self.capture_every}, so live "
                f"would not be in the window at every merge; the nearest multiple is merge_every={nearest}"
            )
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self.name):
            raise ValueError(
                f"name={self.name!r}: must be up to 64 letters, digits or any of '-_.', and begin with no sign"
            )
        if self.schedule == "background":
            raise ValueError("schedule='background' was removed; take 'interleaved' (the default) or 'blocking'")
        choices = {
            "dtype": ["auto", *DTYPES],
            "snapshot_files": ["auto", "whole", "sharded"],
            "window_storage": ["memory", "disk", "device"],
            "schedule": ["interleaved", "blocking"],
            "row": ["auto", *_ROWS],
            "objective": [*KINDS],
            "spike_moments": ["reset", "keep"],
            "on_error": ["warn", "raise"],
        }
        if self.on_spike is not None:
            choices["on_spike"] = ["rollback"]
        for name, allowed in choices.items():
            choice(name, getattr(self, name), allowed)
        self._check_numbers()
        self._check_output_dir()
        self._check_on_publish()
        names = self.report_only
        if not isinstance(names, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"report_only={names!r}: must be a list of domain names")
        if self.load_merged_at_end and not self.publishes:
            raise ValueError("load_merged_at_end=True needs snapshots: set keep_best=True or keep_last of at least 1")
        if not isinstance(self.search, str):
            raise TypeError(f"search={self.search!r}: must be a name; register_search gives your own class one")
        options = self.search_options
        if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
            raise TypeError(f"search_options={options!r}: must be a dict from names of options to values")
        search = resolve_search(self.search, options)
        self._check_rows(search.average_rate is not None or search.weighing != "rows")
        check_groups(self.groups)
        if self.groups is not None and search.weighing != "rows":
            raise ValueError(f"groups={self.groups!r} does not go with search={self.search!r}, which has no groups")
        self.check_evaluations(self.num_rows)
        self._check_objective()

    def check_evaluations(self, rows: int) -> None:
        """Raise a ValueError if ``evaluations`` are too few for a merge of so many rows."""
        least = self.least_evaluations(rows)
        if self.evaluations < least:
            takes = f"groups take {least - 2} of them, so with groups={self.groups!r}"
            if self.groups is None:
                takes = f"search={self.search!r} takes {least - 2} of them to learn of {rows} rows, so"
            raise ValueError(f"evaluations={self.evaluations}: {takes} it must be at least {least}")

    def least_evaluations(self, rows: int) -> int:
        """The fewest ``evaluations`` with which so many rows can be merged."""
        if self.groups is not None:
            return GroupedSearch.cost + 2
        return 2 + math.ceil(LEARNING_COST[resolve_search(self.search).weighing] * rows / PARTS)

    def _check_integers(self) -> None:
        minimums = {
            "window_size": 2,
            "capture_every": 1,
            "samples_per_row": -math.inf,  # see _check_rows
            "merge_every": 1,
            "start_step": 0,
            "evaluations": 2,
            "heldout_batches": 1,
            "keep_last": 0,
            "spike_warmup": 0,
            "seed": 0,
        }
        for name, least in minimums.items():
            if (value := getattr(self, name)) is None and name in ("window_size", "capture_every", "samples_per_row"):
                continue
            # Integers of numpy become Python's, which JSON can hold.
            object.__setattr__(self, name, integer(name, value, least, LARGEST_SEED if name == "seed" else math.inf))

    def _check_numbers(self) -> None:
        share("search_fraction", self.search_fraction)
        right = "a positive number of seconds"
        for name in ("process_timeout", "on_publish_timeout"):
            if not number(name, value := getattr(self, name), right) > 0:
                raise ValueError(f"{name}={value}: must be {right}")
        if self.max_pause is not None and not number("max_pause", self.max_pause, right := f"{right}, or None") > 0:
            raise ValueError(f"max_pause={self.max_pause}: must be {right}")
        right = "a share of wall time above 0, at most 1, as 0.02 for 2 %, or None"
        if self.max_overhead is not None and not 0 < number("max_overhead", self.max_overhead, right) <= 1:
            raise ValueError(f"max_overhead={self.max_overhead}: must be {right}")
        right = "at least 0 nats per token, or None"
        if self.tolerance is not None and not number("tolerance", self.tolerance, right) >= 0:
            raise ValueError(f"tolerance={self.tolerance}: must be {right}")

    def _check_on_publish(self) -> None:
        given = self.on_publish
        if given is None:
            return
        if not self.publishes:
            raise ValueError("on_publish needs snapshots: set keep_best=True or keep_last of at least 1")
        if not isinstance(given, str):
            function("on_publish", given, "of a snapshot's folder, or a command with {snapshot} in it")
            return
        right = 'must be a command such as "lm_eval --model_args pretrained={snapshot} --output_path {out}"'
        try:
            program, *_ = parts = shlex.split(given)
            names = {name for part in parts for _, name, _, _ in Formatter().parse(part) if name is not None}
        except ValueError as error:
            raise ValueError(f"on_publish={shown(given)}: {right}; {error}") from None
        if not {"snapshot"} <= names <= {"snapshot", "out"}:
            raise ValueError(f"on_publish={shown(given)}: {right}; it has the fields {sorted(names)} (a brace: {{{{)")
        if shutil.which(program) is None:
            raise ValueError(f"on_publish={shown(given)}: there is no program {program!r}")

    def _check_output_dir(self) -> None:
        if self.output_dir is None:
            return
        if not isinstance(self.output_dir, (str, os.PathLike)):
            raise TypeError(f"output_dir={self.output_dir!r}: must be the path of a folder, or None")
        if not os.fspath(self.output_dir):
            raise ValueError("output_dir='': must be the path of a folder; leave it out for the default")

    def _check_rows(self, needs_checkpoints: bool) -> None:
        samples = self.samples_per_row
        if samples is not None and not 1 <= samples <= self.capture_interval:
            raise ValueError(f"samples_per_row={samples}: must be from 1 to capture_every={self.capture_interval}")
        if samples is not None and samples > 1 and self.row_kind == "last":
            raise ValueError(
                f"samples_per_row={samples} is for rows that are means, and with search={self.search!r} and "
                f"row={self.row!r} rows are single checkpoints: set row='mean' or 'multiscale', or leave it out"
            )
        if self.row == "mean" and self.capture_interval % self.samples:
            raise ValueError(
                f"samples_per_row={samples} does not divide capture_every={self.capture_interval}: samples must be "
                "evenly spaced"
            )
        if self.row_kind != "last" and needs_checkpoints:
            raise ValueError(
                f"row={self.row!r} does not go with search={self.search!r}, which needs single checkpoints"
            )

    def _check_objective(self) -> None:
        given = self.domain_weights
        if given is None:
            return
        if not isinstance(given, Mapping):
            raise TypeError(f"domain_weights={given!r}: must be a mapping from domain names to weights, or None")
        if self.objective != "mean":
            raise ValueError(f"domain_weights={given} are for objective='mean'")
        right = "at least 0, and one of them positive"
        weights = [number(f"domain_weights[{name!r}]", one, f"a weight of {right}") for name, one in given.items()]
        if not all(weight >= 0 for weight in weights) or not any(weights):
            raise ValueError(f"domain_weights={given}: must be {right}")

    def named(self, path: str) -> str:
        """A path of these merges only: ``path``, with the name behind it unless that is the default."""
        return path if self.name == DEFAULT_NAME else f"{path}-{self.name}"

    @property
    def row_kind(self) -> str:
        """What a row is: "last", "mean" or "multiscale"."""
        if self.row != "auto":
            return self.row
        return "multiscale" if resolve_search(self.search).multiscale else "last"

    @property
    def num_rows(self) -> int:
        """How many rows are kept."""
        return _ROWS[self.row_kind] if self.window_size is None else self.window_size

    @property
    def capture_interval(self) -> int:
        """Optimizer steps between two rows."""
        if self.capture_every is not None:
            return self.capture_every
        small = [count for count in range(1, math.isqrt(self.merge_every) + 1) if self.merge_every % count == 0]
        divisors = small + [self.merge_every // count for count in reversed(small)]
        return min(divisors, key=lambda count: abs(math.log(count * _ROWS_A_MERGE / self.merge_every)))

    @property
    def samples(self) -> int:
        """How many checkpoints a row is made of."""
        if self.row_kind == "last":
            return 1
        if self.samples_per_row is not None:
            return self.samples_per_row
        interval = self.capture_interval
        if self.row_kind == "multiscale":
            return interval // math.ceil(interval / _MOST_SAMPLES)
        return max(count for count in range(1, _MOST_SAMPLES + 1) if interval % count == 0)

    @property
    def publishes(self) -> bool:
        """Whether snapshots are written at all."""
        return self.keep_best or self.keep_last > 0


def check_side_by_side(configs: Iterable[MergeConfig]) -> None:
    """Whether callbacks can work side by side in one trainer.

    Raises:
        ValueError: two of them have the same name or the same folder.
    """
    names: set[str] = set()
    folders: set[str] = set()
    for config in configs:
        if config.name.lower() in names:  # there are file systems that do not tell upper from lower case
            raise ValueError(
                f"two callbacks of this trainer have name={config.name!r}: give each a name of its own, for instance "
                'name="average", by which its metrics and folders are told from the others'
            )
        if config.output_dir is not None and (folder := os.path.realpath(config.output_dir)) in folders:
            raise ValueError(
                f"two callbacks of this trainer have output_dir={config.output_dir!r}: give each a folder of its own, "
                "or leave output_dir out"
            )
        names.add(config.name.lower())
        folders |= set() if config.output_dir is None else {folder}
