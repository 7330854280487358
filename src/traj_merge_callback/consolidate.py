"""Making a model folder of a snapshot that many ranks wrote, on one machine.

As a program: ``python -m traj_merge_callback.consolidate merged/best model``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .disk.consolidate import consolidate_snapshot

__all__ = ["consolidate_snapshot"]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    print(consolidate_snapshot(arguments.folder, arguments.output))
