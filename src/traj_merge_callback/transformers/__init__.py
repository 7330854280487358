"""The callback for ``transformers.Trainer`` and its subclasses, and snapshots for the Hugging Face Hub."""

try:
    from .arguments import MergeArguments
    from .callback import TrajMergeCallback
    from .hub import push_to_hub
except ImportError as error:
    raise ImportError(
        "traj_merge_callback.transformers needs transformers and accelerate: "
        "pip install 'traj-merge-callback[transformers]'"
    ) from error

__all__ = ["MergeArguments", "TrajMergeCallback", "push_to_hub"]
