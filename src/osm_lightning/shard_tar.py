"""Shards by offset: where a tar's samples lie, and reading one of them without the others.

Shards are plain WebDataset tars. Their headers are read once; from then on any sample is one seek away.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from osm_lightning import record as records
from osm_lightning.record import Record

MAX_MEMBER_BYTES = 256_000_000
"""Larger tar members are refused: no image, map or JSON of this project comes near."""


@dataclass(frozen=True, slots=True)
class Member:
    """Where a file lies in a tar."""

    ending: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a sample lies in a tar."""

    key: str
    members: tuple[Member, ...]


def read_table(path: Path) -> list[Entry]:
    """Finds the samples of a tar, in order.

    Raises:
        ValueError: the tar is missing or broken, or a member is too large.
    """
    groups: dict[str, list[Member]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for entry in tar:
                if not entry.isfile():
                    continue
                if entry.size > MAX_MEMBER_BYTES:
                    raise ValueError(
                        f"{path}: {entry.name} has {entry.size:,} bytes; more than {MAX_MEMBER_BYTES:,} are refused."
                    )
                key, _, ending = entry.name.partition(".")
                groups.setdefault(key, []).append(Member(ending, entry.offset_data, entry.size))
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"shard {path} cannot be read ({error}). Copy or build it again.") from error
    return [Entry(key, tuple(members)) for key, members in groups.items()]


def read_record(path: Path, entry: Entry) -> Record:
    """Reads one sample; its pixels stay encoded.

    Raises:
        ValueError: the shard is missing or cut off, or the sample is no record.
    """
    return records.decode(entry.key, _read_members(path, entry, entry.members))


def read_classes(path: Path, table: Sequence[Entry]) -> list[frozenset[int]]:
    """Classes of every sample of a shard that are trained on, from the samples' JSON alone.

    Raises:
        ValueError: the shard is missing or cut off, or a sample is no record.
    """
    classes = []
    for entry in table:
        facts = [member for member in entry.members if member.ending == "json"]
        segments = records.decode_segments(entry.key, _read_members(path, entry, facts))
        classes.append(frozenset(s.class_id for s in segments if s.is_mask and s.class_id is not None))
    return classes


def _read_members(path: Path, entry: Entry, members: Sequence[Member]) -> dict[str, bytes]:
    contents = {}
    try:
        with path.open("rb") as file:
            for member in members:
                file.seek(member.offset)
                contents[member.ending] = file.read(member.num_bytes)
    except OSError as error:
        raise ValueError(f"shard {path} cannot be read ({error}). Copy or build it again.") from error
    if any(len(contents[member.ending]) != member.num_bytes for member in members):
        raise ValueError(f"shard {path} ends within sample {entry.key}. Copy or build it again.")
    return contents
