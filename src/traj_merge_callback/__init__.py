"""Live trajectory merging: a merge of recent checkpoints of one run, better than the newest one, while it trains.

Use :class:`traj_merge_callback.lightning.TrajMergeCallback` with Lightning,
:class:`traj_merge_callback.transformers.TrajMergeCallback` with Hugging Face, and :class:`TrajectoryMerger` in a loop
of your own. :func:`load_merged` puts a published snapshot into a model. :mod:`traj_merge_callback.offline` merges
checkpoints that are there already.
"""

import sys
from typing import NoReturn

from .config import MergeConfig
from .disk.model_files import load_merged
from .disk.snapshots import find_snapshot, read_merge
from .disk.streamed import consolidate_snapshot
from .evaluate.heldout import HeldOutLoss
from .merger import TrajectoryMerger
from .metrics import MergeRecord
from .search import Problem, Search, available_searches, register_search
from .search.evaluation import Evaluation
from .window.window import CheckpointWindow

__all__ = [
    "CheckpointWindow",
    "Evaluation",
    "HeldOutLoss",
    "MergeConfig",
    "MergeRecord",
    "Problem",
    "Search",
    "TrajectoryMerger",
    "available_searches",
    "consolidate_snapshot",
    "find_snapshot",
    "load_merged",
    "read_merge",
    "register_search",
]


def __getattr__(name: str) -> NoReturn:
    # Of an AttributeError ``from ... import`` would drop the text; whoever looks for an attribute must get one.
    if name == "TrajMergeCallback" and sys._getframe(1).f_globals.get("__name__") == "importlib._bootstrap":
        raise ImportError(
            "TrajMergeCallback is in traj_merge_callback.lightning (for Lightning) and in "
            "traj_merge_callback.transformers (for transformers.Trainer); a loop of your own takes TrajectoryMerger"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
