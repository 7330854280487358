"""A model and its parameters under the wrappers that trainers put around them."""

from __future__ import annotations

from torch import nn

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.parallel.DataParallel)


def unwrap(model: nn.Module) -> nn.Module:
    """The module the user wrote, under ``torch.compile``, DataParallel, DistributedDataParallel and DeepSpeed."""
    while True:
        if isinstance(model, _WRAPPERS) or type(model).__name__ == "DeepSpeedEngine":
            model = model.module  # type: ignore[assignment]
        elif isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
            model = original
        else:
            return model


def clean_name(name: str) -> str:
    """A parameter's name without the segments that wrappers of submodules put into it."""
    for segment in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(segment, "")
    return name
