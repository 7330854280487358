"""Making a model folder of a snapshot that many processes wrote, on one machine.

As a program: ``python -m traj_merge_callback.consolidate merged/best model``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch.distributed as dist

from .disk.atomic import whole_folder
from .disk.model_files import write_shards
from .disk.sharded_files import is_sharded, read_tensors, tensor_sizes
from .disk.snapshots import read_merge

# The files of the parts.
_PARTS = (".metadata", ".distcp")


def consolidate_snapshot(folder: str | Path, output: str | Path, *, shard_bytes: int = 5_000_000_000) -> Path:
    """Make a whole snapshot, which ``from_pretrained`` and ``load_merged`` read, of one in parts.

    One shard is in memory at a time.

    Args:
        folder: the snapshot, with the files of all machines if each wrote to its own disk.
        output: the new folder, which exists whole or not at all.
        shard_bytes: bytes of a safetensors file at most.

    Returns:
        The new folder.

    Raises:
        FileNotFoundError: ``folder`` is no snapshot.
        ValueError: it is not in parts.
        RuntimeError: this process is one of several that train together, and would wait for the others.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError("consolidate_snapshot works alone: run it in a process of its own")
    folder, output = Path(folder), Path(output)
    merge = read_merge(folder)
    if not merge.get("sharded") or not is_sharded(folder):
        raise ValueError(f"{folder} is not a snapshot in parts: it can be loaded as it is")
    sizes = tensor_sizes(folder)
    with whole_folder(output) as temporary:
        write_shards(temporary, sizes, lambda names: read_tensors(folder, merge["sharded"], names), shard_bytes)
        for path in folder.iterdir():
            if not path.name.endswith(_PARTS) and path.is_file():
                shutil.copy2(path, temporary / path.name)
        text = json.dumps({**merge, "sharded": None}, indent=2)
        (temporary / "merge.json").write_text(text + "\n", encoding="utf-8")
    return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    print(consolidate_snapshot(arguments.folder, arguments.output))
