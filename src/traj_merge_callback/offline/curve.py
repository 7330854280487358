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
from ..disk.metrics_file import read_records
from ..disk.output import alone, vacant
from ..disk.snapshots import SnapshotStore
from ..disk.untrusted import damage_of, mapping, read_json_object
from ..evaluate.heldout import Nll
from ..search.checks import integer
from ..search.problem import SearchState
from .checkpoints import find_checkpoints
from .models import check_alike
from .report import report
from .search import OPTIONS, checked_config, make_rows, merge_rows, prepare

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
    config = checked_config(options, keep_last=0, keep_best=False)
    config.check_evaluations(window)
    found = find_checkpoints(checkpoints, last=last, every=every, steps=steps, allow_pickle=allow_pickle)
    ends = [*range(1, len(found))]
    if not every_step and len(ends) > _POINTS:
        ends = np.unique(np.linspace(1, len(found) - 1, _POINTS).round().astype(int)).tolist()
    output = Path(output).expanduser().resolve()
    reading = {"sequences": sequences, "block_size": block_size, "batch_size": batch_size}
    evaluating = prepare(found[-window:], heldout, config, model, tokenizer, nll, device, dtype, reading)
    store = SnapshotStore(output, keep_last=0, keep_best=False)
    settings = {
        "window": window,
        "every": every,
        "last": last,
        "steps": steps,
        "dtype": dtype,
        **{name: getattr(config, name) for name in OPTIONS},
        "heldout": evaluating.heldout.digest,
    }
    with alone(output):
        lines = _begun(output, settings, store)
        for number, end in enumerate(ends, start=1):
            step = found[end].step
            if step in lines:
                continue
            part = found[max(0, end + 1 - window) : end + 1]
            check_alike(part)
            rows = make_rows(evaluating, part, found[-1] if model is None else None, progress=progress)
            record = merge_rows(evaluating, rows, part, store, SearchState(), progress=progress)
            lines[step] = record.to_json()
            write_whole(output / "metrics.jsonl", "".join(f"{lines[one]}\n" for one in sorted(lines)))
            logger.info(
                "%d/%d, step %d: live %.4f, merged %.4f", number, len(ends), step, record.live_loss, record.merged_loss
            )
        try:
            report(output, output / "curve.html")
        except ImportError as error:
            logger.warning("the curve is not drawn: %s", error)
    return [json.loads(lines[found[end].step]) for end in ends]


def _begun(output: Path, settings: dict[str, Any], store: SnapshotStore) -> dict[int, str]:
    """The points that earlier calls have made in this folder, by step; a curve is begun where there is none.

    Raises:
        ValueError: the folder holds a curve made with other arguments.
        FileExistsError: it holds something else.
    """
    document = output / "curve.json"
    if document.is_file():
        known = read_json_object(document)
        with damage_of(document):
            store.run, before = str(known["run"]), mapping(known["settings"])
        if differ := [key for key, value in settings.items() if before.get(key) != json.loads(json.dumps(value))]:
            raise ValueError(
                f"output={str(output)!r} holds a curve with another {', '.join(differ)}: name another folder"
            )
        return {one["step"]: json.dumps(one) for one in read_records(output / "metrics.jsonl")}
    if not output.is_dir() or any(output.iterdir()):
        make_folder(vacant(output))
    write_whole(document, json.dumps({"version": 1, "run": store.run, "settings": settings}, indent=2) + "\n")
    return {}
