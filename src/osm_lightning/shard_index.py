"""The table of contents of a shard folder, `index.json`: its splits, their shards, and what each of them holds.

A reader learns from it how many masks there are before it opens a single tar, and whether a copied folder is complete.
It says nothing about single samples: those speak for themselves (`record.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from osm_lightning.whole_file import write_whole

SCHEMA = 1
"""Version of `index.json`; a reader refuses any other."""

INDEX_FILE = "index.json"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One tar of a split."""

    file: str
    """Name within the shard folder."""
    sha256: str
    """Checksum of the file, 64 hexadecimal digits."""
    bytes: int
    """Size of the file."""
    num_samples: int
    """Images in it."""
    num_masks: int
    """Segments in it that are trained on: not crowd, and with at least one pixel."""

    def __post_init__(self) -> None:
        _check_plain_name("shards.file", self.file)
        if not isinstance(self.sha256, str) or not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"sha256 of {self.file} is {self.sha256!r}; it must be 64 hexadecimal digits")
        _check_counts(f"{self.file}: ", bytes=self.bytes, num_samples=self.num_samples, num_masks=self.num_masks)


@dataclass(frozen=True, slots=True)
class SplitInfo:
    """One split: its shards in the order in which they were written."""

    shards: tuple[ShardInfo, ...]
    masks_per_class: Mapping[int, int]
    """From class id to masks, for masks that have a class; ids ascend."""
    images_per_class: Mapping[int, int] = field(default_factory=dict)
    """From class id to images that have such a mask; empty where an older version wrote the shards."""

    def __post_init__(self) -> None:
        for what in ("masks_per_class", "images_per_class"):
            for class_id, number in getattr(self, what).items():
                _check_counts(f"{what}: ", **{str(class_id): number})

    @property
    def num_samples(self) -> int:
        """Images in all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_masks(self) -> int:
        """Masks in all shards."""
        return sum(shard.num_masks for shard in self.shards)


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """What a shard folder holds."""

    dataset: str
    """Key of the dataset."""
    vocabulary: str | None
    """Key of a vocabulary that comes with the package, or name of a TSV in the folder; None for free-text names."""
    splits: Mapping[str, SplitInfo]

    def __post_init__(self) -> None:
        _check_plain_name("dataset", self.dataset)
        if self.vocabulary is not None:
            _check_plain_name("vocabulary", self.vocabulary)
        for name in self.splits:
            _check_plain_name("splits", name)


def read_index(folder: Path) -> ShardIndex:
    """Reads and checks the index of a shard folder; the shards themselves are not opened.

    Raises:
        ValueError: there is no index, it is of another schema, or an entry is missing, of a wrong type, or names a
            file outside the folder.
    """
    path = folder / INDEX_FILE
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"shard folder {folder} has no readable {INDEX_FILE} ({error.strerror}). Check the path, or build the "
            f"shards: osm shards build DATASET --src RAW_FOLDER --split SPLIT --out {folder}"
        ) from error
    try:
        return _parse(json.loads(text))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a shard index ({type(error).__name__}: {error}). Delete the folder and build its shards "
            f"again: osm shards build DATASET --src RAW_FOLDER --split SPLIT --out {folder}"
        ) from error


def write_index(folder: Path, index: ShardIndex) -> None:
    """Writes the index of a shard folder; a reader sees the old one or the new one, never a part."""
    content = {
        "schema": SCHEMA,
        "dataset": index.dataset,
        "vocabulary": index.vocabulary,
        "splits": {name: split_to_json(split) for name, split in sorted(index.splits.items())},
    }
    write_whole(folder / INDEX_FILE, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def split_to_json(split: SplitInfo) -> dict[str, Any]:
    """A split as it stands in the index."""
    return {
        "num_samples": split.num_samples,
        "num_masks": split.num_masks,
        "shards": [{field: getattr(shard, field) for field in ShardInfo.__slots__} for shard in split.shards],
        "masks_per_class": _by_class(split.masks_per_class),
        "images_per_class": _by_class(split.images_per_class),
    }


def split_from_json(row: Mapping[str, Any]) -> SplitInfo:
    """A split from its entry in the index.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: it is no such entry.
    """
    split = SplitInfo(
        shards=tuple(ShardInfo(**shard) for shard in row["shards"]),
        masks_per_class={int(class_id): number for class_id, number in row["masks_per_class"].items()},
        images_per_class={int(class_id): number for class_id, number in row.get("images_per_class", {}).items()},
    )
    if (row["num_samples"], row["num_masks"]) != (split.num_samples, split.num_masks):
        raise ValueError(
            f"it says {row['num_samples']} samples and {row['num_masks']} masks, but its shards add up to "
            f"{split.num_samples} and {split.num_masks}"
        )
    return split


def _by_class(numbers: Mapping[int, int]) -> dict[str, int]:
    return {str(class_id): number for class_id, number in sorted(numbers.items())}


def _parse(content: Mapping[str, Any]) -> ShardIndex:
    if content["schema"] != SCHEMA:
        raise ValueError(f"schema {content['schema']!r}, but this version reads schema {SCHEMA}")
    splits = {name: split_from_json(row) for name, row in content["splits"].items()}
    return ShardIndex(content["dataset"], content["vocabulary"], splits)


def _check_plain_name(what: str, name: object) -> None:
    if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
        raise ValueError(
            f"{what} is {name!r}; it must be a plain name of letters, digits, '_', '-' and '.', because shard folders "
            "are self-contained and no name may lead out of them"
        )


def _check_counts(where: str, **counts: object) -> None:
    for what, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{where}{what} is {value!r}; it must be a whole number of at least 0")
