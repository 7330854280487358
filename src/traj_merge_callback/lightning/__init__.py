"""The callback for ``lightning.pytorch.Trainer``."""

try:
    from .callback import TrajMergeCallback
except ImportError as error:
    raise ImportError(
        "traj_merge_callback.lightning needs Lightning: pip install 'traj-merge-callback[lightning]'"
    ) from error

__all__ = ["TrajMergeCallback"]
