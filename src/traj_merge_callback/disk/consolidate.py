"""A sharded snapshot made whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from .atomic import whole_folder
from .model_files import SHARD_BYTES, write_shards
from .parts import PartsIndex, is_snapshot_part, read_tensors, tensor_sizes
from .snapshots import read_merge


def consolidate_snapshot(folder: str | Path, output: str | Path, *, shard_bytes: int = SHARD_BYTES) -> Path:
    """Make a whole snapshot, which ``from_pretrained`` and ``load_merged`` read, of a sharded one.

    One safetensors file of the output is in memory at a time.

    Args:
        folder: the snapshot.
        output: the new folder, which exists whole or not at all.
        shard_bytes: bytes of a safetensors file at most.

    Returns:
        The new folder.

    Raises:
        FileNotFoundError: ``folder`` is no snapshot, or a part of it is missing.
        ValueError: it is not in parts, or its parts are of another format version.
    """
    folder, output = Path(folder), Path(output)
    merge = read_merge(folder)
    if not merge.get("sharded"):
        raise ValueError(f"{folder} is not a snapshot in parts: it can be loaded as it is")
    if not isinstance(merge["sharded"], dict) or "parts" not in merge["sharded"]:
        raise ValueError(
            f"{folder} was written in parts by an earlier version of traj-merge-callback, in files of "
            "torch.distributed.checkpoint, which this version does not read: consolidate it with that version"
        )
    index = PartsIndex.from_json(merge["sharded"])
    with whole_folder(output) as temporary:
        write_shards(temporary, tensor_sizes(index), lambda names: read_tensors(folder, index, names), shard_bytes)
        for path in folder.iterdir():
            if path.is_file() and not is_snapshot_part(path):
                shutil.copy2(path, temporary / path.name)
        text = json.dumps({**merge, "sharded": None}, indent=2)
        (temporary / "merge.json").write_text(text + "\n", encoding="utf-8")
    return output
