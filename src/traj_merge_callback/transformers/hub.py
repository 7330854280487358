"""What ``push_to_hub`` uploads: snapshots, but no windows and nothing half-written."""

from __future__ import annotations

from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS

from ..disk.atomic import TEMPORARY
from ..disk.output import LOCK


def leave_out_of_uploads(window_folder: str) -> None:
    """Let this process's uploads of folders leave out windows and whatever is half-written.

    The trainer names the patterns of what it leaves out itself; these are added to the library's own, such as ``.git``.

    Args:
        window_folder: name of the folder in each checkpoint that holds a window.
    """
    temporary = f"{TEMPORARY}*-{'[0-9a-f]' * 32}"
    for pattern in (temporary, f"{temporary}/*", f"{window_folder}/*", LOCK):
        for found in (pattern, f"*/{pattern}"):
            if found not in DEFAULT_IGNORE_PATTERNS:
                DEFAULT_IGNORE_PATTERNS.append(found)
