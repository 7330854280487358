"""A snapshot given to another program, such as the lm-evaluation-harness, and the numbers that it finds."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from ..disk.atomic import make_folder
from ..disk.on_publish import numbers_of
from ..disk.snapshots import read_merge, snapshot_folder


def evaluate(folder: str | Path, command: Sequence[str], *, output: str | Path | None = None) -> dict[str, float]:
    """Run a command on a snapshot; what it prints is shown.

    Args:
        folder: of the snapshot.
        command: program and arguments, with "{snapshot}" in the place of the snapshot's folder, and "{out}" of a folder
            for results.
        output: that folder; by default one beside the snapshot's output folder, named ``<output folder>-eval``.

    Returns:
        The numbers in the JSON files that it has written there, by name, those of nested objects joined by "/".

    Raises:
        FileNotFoundError: there is no snapshot, or no such program.
        ValueError: the command does not name the snapshot.
        RuntimeError: it has failed.
    """
    folder = snapshot_folder(folder)
    read_merge(folder)
    if not any("{snapshot}" in part for part in command):
        raise ValueError(
            f"command={' '.join(command)!r}: must name the snapshot, as in lm_eval --model hf --model_args "
            "pretrained={snapshot} --tasks arc_easy --output_path {out}"
        )
    beside = folder.parent.with_name(f"{folder.parent.name}-eval") / folder.name
    out = make_folder(beside if output is None else Path(output))
    parts = [part.replace("{snapshot}", str(folder)).replace("{out}", str(out)) for part in command]
    if (status := subprocess.run(parts, check=False).returncode) != 0:
        raise RuntimeError(f"{parts[0]} ended with exit status {status}")
    return numbers_of(out, [])
