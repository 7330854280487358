"""Snapshots on the Hugging Face Hub: uploading one, and what the trainer's ``push_to_hub`` leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS

from ..disk.atomic import TEMPORARY
from ..disk.model_files import STATE_DICT, check_whole, verify_snapshot
from ..disk.output import LOCK
from ..disk.snapshots import read_merge, snapshot_folder


def push_to_hub(
    snapshot: str | Path, repo_id: str, *, private: bool | None = None, token: str | None = None, **options: Any
) -> str:
    """Upload a snapshot to the Hugging Face Hub, after all its files were checked; the repository is made if needed.

    Args:
        snapshot: a snapshot's folder, or the ``best`` or ``latest`` link beside it, which is followed once.
        repo_id: such as "me/my-model".
        private: whether a new repository is private; by default as the account has it.
        token: of the account; by default the one that ``hf auth login`` has kept.
        **options: of ``huggingface_hub.HfApi.upload_folder``: ``revision``, ``commit_message``, ``create_pr``, ...

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: there is no snapshot, or a file of it is missing; a run that goes on may have removed it.
        ValueError: it is damaged, in parts, or not of a Hugging Face model.

    Example::

        push_to_hub("output/merged/best", "me/my-model")
    """
    folder = snapshot_folder(snapshot)
    merge = read_merge(folder)
    check_whole(folder, merge)
    if merge.get("weights_format") == STATE_DICT:
        raise ValueError(f"snapshot {folder} is of {merge.get('model_class')}, which is no Hugging Face model")
    verify_snapshot(folder, merge)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    options = {"commit_message": f"Step {merge['step']}, published by traj-merge-callback", **options}
    return str(api.upload_folder(folder_path=folder, repo_id=repo_id, **options))


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
