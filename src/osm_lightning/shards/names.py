"""Names as raw data write them: files to sample keys and pairs, labels to words.

Nothing here opens a file.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

from osm_lightning.shards.source import Findings

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
_MAX_KEY = 80
"""What a shard takes (`write.py`)."""
_HASH_DIGITS = 12


def sample_keys(names: Sequence[str]) -> list[str]:
    """Keys of samples, in the order of their file names.

    A key is the stem, with `-` for what a key cannot hold. Where that is not unique (`cam1/0001.jpg`, `cam2/0001.jpg`)
    or too long, a digest of the whole name follows it, so that different names never share a key.

    Args:
        names: relative paths with `/`, each once.
    """
    stems = [re.sub(r"[^A-Za-z0-9_-]+", "-", PurePosixPath(name).stem) for name in names]
    times = Counter(stems)
    return [
        stem if times[stem] == 1 and len(stem) <= _MAX_KEY else f"{stem[: _MAX_KEY - _HASH_DIGITS - 1]}-{_digest(name)}"
        for stem, name in zip(stems, names, strict=True)
    ]


def files_by_stem(folder: Path, suffixes: Collection[str], errors: Findings) -> dict[str, Path]:
    """Files below a folder, by their relative path without its ending; sorted.

    Hidden files are passed over (archives made on a Mac hold `._name.jpg` beside `name.jpg`).

    Args:
        folder: where to look, subfolders included.
        suffixes: endings to take, lower case with the dot; files may write them in any case.
        errors: takes files that differ in nothing but their ending, and names that no JSON can hold.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in suffixes or path.name.startswith(".") or not path.is_file():
            continue
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            errors.add("files that differ only in their ending", f"{found[stem]}, {path.name}")
        if not _is_text(stem):
            errors.add("file names that are not UTF-8", repr(path))
        found[stem] = path
    return found


def spoken(label: str) -> str:
    """A label as one would say it: lower case, spaces for underscores."""
    return " ".join(label.replace("_", " ").lower().split())


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_DIGITS]
