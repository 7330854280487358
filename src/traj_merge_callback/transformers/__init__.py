"""The callback for ``transformers.Trainer`` and its subclasses."""

try:
    from .callback import TrajMergeCallback
except ImportError as error:
    raise ImportError(
        "traj_merge_callback.transformers needs transformers and accelerate: "
        "pip install 'traj-merge-callback[transformers]'"
    ) from error

__all__ = ["TrajMergeCallback"]
