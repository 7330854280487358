"""The merged curve of a whole trajectory: what a merge would have won at every step of a run that is over."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..disk.atomic import make_folder, write_whole
from ..disk.metrics_file import MetricsFile, read_records
from ..disk.snapshots import SnapshotStore
from ..disk.untrusted import read_json_object
from ..evaluate.heldout import Nll
from ..search.checks import integer
from ..search.problem import SearchState
from .checkpoints import Checkpoint, find_checkpoints
from .models import check_alike
from .report import report
from .rows import CheckpointRows
from .search import checked_config, merge_rows, prepare

logger = logging.getLogger("traj_merge_callback")
# Points of a curve, where not every step is asked for.
_POINTS = 20


def curve(
    checkpoints: str | Path | Sequence[str | Path],
    heldout: Any,
    *,
    output: str | Path = "curve",
    window: int = 8,
    every_step: bool = False,
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
) -> list[dict[str, Any]]:
    """Merge a window of checkpoints that slides over a trajectory, and measure each merge; no weights are written.

    A curve that was stopped goes on where it stopped when the same call is made again.

    Args:
        output: folder for metrics.jsonl, a record for each point as a live run writes it, curve.json, and the curve as
            a page and PNG files (see :func:`report`).
        window: checkpoints in a merge.
        every_step: a point at every checkpoint from the second on; otherwise about 20 points, evenly spread.
        checkpoints, heldout, last, every, steps, allow_pickle, progress, model, tokenizer, nll, device, dtype,
        sequences, block_size, batch_size, **options: see :func:`search`.

    Returns:
        The records, by step.

    Raises:
        ValueError, TypeError, OSError: see :func:`search`; ``output`` holds a curve made with other arguments.
    """
    window = integer("window", window, 2)
    config = checked_config({**options}, keep_last=0, keep_best=False)
    found = find_checkpoints(checkpoints, last=last, every=every, steps=steps, allow_pickle=allow_pickle)
    ends = [*range(1, len(found))]
    if not every_step and len(ends) > _POINTS:
        ends = np.unique(np.linspace(1, len(found) - 1, _POINTS).round().astype(int)).tolist()
    output = Path(output).expanduser()
    reading = {"sequences": sequences, "block_size": block_size, "batch_size": batch_size}
    evaluating = prepare(found[-window:], heldout, config, model, tokenizer, nll, device, dtype, reading)
    store = SnapshotStore(output, keep_last=0, keep_best=False)
    settings = {
        "window": window,
        "search": config.search,
        "search_options": dict(config.search_options),
        "evaluations": config.evaluations,
        "seed": config.seed,
        "heldout": evaluating.heldout.digest,
        "newest": found[-1].name,
    }
    done = _begun(output, settings, store)
    file = MetricsFile(output / "metrics.jsonl")
    file.resume(store.run)
    for number, end in enumerate(ends, start=1):
        step = found[end].step
        if step in done:
            continue
        part = found[max(0, end + 1 - window) : end + 1]
        record = merge_rows(
            evaluating, _rows(evaluating.model, part, config.groups), part, store, SearchState(), progress=progress
        )
        file.append(record)
        logger.info(
            "%d/%d, step %d: live %.4f, merged %.4f", number, len(ends), step, record.live_loss, record.merged_loss
        )
    try:
        report(output, output / "curve.html")
    except ImportError as error:
        logger.warning("the curve is not drawn: %s", error)
    return read_records(file.path)


def _rows(model: nn.Module, part: Sequence[Checkpoint], groups: Any) -> CheckpointRows:
    check_alike(part)
    rows = CheckpointRows(model, part, groups)
    for _ in rows.check():
        pass
    return rows


def _begun(output: Path, settings: dict[str, Any], store: SnapshotStore) -> set[int]:
    """The steps that an earlier call has done in this folder; a new curve is begun where there is none.

    Raises:
        ValueError: the folder holds a curve made with other arguments.
        FileExistsError: it holds something else.
    """
    document = output / "curve.json"
    if document.is_file():
        known = read_json_object(document)
        store.run = str(known.get("run"))
        before = known.get("settings", {})
        if differ := [key for key, value in settings.items() if before.get(key) != json.loads(json.dumps(value))]:
            raise ValueError(
                f"output={str(output)!r} holds a curve with another {', '.join(differ)}: name another folder"
            )
        return {record["step"] for record in read_records(output / "metrics.jsonl")}
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"output={str(output)!r} is there already, and is no curve: name a new folder")
    make_folder(output)
    write_whole(document, json.dumps({"version": 1, "run": store.run, "settings": settings}, indent=2) + "\n")
    return set()
