"""Checksums of the files of a folder, kept in its document, and of the document itself.

SHA-256: the digest that the Hugging Face Hub names large files by, at about 1 GB/s with one core. A file is hashed
while it is written, or right after that, when it is still in the system's memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .untrusted import mapping, own_file

README = "README.md"
_BLOCK = 2**22
# Digests of files that did not change since: files that several states share are hashed once.
_known: dict[tuple[int, int, int, int], str] = {}
_MOST_KNOWN = 4096


def checksums_of(folder: Path, rank: int = 0, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """SHA-256 of the files in a folder that a rank wrote, by their paths in it; rank 0 wrote what is not marked.

    A README is left out: nothing is loaded from it, and its owner may edit it.

    Args:
        folder: where the files are.
        rank: who wrote them.
        known: those that were taken while files were written.
    """
    found = dict(known or {})
    for path in sorted(folder.rglob("*")):
        marked = re.search(r"\.rank-(\d+)\.safetensors$", path.name)
        if path.is_file() and path.name != README and rank == (int(marked[1]) if marked else 0):
            name = path.relative_to(folder).as_posix()
            found[name] = found.get(name) or _remembered(path)
    return found


def with_checksums(document: dict[str, Any], checksums: dict[str, str]) -> dict[str, Any]:
    """A document with the checksums of its folder's files, and its own."""
    described = json.loads(json.dumps({**document, "checksums": checksums}))
    return {**described, "checksum": _of_document(described)}


def check_document(path: Path, document: dict[str, Any]) -> None:
    """Check a document of :func:`with_checksums`.

    Raises:
        ValueError: it was changed since, or has no checksums.
    """
    if "checksum" not in document or not isinstance(document.get("checksums"), dict):
        raise ValueError(f"{path} has no checksums: it was written by an earlier version, or changed")
    if _of_document({key: value for key, value in document.items() if key != "checksum"}) != document["checksum"]:
        raise ValueError(f"{path} is damaged: it is not what was written (its checksum differs)")


def check_files(folder: Path, document: dict[str, Any], rank: int = 0, ranks: int = 1) -> None:
    """Check the files of a folder by the checksums in its document; each of several ranks checks its share.

    Raises:
        FileNotFoundError: one is missing.
        ValueError: one was changed.
    """
    for name, checksum in sorted(mapping(document["checksums"]).items())[rank::ranks]:
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{folder} is damaged: it says that {name!r} is a file in it")
        if _digest(own_file(folder / name)) != checksum:
            raise ValueError(f"{folder / name} is damaged: it is not what was written (its checksum differs)")


def _of_document(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _remembered(path: Path) -> str:
    now = path.stat()
    key = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns)
    if now.st_nlink == 1 or key not in _known:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = _digest(path)
    return _known[key]


def _digest(path: Path) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()
