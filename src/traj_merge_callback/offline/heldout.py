"""Held-out text for offline commands: files become token blocks, dealt to the two splits by document."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..evaluate.data import NAMELESS, Dealt
from ..evaluate.sample import Split
from ..search.checks import integer, names, share

# With fewer documents than this, sections of them are dealt, and this share of each is left out between two.
_FEW, _GAP = 16, 1 / 16
# Of one document at most so many blocks are taken, so that a long one does not stand for all.
_MOST_BLOCKS = 8
# Characters that a token has at most, on average.
_CHARACTERS = 8
_TEXT_KEYS = ("text", "content", "document")
_DOMAIN = re.compile(r"([\w.-]+)=(.+)")


class Tokenizer(Protocol):
    """What is needed of a tokenizer of transformers."""

    eos_token_id: int | None

    def __call__(self, text: str, **options: Any) -> Mapping[str, Any]:
        """``{"input_ids": [...]}``."""


class ByteTokenizer:
    """Tokens that are the bytes of the text in UTF-8: for models that read bytes (``tokenizer="bytes"``)."""

    eos_token_id: int | None = None

    def __call__(self, text: str, **options: Any) -> Mapping[str, Any]:
        """See :class:`Tokenizer`."""
        return {"input_ids": list(text.encode())}


def heldout_batches(
    given: Sequence[str],
    tokenizer: Tokenizer,
    *,
    sequences: int,
    block_size: int,
    batch_size: int,
    search_fraction: float = 0.5,
    report_only: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, Dealt]:
    """Batches of each domain, ``{"input_ids", "labels"}`` of shape ``(batch_size, block_size)``.

    Documents are drawn at random and dealt to the splits, so that none is in both, nor in one of another domain; equal
    documents are one. In each split they are packed one behind another, with an end-of-text token between them if the
    tokenizer has one. Of fewer than 16 documents sections are dealt instead, with gaps between them.

    Args:
        given: files or folders of text (a document each), ``.jsonl``, ``.parquet`` and ``.csv`` files and lists in
            ``.json`` files (a document a row, in "text", "content" or "document"), or datasets of the Hub as
            ``name[:config[:split]]``; each may have the name of its domain in front: ``code=src.jsonl``.
        tokenizer: of the model.
        sequences: of each domain, both splits together.
        block_size: tokens of a sequence.
        batch_size: sequences of a batch.
        search_fraction: share of the sequences in the search split.
        report_only: domains that are all report split.
        seed: of the draw.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: there is too little text for one sequence in each split, or a row has none of these keys.
    """
    share("search_fraction", search_fraction)
    least = {"sequences": 2, "block_size": 2, "batch_size": 1}
    numbers = {"sequences": sequences, "block_size": block_size, "batch_size": batch_size}
    for name, number in numbers.items():
        integer(name, number, least[name])
    domains: dict[str, list[str]] = {}
    for one in given:
        match = None if Path(one).exists() else _DOMAIN.fullmatch(one)
        name, source = (match[1], match[2]) if match else (NAMELESS, one)
        domains.setdefault(name, []).append(source)
    if not domains:
        raise ValueError("heldout is empty: name files with text that the model was not trained on")
    names("report_only", list(report_only), domains, "held-out domains")
    found: dict[str, Dealt] = {}
    owners: dict[bytes, Split] = {}
    # What is never searched on comes first, so that all of it may be reported on.
    for name, sources in sorted(domains.items(), key=lambda item: item[0] not in report_only):
        to_search = 0 if name in report_only else min(max(1, round(sequences * search_fraction)), sequences - 1)
        wanted: dict[Split, int] = {"search": to_search, "report": sequences - to_search}
        blocks = _blocks(name, _Documents(sources), tokenizer, wanted, block_size, seed, owners)
        batches = [
            ({"input_ids": part, "labels": part.clone()}, split)
            for split, rows in blocks.items()
            for part in rows.split(batch_size)
            if len(part)
        ]
        found[name] = Dealt(batches, sum(map(len, blocks.values())))
    return {name: found[name] for name in domains}


def _blocks(
    domain: str,
    documents: _Documents,
    tokenizer: Tokenizer,
    wanted: dict[Split, int],
    block_size: int,
    seed: int,
    owners: dict[bytes, Split],
) -> dict[Split, torch.Tensor]:
    """Token blocks of each split, shape ``(sequences, block_size)``; ``owners`` has the split of each document."""
    rng = np.random.default_rng(seed)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: dict[Split, list[int]] = {split: [] for split in wanted}
    seen: set[bytes] = set()
    for digest, text in documents.drawn(rng, _MOST_BLOCKS * block_size * _CHARACTERS):
        left = {split: wanted[split] * block_size - len(tokens[split]) for split in wanted}
        if max(left.values()) <= 0:
            break
        # The split that lacks the larger part of what it is to have.
        split: Split = max(left, key=lambda name: left[name] / max(1, wanted[name]))
        split = owners.get(digest, split)
        if digest in seen or left[split] <= 0:
            continue
        seen.add(digest)
        owners[digest] = split
        found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
        tokens[split] += found[: _MOST_BLOCKS * block_size]
    blocks = {}
    for split, count in wanted.items():
        count = min(count, len(tokens[split]) // block_size)
        if not count and wanted[split]:
            raise ValueError(
                f"heldout {domain!r} has {sum(map(len, tokens.values()))} tokens, too few for a sequence of block_size="
                f"{block_size} in each split: give more text, or a smaller block_size"
            )
        blocks[split] = torch.tensor(tokens[split][: count * block_size], dtype=torch.long).view(count, block_size)
    return blocks


def located(source: str) -> str:
    """A name of held-out text that means the same in any working directory."""
    match = None if Path(source).exists() else _DOMAIN.fullmatch(source)
    prefix, name = (f"{match[1]}=", match[2]) if match else ("", source)
    path = Path(name).expanduser()
    return prefix + (str(path.absolute()) if path.exists() else name)


class _Documents:
    """The texts of some sources.

    Args:
        sources: see :func:`heldout_batches`.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self._parts = [part for source in sources for part in _parts_of(source)]

    def drawn(self, rng: np.random.Generator, longest: int) -> Iterator[tuple[bytes, str]]:
        """Digests and texts, none empty, in random order; of texts longer than so many characters a part."""
        starts = np.cumsum([0, *map(len, self._parts)])
        if starts[-1] < _FEW:
            texts = [
                self._parts[part][index] for part in range(len(self._parts)) for index in range(len(self._parts[part]))
            ]
            sections = [section for text in texts for section in _sections(text, -(-_FEW // max(1, len(texts))))]
            order = iter(sections[index] for index in rng.permutation(len(sections)))
        else:
            places = rng.permutation(int(starts[-1]))
            parts = np.searchsorted(starts, places, side="right") - 1
            order = (self._parts[part][int(place - starts[part])] for part, place in zip(parts, places, strict=True))
        for text in order:
            first = int(rng.integers(max(1, len(text) - longest)))
            if text.strip():
                digest = hashlib.sha256(text.encode(errors="replace")).digest()
                # A surrogate without its other half is no character that a tokenizer takes.
                yield digest, text[first : first + longest].encode(errors="replace").decode()


def _sections(text: str, count: int) -> list[str]:
    """Some sections of a text, as long as one another, with gaps between them."""
    length = len(text) / count
    return [text[round(index * length) : round((index + 1 - _GAP) * length)] for index in range(count)]


class _Rows(Sequence[str]):
    """Texts in the rows of a dataset or of a file of JSON lines.

    Args:
        source: for messages.
        rows: mappings, or lines of JSON.
    """

    def __init__(self, source: str, rows: Any) -> None:
        self._source = source
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        row = self._rows[index]
        try:
            row = json.loads(row) if isinstance(row, bytes) else row
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self._source}: row {index + 1} is no JSON ({error})") from error
        if isinstance(row, str):
            return row
        values = [row[key] for key in _TEXT_KEYS if isinstance(row, Mapping) and key in row]
        text = next((one for one in values if isinstance(one, str) and one), None)
        if text is None and values and all(one in (None, "") for one in values):
            return ""  # datasets have rows without a text, and mark them so
        if text is None:
            raise ValueError(f"{self._source}: row {index + 1} has no text in {', '.join(map(repr, _TEXT_KEYS))}")
        return text


class _Files(Sequence[str]):
    """Texts that are whole files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> Any:
        return self._paths[index].read_text(encoding="utf-8", errors="replace")


def _parts_of(source: str) -> list[Sequence[str]]:
    path = Path(source).expanduser()
    if path.is_dir():
        inside = (one for one in sorted(path.rglob("*")) if one.is_file())
        files = [one for one in inside if not any(part.startswith(".") for part in one.relative_to(path).parts)]
        rows = [part for one in files if one.suffix in (".jsonl", ".parquet") for part in _parts_of(str(one))]
        return [*rows, _Files([one for one in files if one.suffix not in (".jsonl", ".parquet") and _is_text(one)])]
    if not path.exists():
        return [_Rows(source, _dataset(source))]
    if path.suffix == ".jsonl":
        return [_Rows(source, [line for line in path.read_bytes().splitlines() if line.strip()])]
    if path.suffix == ".parquet":
        try:
            return [_Rows(source, _datasets().Dataset.from_parquet(str(path)))]
        except (OSError, RuntimeError) as error:
            raise ValueError(f"heldout={source}: is no parquet file that can be read ({error})") from error
    if path.suffix == ".csv":
        return [_Rows(source, _rows_in(path))]
    if path.suffix == ".json" and (found := _list_in(path)) is not None:
        return [_Rows(source, found)]
    if not _is_text(path):
        raise ValueError(f"heldout={source}: is no text; give text, .jsonl, .parquet, .csv or a list in .json")
    return [_Files([path])]


def _rows_in(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a line of names."""
    longest = csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            return list(csv.DictReader(file))
    except csv.Error as error:
        raise ValueError(f"heldout={path}: is no CSV file that can be read ({error})") from error
    finally:
        csv.field_size_limit(longest)


def _list_in(path: Path) -> list[Any] | None:
    """The rows in a JSON file, if it holds a list."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) else None


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" not in file.read(4096)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError("parquet files and datasets of the Hub need: pip install datasets") from None
    return datasets


def _dataset(source: str) -> Any:
    """A dataset of the Hub; without a split in its name the smallest of its test, validation and train split."""
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or ("." in Path(name).suffix[:1] and "/" not in name):
        raise FileNotFoundError(f"heldout={source} is not there, and is no dataset's name")
    try:
        found = _datasets().load_dataset(name, config or None)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"heldout={source} is not there, and no dataset that could be loaded: {error}"
        ) from error
    split = split or next((one for one in ("test", "validation", "train") if one in found), next(iter(found)))
    if split not in found:
        raise ValueError(f"heldout={source}: there is no split {split!r}; there are {', '.join(found)}")
    return found[split]
