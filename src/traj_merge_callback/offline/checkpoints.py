"""Finding checkpoints: paths, trainers' folders and Hub revisions become a list in the order of their steps."""

from __future__ import annotations

import fnmatch
import functools
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..disk.checkpoints import is_checkpoint, step_in, weights_of
from ..disk.untrusted import read_json_object
from ..search.checks import integer

logger = logging.getLogger("traj_merge_callback")
# A step in a name: "checkpoint-500", "step1000-tokens4B", "iter_0001000", "epoch=1-step=500", "global_step700".
_NAMED = re.compile(r"(?:^|[^a-z])(?:global_?|train_?)?(?:steps?|iter(?:ation)?s?|checkpoint|ckpt)[-_=.]?(\d+)", re.I)
# Any number that is no count of tokens, nor part of a word.
_NUMBER = re.compile(r"(?<![\w.])(\d+)(?![\w.]*[a-z])", re.I)
_REVISION = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>.+)")
# Folders with checkpoints in them, below a trainer's own folder.
_BELOW = ("*", "checkpoints/*", "version_*/checkpoints/*")
_DOCUMENTS = (("trainer_state.json", "global_step"), ("merge.json", "step"))
_CONTENT = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
# Steps that are missing, named one by one.
_MOST_NAMED = 8


