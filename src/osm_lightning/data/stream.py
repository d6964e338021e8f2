"""Shards to records: by position, and as an endless stream whose order depends on (seed, epoch) alone.

Shards are plain WebDataset tars, but read by offset: a sample's place is found in the tar's headers once, and from
then on any sample is one seek away. That is what makes shuffling exact and a position in the stream a pair of numbers.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from osm_lightning import record as records
from osm_lightning.data.sample import generator
from osm_lightning.record import Record
from osm_lightning.shard_index import ShardIndex, ShardInfo, read_index

MAX_MEMBER_BYTES = 256_000_000
"""Larger tar members are refused: no image, map or JSON of this project comes near."""

SHARDS_AT_ONCE = 8
"""Shards whose samples are shuffled together."""


@dataclass(frozen=True, slots=True)
class Member:
    """Where a file lies in a tar."""

    ending: str
    offset: int
    num_bytes: int


@dataclass
class ShardSet:
    """The samples of one split of a shard folder, by position: shard by shard, in the order they were written."""

    folder: Path
    split: str
    index: ShardIndex = field(init=False)
    _samples: dict[int, list[tuple[str, tuple[Member, ...]]]] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.index = read_index(self.folder)
        if self.split not in self.index.splits:
            raise ValueError(
                f"shard folder {self.folder} has no split {self.split!r}; it has {', '.join(self.index.splits)}. Name "
                "one of these in data.sources, or build it with `osm shards build`."
            )
        self._starts = np.cumsum([0, *(shard.num_samples for shard in self.shards)])

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        """The split's shards as the index lists them."""
        return self.index.splits[self.split].shards

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, position: int) -> Record:
        """Reads one sample.

        Raises:
            ValueError: its shard is missing, cut off, or not what the index says.
        """
        shard = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self.read(shard, position - int(self._starts[shard]))

    def read(self, shard: int, sample: int) -> Record:
        """Reads a sample by shard and place within it."""
        path = self.folder / self.shards[shard].file
        key, members = self._table(shard)[sample]
        contents = {}
        try:
            with path.open("rb") as file:
                for member in members:
                    file.seek(member.offset)
                    contents[member.ending] = file.read(member.num_bytes)
        except OSError as error:
            raise ValueError(f"shard {path} cannot be read ({error}). Copy or build it again.") from error
        if any(len(contents[member.ending]) != member.num_bytes for member in members):
            raise ValueError(f"shard {path} ends within sample {key}. Copy or build it again.")
        return records.decode(key, contents)

    def _table(self, shard: int) -> list[tuple[str, tuple[Member, ...]]]:
        if shard not in self._samples:
            info = self.shards[shard]
            table = read_table(self.folder / info.file)
            if len(table) != info.num_samples:
                raise ValueError(
                    f"{self.folder / info.file} holds {len(table)} samples, but index.json says {info.num_samples}. "
                    "Copy or build it again."
                )
            self._samples[shard] = table
        return self._samples[shard]


def read_table(path: Path) -> list[tuple[str, tuple[Member, ...]]]:
    """Finds the samples of a tar: key and members of each, in order.

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
    return [(key, tuple(members)) for key, members in groups.items()]


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of the data a reader takes: one of `count` equal readers."""

    index: int = 0
    count: int = 1


def epoch_order(shards: ShardSet, seed: int, epoch: int, share: Share) -> Iterator[tuple[int, int]]:
    """The (shard, sample) pairs of one pass, in order: what a reader reads in an epoch.

    Where there are enough shards every reader has its own; otherwise all read all shards and take every n-th sample.
    Together the readers read every sample exactly once.
    """
    rng = generator(seed, epoch, "order")
    order = rng.permutation([i for i, shard in enumerate(shards.shards) if shard.num_samples])
    by_shard = len(order) >= share.count
    mine = order[share.index :: share.count] if by_shard else order
    seen = 0
    for start in range(0, len(mine), SHARDS_AT_ONCE):
        group = mine[start : start + SHARDS_AT_ONCE].tolist()
        pairs = [(shard, sample) for shard in group for sample in range(shards.shards[shard].num_samples)]
        mixing = generator(seed, epoch, "mix", start, share.index if by_shard else 0)
        for pick in mixing.permutation(len(pairs)):
            if by_shard or seen % share.count == share.index:
                yield pairs[pick]
            seen += 1


def stream(shards: ShardSet, seed: int, epoch: int, share: Share) -> Iterator[tuple[int, Record]]:
    """Records without end, with the number of the pass that each belongs to.

    Args:
        shards: what to read.
        seed: run's seed.
        epoch: trainer's epoch; passes within it are shuffled anew.
        share: the reader's part.

    Raises:
        ValueError: the reader's share is empty, so that the stream would never yield.
    """
    if len(shards) < share.count:
        raise ValueError(
            f"shard folder {shards.folder}, split {shards.split!r} has {len(shards)} images for {share.count} readers "
            "(ranks x workers). Use fewer data.num_workers or ranks."
        )
    number = 0
    while True:
        for shard, sample in epoch_order(shards, seed, epoch * 1_000_003 + number, share):
            yield number, shards.read(shard, sample)
        number += 1
