"""The heat map of merge weights as an image, for loggers of trainers that take one."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import numpy as np

from ...metrics import MergeRecord

logger = logging.getLogger("traj_merge_callback")


def weights_image(records: Sequence[MergeRecord]) -> np.ndarray | None:
    """The heat map, of shape (height, width, 3) and uint8; None where it cannot be drawn."""
    return _drawn(records) if can_draw() else None


@functools.cache
def can_draw() -> bool:
    """Whether matplotlib is there and works; the first call loads it, for which no training step should wait."""
    try:
        _drawn([])
    except Exception as error:  # whatever a damaged installation raises
        logger.info(
            "loggers get no image of the merge weights (%s: %s); pip install 'traj-merge-callback[report]' brings what "
            "draws it",
            type(error).__name__,
            error,
        )
        return False
    return True


def _drawn(records: Sequence[MergeRecord]) -> np.ndarray:
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    from .heatmap import COLORS, colors_of, draw_weights

    # Neither pyplot nor a style of the user's: they stay as they are.
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(6.4, 3.0), dpi=100)
        canvas = FigureCanvasAgg(figure)
        axis = figure.add_axes((0.11, 0.17, 0.75, 0.72))
        colors = colors_of(records)
        draw_weights(axis, records, colors)
        axis.set_title("merge weights", fontsize=10)
        bar = figure.add_axes((0.89, 0.17, 0.02, 0.72))
        figure.colorbar(ScalarMappable(colors, COLORS), cax=bar, extend="both")
        canvas.draw()
        return np.array(canvas.buffer_rgba())[..., :3].copy()