@dataclass(frozen=True)
class Checkpoint:
    """Weights of one step.

    Args:
        name: what the user calls it: a path, or ``repo@revision``.
        step: optimizer step.
        locate: returns the path, after downloading what is not there.
        allow_pickle: see :func:`weights_of`.
    """

    name: str
    step: int
    locate: Callable[[], Path]
    allow_pickle: bool = False

    @functools.cached_property
    def path(self) -> Path:
        """Where it lies."""
        return self.locate()

    @functools.cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Its tensors by the names that it has for them; see :func:`weights_of`."""
        return weights_of(self.path, allow_pickle=self.allow_pickle)


def find_checkpoints(
    given: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    last: int | None = None,
    every: int | None = None,
    steps: tuple[int | None, int | None] | None = None,
    allow_pickle: bool = False,
    least: int = 2,
) -> list[Checkpoint]:
    """The checkpoints that are meant, oldest first.

    Args:
        given: checkpoints, or folders that hold some (a trainer's output folder: what is directly in it, or in its
            ``checkpoints``); glob patterns; ``repo@revision`` on the Hugging Face Hub, where the revision may be a
            pattern. Without a network, revisions in the local cache are found.
        last: take the newest so many.
        every: take steps that are multiples of this.
        steps: take steps from the first number to the second, both included; None: no limit.
        allow_pickle: see :func:`weights_of`.
        least: how many there must be.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: steps cannot be told from names, two checkpoints have the same step, or there are too few.
    """
    names = [os.fspath(one) for one in ([given] if isinstance(given, (str, os.PathLike)) else given)]
    if not names:
        raise ValueError("no checkpoints are given: name their folders, or a folder that holds them")
    found = {one.name: one for name in names for one in _expanded(name, allow_pickle)}
    ordered = _in_order(found.values())
    kept = ordered
    if steps is not None:
        first, end = steps
        kept = [one for one in kept if (first is None or one.step >= first) and (end is None or one.step <= end)]
    if every is not None:
        every = integer("every", every, 1)
        kept = [one for one in kept if one.step % every == 0]
    if last is not None:
        kept = kept[-integer("last", last, 1) :]
    if len(kept) < least:
        of = f"of {len(ordered)} checkpoints (steps {_listed(one.step for one in ordered)}) " if kept != ordered else ""
        raise ValueError(f"checkpoints={names}: {of}{len(kept)} are left, and {least} or more are needed")
    _say_missing([one.step for one in kept], every)
    return kept


def _in_order(found: Iterable[Checkpoint]) -> list[Checkpoint]:
    ordered = sorted(found, key=lambda one: one.step)
    for one, two in itertools.pairwise(ordered):
        if one.step == two.step:
            raise ValueError(f"{one.name} and {two.name} are both of step {one.step}: name one of them")
    return ordered


def _say_missing(steps: list[int], every: int | None) -> None:
    """Warn of steps between the first and the last that would be there if steps were regular."""
    distances = Counter(two - one for one, two in itertools.pairwise(steps))
    usual, times = (every, len(steps)) if every else distances.most_common(1)[0] if distances else (0, 0)
    if not usual or times < 2:
        return
    missing = [step for one, two in itertools.pairwise(steps) for step in range(one + usual, two, usual)]
    if missing:
        logger.warning("steps %s are missing: the rows are not evenly spaced there", _listed(missing))


def _listed(steps: Iterable[int]) -> str:
    steps = list(steps)
    more = f" and {len(steps) - _MOST_NAMED} more" if len(steps) > _MOST_NAMED else ""
    return ", ".join(map(str, steps[:_MOST_NAMED])) + more


def _expanded(name: str, allow_pickle: bool) -> list[Checkpoint]:
    """The checkpoints that one name stands for."""
    path = Path(name).expanduser()
    if not path.exists() and (match := _REVISION.fullmatch(name)):
        return _revisions(match["repo"], match["revision"], allow_pickle)
    paths = [path] if path.exists() else sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
    if not paths:
        raise FileNotFoundError(
            f"{name} is not there: name a checkpoint, a folder of checkpoints, a pattern in quotes, or repo@revision"
        )
    found = [one for path in paths for one in _in_folder(path)]
    if not found:
        raise FileNotFoundError(
            f"{name} holds no checkpoints: looked for weights in it, and in its folders (checkpoint-500, step1000, "
            "*.ckpt)"
        )
    return [Checkpoint(str(one), _step_of(one), functools.partial(Path, one), allow_pickle) for one in found]


def _in_folder(path: Path) -> list[Path]:
    """Checkpoints in a folder, or the folder as one."""
    if path.is_dir():
        for pattern in _BELOW:
            inside = [one for one in sorted(path.glob(pattern)) if is_checkpoint(one) and not one.is_symlink()]
            # Other files are shards, or beside the weights of the folder itself.
            inside = [one for one in inside if one.is_dir() or one.suffix in (".ckpt", ".pt", ".pth")]
            if is_checkpoint(path):
                inside = [one for one in inside if one.is_dir() or one.suffix == ".ckpt"]
            if inside := [one for one in inside if _step_in_name(one.stem if one.is_file() else one.name) is not None]:
                return inside
    return [path] if is_checkpoint(path) else []


def _step_of(path: Path) -> int:
    for document, key in _DOCUMENTS:
        if (path / document).is_file():
            step = read_json_object(path / document).get(key)
            if isinstance(step, int):
                return step
    step = _step_in_name(path.stem if path.is_file() else path.name)
    if step is None and path.suffix == ".ckpt":
        step = step_in(path)
    if step is None:
        raise ValueError(
            f"{path} has no step in its name: rename it so that the order can be told, as step1000 or checkpoint-500"
        )
    return step


def _step_in_name(name: str) -> int | None:
    """The optimizer step that a name tells, the last one if there are several."""
    found = _NAMED.findall(name) or _NUMBER.findall(name)
    return int(found[-1]) if found else None


# The Hugging Face Hub


def _revisions(repo: str, pattern: str, allow_pickle: bool) -> list[Checkpoint]:
    known = _known_revisions(repo) if set(pattern) & set("*?[") else [pattern]
    names = fnmatch.filter(known, pattern) if pattern not in known else [pattern]
    if not names:
        raise FileNotFoundError(
            f"{repo}@{pattern}: no revision is called so; there are {', '.join(sorted(known)[:_MOST_NAMED]) or 'none'}"
            + (f" and {len(known) - _MOST_NAMED} more" if len(known) > _MOST_NAMED else "")
        )
    found = []
    for name in names:
        if (step := _step_in_name(name)) is None:
            raise ValueError(f"{repo}@{name} has no step in its name: name revisions such as step1000")
        locate = functools.partial(_download, repo, name, allow_pickle)
        found.append(Checkpoint(f"{repo}@{name}", step, locate, allow_pickle))
    return found


def _known_revisions(repo: str) -> list[str]:
    """Branches and tags of a repository on the Hub, or where it does not answer those in the local cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        refs = HfApi().list_repo_refs(repo)
        return [ref.name for ref in (*refs.branches, *refs.tags)]
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{repo} is not a folder here, and not a repository on the Hub") from error
    except (HfHubHTTPError, OSError) as error:
        if not (cached := _cached_revisions(repo)):
            raise FileNotFoundError(
                f"{repo}: the Hub does not answer, and nothing of it is cached ({error})"
            ) from error
        logger.info("the Hub does not answer: taking revisions of %s from the local cache", repo)
        return cached


def _cached_revisions(repo: str) -> list[str]:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    refs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "refs"
    return [path.relative_to(refs).as_posix() for path in sorted(refs.rglob("*")) if path.is_file()]


def _download(repo: str, revision: str, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    download: Any = functools.partial(
        snapshot_download,
        repo,
        revision=revision,
        allow_patterns=[*_CONTENT, *(["*.bin"] if allow_pickle else [])],
    )
    try:
        return Path(download())
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(f"{repo}@{revision} is not in the local cache, and the Hub does not answer") from error
