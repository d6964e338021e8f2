"""Shards to records: by position, and as an endless order that depends on (seed, epoch) alone.

Samples are read by offset (`shard_tar.py`), so that shuffling is exact and a place in the order is a pair of numbers:
all that is needed to go on in the middle of an epoch. The order itself opens no file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from osm_lightning.data.sample import generator
from osm_lightning.record import Record
from osm_lightning.shard_folder import ShardFolder, open_folder
from osm_lightning.shard_index import ShardIndex, ShardInfo
from osm_lightning.shard_tar import Entry, read_classes, read_record, read_table

SHARDS_AT_ONCE = 8
"""Shards whose samples are shuffled together."""
MAX_TABLES = 4 * SHARDS_AT_ONCE
"""Shards of which it is remembered where their samples lie."""


@dataclass
class ShardSet:
    """The samples of one split of a shard folder, by position: shard by shard, in the order they were written."""

    location: str | Path
    """A folder, or the url of one (`shard_folder.py`)."""
    split: str
    folder: ShardFolder = field(init=False)
    index: ShardIndex = field(init=False)
    _samples: dict[int, list[Entry]] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.folder = open_folder(str(self.location))
        self.index = self.folder.index
        if self.split not in self.index.splits:
            raise ValueError(
                f"shard folder {self.folder.location} has no split {self.split!r}; it has "
                f"{', '.join(self.index.splits)}. Name one of these in data.sources, or build it with `osm shards "
                "build`."
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
        return read_record(self.path(shard), self._table(shard)[sample])

    def path(self, shard: int) -> Path:
        """A shard's file; a remote one is fetched if it is not in the cache.

        Raises:
            ValueError: it cannot be fetched.
        """
        return self.folder.path(self.shards[shard])

    def name(self, shard: int, sample: int) -> str:
        """What a message calls a sample: its key, or its shard's file where that cannot be read."""
        try:
            return self._table(shard)[sample].key
        except ValueError:
            return f"{self.shards[shard].file} [{sample}]"

    def repeat_factors(self, shard: int, threshold: float) -> NDArray[np.float64]:
        """float64[samples of the shard], how often each image is to be read: max over its classes of sqrt(t / f).

        f is the share of images that have the class (repeat-factor sampling, Gupta et al. 2019, LVIS, Sec. 6).

        Raises:
            ValueError: the index does not say how many images have a class, or the shard is broken.
        """
        images_per_class = self.index.splits[self.split].images_per_class
        if not images_per_class:
            raise ValueError(
                f"shard folder {self.folder.location}, split {self.split!r} does not say how many images have each "
                "class, which repeat_threshold needs. Build its shards again, or leave repeat_threshold out."
            )
        factor_of = {c: max(1.0, (threshold * len(self) / n) ** 0.5) for c, n in images_per_class.items() if n}
        classes = read_classes(self.path(shard), self._table(shard))
        return np.array([max((factor_of.get(c, 1.0) for c in of), default=1.0) for of in classes])

    def _table(self, shard: int) -> list[Entry]:
        if shard not in self._samples:
            path, num_samples = self.path(shard), self.shards[shard].num_samples
            table = read_table(path)
            if len(table) != num_samples:
                raise ValueError(
                    f"{path} holds {len(table)} samples, but index.json says {num_samples}. Copy or build it again."
                )
            if len(self._samples) >= MAX_TABLES:
                del self._samples[next(iter(self._samples))]
            self._samples[shard] = table
        return self._samples[shard]


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of the data a reader takes: one of `count` equal readers."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True, slots=True)
class Place:
    """How far a reader has come in a source: what a checkpoint keeps of it."""

    number: int = 0
    """Number of the pass within the epoch."""
    taken: int = 0
    """Samples of that pass that have been taken."""
    broken: tuple[str, ...] = ()
    """Samples that could not be read and were skipped, once each."""


def epoch_order(
    shards: ShardSet, seed: int, epoch: int, share: Share, repeat_threshold: float | None = None
) -> Iterator[tuple[int, int]]:
    """The (shard, sample) pairs of one pass, in order: what a reader reads in an epoch.

    Where there are enough shards every reader has its own; otherwise all read all shards and take every n-th sample.
    Together the readers read every sample exactly once, or as often as its repeat factor says.
    """
    rng = generator(seed, epoch, "order")
    order = rng.permutation([i for i, shard in enumerate(shards.shards) if shard.num_samples])
    by_shard = len(order) >= share.count
    mine = order[share.index :: share.count] if by_shard else order
    seen = 0
    for start in range(0, len(mine), SHARDS_AT_ONCE):
        group = mine[start : start + SHARDS_AT_ONCE].tolist()
        pairs = [
            (shard, sample)
            for shard in group
            for sample, times in enumerate(_times(shards, shard, seed, epoch, repeat_threshold))
            for _ in range(times)
        ]
        mixing = generator(seed, epoch, "mix", start, share.index if by_shard else 0)
        for pick in mixing.permutation(len(pairs)):
            if by_shard or seen % share.count == share.index:
                yield pairs[pick]
            seen += 1


def _times(shards: ShardSet, shard: int, seed: int, epoch: int, threshold: float | None) -> list[int]:
    """How often each sample of a shard is read in a pass; fractions of a repeat factor are drawn."""
    if threshold is None:
        return [1] * shards.shards[shard].num_samples
    factors = shards.repeat_factors(shard, threshold)
    drawn = generator(seed, epoch, "repeat", shard).random(len(factors)) < factors % 1
    times: list[int] = (factors.astype(np.int64) + drawn).tolist()
    return times


def stream(
    shards: ShardSet,
    seed: int,
    epoch: int,
    share: Share,
    start: Place | None = None,
    repeat_threshold: float | None = None,
) -> Iterator[tuple[Place, tuple[int, int]]]:
    """Places of records without end: each with the reader's place once it is taken.

    Args:
        shards: what to read.
        seed: run's seed.
        epoch: trainer's epoch; passes within it are shuffled anew.
        share: the reader's part.
        start: where to go on; None starts the epoch.
        repeat_threshold: images with a class that fewer than this share of images have are read more often.

    Raises:
        ValueError: the reader's share is empty, so that the stream would never yield.
    """
    if len(shards) < share.count:
        raise ValueError(
            f"shard folder {shards.folder.location}, split {shards.split!r} has {len(shards)} images for {share.count} "
            "readers (ranks x workers). Use fewer data.num_workers or ranks."
        )
    start = start or Place()
    for number in count(start.number):
        order = epoch_order(shards, seed, epoch * 1_000_003 + number, share, repeat_threshold)
        skipped = start.taken if number == start.number else 0
        for taken, where in enumerate(islice(order, skipped, None), start=skipped + 1):
            yield Place(number, taken), where
