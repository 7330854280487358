"""Data-driven merge weights for checkpoints that are there already: the engine of a live merge, without a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..config import MergeConfig
from ..disk.atomic import Writer, check_space, whole_folder
from ..disk.metrics_file import MetricsFile
from ..disk.model_files import collect_pretrained
from ..disk.output import new_folder
from ..disk.parts import PartsIndex
from ..disk.snapshots import SnapshotStore
from ..disk.untrusted import folder_name_of_step
from ..engine.choose import Chooser
from ..engine.failures import Failures
from ..engine.merge import Merge
from ..engine.publish import Publisher
from ..evaluate.heldout import HeldOutLoss, Nll, device_of
from ..metrics import MergeRecord
from ..search import resolve_search
from ..search.checks import did_you_mean
from ..search.problem import GRADIENT_COST, SearchState
from ..window.memory import let_go, ran_out
from ..window.pieces import BACKWARD, FORWARD, WAIT, Pieces
from .checkpoints import Checkpoint, find_checkpoints
from .heldout import heldout_batches, located
from .models import (
    block_for,
    check_alike,
    check_tokens,
    converted,
    device_named,
    load_model,
    load_tokenizer,
    model_named,
)
from .progress import bar
from .rows import CheckpointRows, StoredOtherwise

logger = logging.getLogger("traj_merge_callback")
#: Options of :class:`MergeConfig` that mean something here.
OPTIONS = (
    "search",
    "search_options",
    "groups",
    "heldout_batches",
    "objective",
    "domain_weights",
    "tolerance",
    "evaluations",
    "search_fraction",
    "report_only",
    "seed",
)


@dataclass(frozen=True)
class Evaluating:
    """How merges are evaluated.

    Args:
        model: computes with their weights.
        heldout: the two splits.
        config: the options.
        about: what merge.json says of it.
        tokenizer: saved beside a merge; None: there is none.
    """

    model: nn.Module
    heldout: HeldOutLoss
    config: MergeConfig
    about: dict[str, Any]
    tokenizer: Any = None


def search(
    checkpoints: str | Path | Sequence[str | Path],
    heldout: Any,
    *,
    output: str | Path = "merged",
    last: int | None = None,
    every: int | None = None,
    steps: tuple[int | None, int | None] | None = None,
    allow_pickle: bool = False,
    progress: bool = True,
    model: nn.Module | str | None = None,
    tokenizer: str | None = None,
    nll: Nll | None = None,
    device: str | None = None,
    dtype: str | None = None,
    sequences: int = 128,
    block_size: int | None = None,
    batch_size: int = 8,
    **options: Any,
) -> MergeRecord:
    """Choose merge weights of checkpoints on held-out data, and write the merge as a snapshot.

    Args:
        checkpoints, last, every, steps, allow_pickle: see :func:`find_checkpoints`.
        heldout: names of files, folders or datasets, see :func:`heldout_batches`; or, as the engine takes them, a
            loader of batches or a mapping from domain names to such.
        output: new folder for the snapshot, metrics.jsonl and index.json, laid out as a live run's.
        progress: show a bar on what takes longer than a second.
        model: that computes with the weights; a name or folder of transformers for checkpoints without config.json.
            None: that of the newest checkpoint.
        tokenizer: see :func:`load_tokenizer`.
        nll: see :class:`HeldOutLoss`.
        device: by default the first GPU, or else the CPU.
        dtype: that the model computes in, and of the snapshot: "float32", "bfloat16", "float16"; None: the files'.
        sequences: of each domain, for both splits together.
        block_size: tokens of a sequence; None: the model's context, at most 1024.
        batch_size: sequences of a batch.
        **options: of :class:`MergeConfig`: search, search_options, groups, objective, domain_weights, tolerance,
            evaluations, heldout_batches (for loaders), search_fraction, report_only, seed.

    Returns:
        The record; its ``snapshot`` is the folder written.

    Raises:
        ValueError, TypeError, OSError: what is wrong with which argument or file; nothing half-written is left.

    Example::

        record = search("runs/checkpoints", ["heldout.jsonl"], search="auto")
        print(record.live_loss, record.merged_loss, record.snapshot)
    """
    config = checked_config(options)
    with new_folder(output) as folder:
        found = find_checkpoints(checkpoints, last=last, every=every, steps=steps, allow_pickle=allow_pickle)
        config.check_evaluations(len(found))
        reading = {"sequences": sequences, "block_size": block_size, "batch_size": batch_size}
        evaluating = prepare(found, heldout, config, model, tokenizer, nll, device, dtype, reading)
        rows = make_rows(evaluating, found, found[-1] if model is None else None, progress=progress)
        check_space(folder, sum(slot.numel * slot.dtype.itemsize for slot in rows.layout.slots))
        with whole_folder(folder) as temporary, rows.other_buffers(evaluating.model):
            store = SnapshotStore(temporary, keep_last=1, keep_best=True)
            record = merge_rows(evaluating, rows, found, store, SearchState(), progress=progress)
            record = replace(record, snapshot=str(Path(output) / folder_name_of_step(record.step)))
            MetricsFile(temporary / "metrics.jsonl").append(record)
    return record


def checked_config(options: dict[str, Any], **fixed: Any) -> MergeConfig:
    """The options of an offline merge, with some that are not the user's.

    Raises:
        ValueError, TypeError: see :class:`MergeConfig`; an option that has no meaning here, or that search.
    """
    for name in options.keys() - set(OPTIONS):
        meant = did_you_mean(name, OPTIONS) or f"; there are {', '.join(OPTIONS)}"
        raise TypeError(f"{name}={options[name]!r}: there is no such option{meant}")
    config = MergeConfig(
        row="last", capture_every=1, merge_every=1, on_error="raise", window_size=2, **options, **fixed
    )
    if resolve_search(config.search).average_rate is not None:
        raise ValueError(
            f"search={config.search!r} needs an average of every step of a run, which its checkpoints do not tell; it "
            "can be used in the callback"
        )
    return config


def prepare(
    checkpoints: Sequence[Checkpoint],
    heldout: Any,
    config: MergeConfig,
    model: nn.Module | str | None,
    tokenizer: str | None,
    nll: Nll | None,
    device: str | None,
    dtype: str | None,
    reading: Mapping[str, int | None],
) -> Evaluating:
    """The model and the held-out data for merges of some checkpoints; see :func:`search`."""
    check_alike(checkpoints)
    place = device_named(device)
    if model is None:
        model = load_model(checkpoints[-1], dtype, place)
    elif isinstance(model, str):
        model = model_named(model, dtype, place)
    about: dict[str, Any] = {"checkpoints": [one.name for one in checkpoints]}
    saved = None
    if (names := sources_in(heldout)) is not None:
        tokens, name = load_tokenizer(checkpoints, tokenizer)
        saved = None if name == "bytes" else tokens
        about["heldout_data"] = {
            "sources": [located(one) for one in names],
            "tokenizer": name,
            **reading,
            "block_size": block_for(model, reading["block_size"]),
            **{key: getattr(config, key) for key in ("search_fraction", "report_only", "seed")},
        }
        heldout = heldout_of(about["heldout_data"], tokens)
        check_tokens(model, heldout, name)
    loss = HeldOutLoss(
        heldout,
        nll=nll,
        batches=config.heldout_batches,
        search_fraction=config.search_fraction,
        report_only=config.report_only,
        seed=config.seed,
    )
    return Evaluating(model, loss, config, about, saved)


def sources_in(heldout: Any) -> list[str] | None:
    """The names of held-out text that are given; None if batches are."""
    given = [heldout] if isinstance(heldout, (str, Path)) else heldout
    if isinstance(given, (list, tuple)) and given and all(isinstance(one, (str, Path)) for one in given):
        return [str(one) for one in given]
    return None


def heldout_of(described: Mapping[str, Any], tokenizer: Any) -> Mapping[str, Iterable[Any]]:
    """The batches that a merge.json describes under "heldout_data"."""
    keys = ("sequences", "block_size", "batch_size", "search_fraction", "report_only", "seed")
    return heldout_batches(described["sources"], tokenizer, **{key: described[key] for key in keys})


def make_rows(
    evaluating: Evaluating, checkpoints: Sequence[Checkpoint], loaded: Checkpoint | None, *, progress: bool
) -> CheckpointRows:
    """The rows of some checkpoints, all of them read once.

    Args:
        evaluating: has the model.
        checkpoints: oldest first.
        loaded: which the model was loaded from by transformers, which may also convert the others, as it fuses the
            experts of a mixture; None: it is the user's.
        progress: show a bar.

    Raises:
        ValueError: see :class:`CheckpointRows`.
    """
    model, groups = evaluating.model, evaluating.config.groups

    def checked(rows: CheckpointRows) -> CheckpointRows:
        with bar("reading checkpoints", len(checkpoints), show=progress) as shown:
            for _ in rows.check():
                shown.advance()
        return rows

    try:
        rows = checked(CheckpointRows(model, checkpoints, groups))
        if loaded is checkpoints[-1]:
            rows.take_over(model)
        return rows
    except StoredOtherwise as error:
        if loaded is None or not all((one.path / "config.json").is_file() for one in checkpoints):
            raise
        logger.info("%s; transformers converts each checkpoint, into files of TMPDIR", error)
    return checked(CheckpointRows(model, checkpoints, groups, [converted(one) for one in checkpoints]))


def merge_rows(
    evaluating: Evaluating,
    rows: CheckpointRows,
    checkpoints: Sequence[Checkpoint],
    store: SnapshotStore,
    state: SearchState,
    *,
    progress: bool,
) -> MergeRecord:
    """One merge of some rows, searched for, measured and written.

    Args:
        evaluating: how merges are evaluated.
        rows: the rows.
        checkpoints: which they are, oldest first.
        store: where the snapshot goes.
        state: what the merge before remembers.
        progress: show a bar.
    """
    config, model, heldout = evaluating.config, evaluating.model, evaluating.heldout
    store.heldout = heldout.digest
    started, step, processes = time.perf_counter(), checkpoints[-1].step, rows.processes
    index, writer = PartsIndex.of(rows.layout.slots, processes), Writer(device_of(model))
    extra: Callable[[], Callable[[Path], None]] = lambda: collect_pretrained(evaluating.tokenizer)  # noqa: E731
    failures = Failures("raise")
    publisher = Publisher(config, rows, index, store, writer, failures, processes, extra, about=evaluating.about)
    chooser = Chooser(config, heldout, processes)
    merge = Merge(model, rows, config, heldout, chooser, publisher)
    try:
        while True:
            total = config.evaluations * heldout.num_batches("search") + 2 * heldout.num_batches("report")
            try:
                with bar("evaluating merges", total, show=progress) as shown:
                    pieces = merge.pieces(model, merge.keep(model), state, step, config.evaluations)
                    record = _driven(pieces, shown.advance, writer.wait)
                break
            except Exception as error:
                if not _can_go_on(error, heldout, chooser, step):
                    raise
                let_go(error)
    finally:
        merge.parking.release()
        writer.close()
    return replace(record, finished_step=step, seconds=time.perf_counter() - started, run=store.run)


def _can_go_on(error: Exception, heldout: HeldOutLoss, chooser: Chooser, step: int) -> bool:
    """Whether a merge that failed may be made with smaller batches, or without gradients."""
    if ran_out(error) and heldout.longest > 1:
        heldout.cut(2)
        logger.warning("memory ran out: going on with at most %d sequences in a batch", heldout.longest)
        return True
    return chooser.fall_back(error, step)


def _driven(pieces: Pieces[MergeRecord], advance: Callable[[float], None], wait: Callable[[], None]) -> MergeRecord:
    costs = {FORWARD: 1.0, BACKWARD: float(GRADIENT_COST)}
    while True:
        try:
            kind = next(pieces)
        except StopIteration as done:
            record: MergeRecord = done.value
            return record
        if kind == WAIT:
            wait()
        advance(costs.get(kind, 0.0))
