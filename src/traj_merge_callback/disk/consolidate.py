"""A sharded snapshot made whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from safetensors.torch import save_file

from .atomic import whole_folder
from .checksums import check_document, check_files, checksums_of
from .model_files import METADATA, SHARD_BYTES, write_shards
from .parts import PartsIndex, check_parts, read_tensors, tensor_sizes
from .snapshots import read_merge, snapshot_folder, write_document
from .untrusted import own_file


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
        FileExistsError: ``output`` is there and is not an empty folder.
        ValueError: it is not in parts, is damaged, or its parts are of another format version.
    """
    folder, output = snapshot_folder(folder), Path(output)
    if os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"output={str(output)!r} is there already: remove it, or name a new folder")
    merge = read_merge(folder)
    if not merge.get("sharded"):
        raise ValueError(f"{folder} is not a snapshot in parts: it can be loaded as it is")
    if not isinstance(merge["sharded"], dict) or "parts" not in merge["sharded"]:
        raise ValueError(
            f"{folder} was written in parts by an earlier version of traj-merge-callback, in files of "
            "torch.distributed.checkpoint, which this version does not read: consolidate it with that version"
        )
    index = PartsIndex.from_json(merge["sharded"])
    check_parts(folder, index)
    if "checksum" in merge:
        check_document(folder / "merge.json", merge)
        check_files(folder, merge)
    if output.is_dir():
        output.rmdir()
    with whole_folder(output) as temporary:

        def write(path: Path, names: list[str]) -> None:
            save_file(read_tensors(folder, index, names), path, metadata=METADATA)

        write_shards(temporary, tensor_sizes(index), write, shard_bytes)
        for path in folder.iterdir():
            # Weights are those of the parts, whatever other weights there may be.
            if path.is_file() and ".safetensors" not in path.suffixes and path.name != "merge.json":
                shutil.copy2(own_file(path), temporary / path.name)
        described = {key: value for key, value in merge.items() if key not in ("checksum", "checksums")}
        write_document(temporary, {**described, "sharded": None}, checksums_of(temporary))
    return output
