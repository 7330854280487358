"""Merging checkpoints that are there already, as functions here and as the ``traj-merge`` command.

:func:`search` chooses merge weights on held-out data, :func:`curve` does so all along a trajectory, :func:`merge`
writes a merge with given weights, :func:`verify` measures a snapshot again, :func:`export` writes its recipe for
mergekit, :func:`evaluate` gives it to another program. :func:`report` shows what runs have gained, on one page.
"""

from .checkpoints import find_checkpoints
from .curve import curve
from .evaluate import evaluate
from .export import export
from .merge import merge
from .report import report
from .search import search
from .verify import Verified, verify

__all__ = ["Verified", "curve", "evaluate", "export", "find_checkpoints", "merge", "report", "search", "verify"]
