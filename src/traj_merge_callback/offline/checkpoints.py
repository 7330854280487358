"""Finding checkpoints: paths, trainers' folders and Hub revisions become a list in the order of their steps."""

from __future__ import annotations

import fnmatch
import functools
import glob
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

from ..disk.checkpoints import PICKLED, is_checkpoint, step_in, weights_of
from ..disk.untrusted import read_json_object
from ..search.checks import integer

logger = logging.getLogger("traj_merge_callback")
# A step in a name: "checkpoint-500", "step1000-tokens4B", "iter_0001000", "epoch=1-step=500", "global_step700".
_NAMED = re.compile(
    r"(?:^|[^a-z])(?:global_?|train_?)?(?:steps?|iter(?:ation)?s?|checkpoint|ckpt)[-_=.]?(\d+)(k|m)?(?![a-z\d]|\.\d)",
    re.I,
)
# Any whole number that is no count of tokens, nor part of a word.
_NUMBER = re.compile(r"(?<![a-z\d])(?<!\d\.)(?<![a-z]\.)(\d+)()(?![a-z\d]|\.\d)", re.I)
_FACTORS = {"": 1, "k": 1000, "m": 1_000_000}
_REVISION = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>.+)")
# Folders with checkpoints in them, below a trainer's own folder.
_BELOW = ("*", "checkpoints/*", "version_*/checkpoints/*")
_DOCUMENTS = (("trainer_state.json", "global_step"), ("merge.json", "step"))
_CONTENT = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "*.tiktoken", "*.spm"]
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
    # With more holes than steps nothing is regular.
    if not usual or times < 2 or (steps[-1] - steps[0]) // usual > 2 * len(steps):
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
    paths = [path]
    if not path.exists():
        # Of a pattern what matches besides, such as a trainer's other files, is not meant.
        matched = sorted(Path(path.anchor or ".").glob(_pattern(path)))
        paths = [one for one in matched if (one.is_dir() and _in_folder(one)) or _is_one_of(one, one.parent)]
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
    found = [one.absolute() for one in found]
    return [Checkpoint(str(one), _step_of(one), functools.partial(Path, one), allow_pickle) for one in found]


def _in_folder(path: Path) -> list[Path]:
    """Checkpoints in a folder, or the folder as one."""
    if path.is_dir():
        for pattern in _BELOW:
            inside = [one for one in sorted(path.glob(pattern)) if _is_one_of(one, path)]
            if len(folders := {one.parent for one in inside}) > 1:
                names = ", ".join(str(one) for one in sorted(folders))
                raise ValueError(f"{path} holds the checkpoints of several runs: name one of {names}")
            if inside:
                return inside
    return [path] if is_checkpoint(path) else []


def _pattern(path: Path) -> str:
    """A glob pattern below the root of a path, in which folders that are there are no patterns."""
    there = next(above for above in path.parents if above.exists() or above == Path(path.anchor or "."))
    return str(Path(glob.escape(str(there)), path.relative_to(there)).relative_to(path.anchor))


def _is_one_of(path: Path, folder: Path) -> bool:
    """Whether a path in a folder is one of the checkpoints that the folder stands for."""
    if path.is_symlink() and path.resolve().parent == path.parent.resolve():  # best, latest
        return False
    name = path.name if path.is_dir() else path.stem
    if not is_checkpoint(path):
        # A checkpoint has folders with steps in their names too, of its optimizer.
        expected = name.startswith("checkpoint") or not is_checkpoint(folder)
        if path.is_dir() and _NAMED.search(name) and expected:
            logger.warning("%s holds no weights: it is left out", path)
        return False
    # Files beside the weights of the folder itself are others: shards, an optimizer's state.
    others = (".ckpt",) if is_checkpoint(folder) else (*PICKLED[:-1], ".safetensors")
    if path.is_file() and (path.suffix not in others or "-of-" in name):
        return False
    return path.suffix == ".ckpt" or bool(_numbers_in(name))


def _step_of(path: Path) -> int:
    for document, key in _DOCUMENTS:
        if (path / document).is_file():
            step = read_json_object(path / document).get(key)
            if isinstance(step, int):
                return step
    name = path.stem if path.is_file() else path.name
    found = [] if path.suffix == ".ckpt" and not _NAMED.search(name) else _numbers_in(name)
    if not found and path.suffix == ".ckpt":
        inside = step_in(path)
        found = _numbers_in(name) if inside is None else [inside]
    return _the_one(found, str(path))


def _numbers_in(name: str) -> list[int]:
    """The numbers in a name that may be its optimizer step."""
    found = _NAMED.findall(name) or _NUMBER.findall(name)
    return [int(number) * _FACTORS[factor.lower()] for number, factor in found]


def _the_one(steps: list[int], name: str) -> int:
    if len(set(steps)) == 1:
        return steps[0]
    several = f"several numbers in its name, {_listed(steps)}," if steps else "no step in its name"
    raise ValueError(
        f"{name} has {several} so its place in the order is not known: rename it, as step1000 or checkpoint-500"
    )


# The Hugging Face Hub


def _revisions(repo: str, pattern: str, allow_pickle: bool) -> list[Checkpoint]:
    known = _known_revisions(repo) if set(pattern) & set("*?[") else [pattern]
    names = [pattern]
    if pattern not in known:
        names = [name for name in fnmatch.filter(known, pattern) if _numbers_in(name)]
    if not names:
        raise FileNotFoundError(
            f"{repo}@{pattern}: no revision is called so; there are {', '.join(sorted(known)[:_MOST_NAMED]) or 'none'}"
            + (f" and {len(known) - _MOST_NAMED} more" if len(known) > _MOST_NAMED else "")
        )
    found = []
    for name in names:
        step = _the_one(_numbers_in(name), f"{repo}@{name}")
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
