"""The heat map of merge weights as an image, for loggers of trainers that take one."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import numpy as np

from ...metrics import MergeRecord

logger = logging.getLogger("traj_merge_callback")


def weights_image(records: Sequence[MergeRecord]) -> np.ndarray | None:
    """The heat map, of shape (height, width, 3) and uint8; None where matplotlib is missing."""
    if not _can_draw():
        return None
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from .heatmap import colors_of, draw_weights

    # Neither pyplot nor a style: those are the user's.
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(6.4, 3.0), dpi=100)
        canvas = FigureCanvasAgg(figure)
        axis = figure.add_axes((0.11, 0.17, 0.75, 0.72))
        drawn = draw_weights(axis, records, colors_of(records))
        axis.set_title("merge weights", fontsize=10)
        if drawn is not None:
            figure.colorbar(drawn, cax=figure.add_axes((0.89, 0.17, 0.02, 0.72)))
        canvas.draw()
        return np.array(canvas.buffer_rgba())[..., :3].copy()


@functools.cache
def _can_draw() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        logger.info(
            "loggers get no image of the merge weights: matplotlib is missing (pip install "
            "'traj-merge-callback[report]')"
        )
        return False
    return True
