"""Records into shards: plain WebDataset tars of about equal size, and their entry in the folder's index.

The same records give the same bytes, whoever writes them and when. Shards keep temporary names until the whole split
is written, so a build that fails leaves what was there before. Nothing here knows what a record's pixels mean.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from webdataset.writer import TarWriter

from osm_lightning import record as records
from osm_lightning.record import Record
from osm_lightning.shard_index import INDEX_FILE, ShardIndex, ShardInfo, SplitInfo, read_index, write_index

MAX_SHARD_BYTES = 64_000_000
"""Small enough for COCO's val split to be shared out among 8 GPUs, large enough to be read in one sweep."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,80}")
_TAR_BLOCK = 512
_FIVE_DIGITS = "[0-9]" * 5


class ShardWriter:
    """Writes the records of one split; a context manager.

    ```
    with ShardWriter(Path("data_shards/mine"), dataset="mine", split="train", vocabulary=None) as writer:
        for record in records:
            writer.write(record)
    ```

    Leaving the block normally puts the shards in place and the split into the folder's index, beside the splits that
    it already has. Leaving it by an exception removes what was written.
    """

    def __init__(
        self,
        out_dir: Path,
        *,
        dataset: str,
        split: str,
        vocabulary: str | None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        overwrite: bool = False,
    ) -> None:
        """Checks that the split may be written; touches nothing yet.

        Args:
            out_dir: shard folder; made where it does not exist.
            dataset: key of the dataset.
            split: name of the split; shards are called `<split>-00000.tar` and so on.
            vocabulary: key of a vocabulary that comes with the package, or name of a TSV in `out_dir`; None where
                masks have free-text names.
            max_shard_bytes: a new shard begins before this size is passed; a larger record has a shard to itself.
            overwrite: whether a split of this name may be replaced.

        Raises:
            ValueError: a name is not plain, the folder belongs to another dataset or vocabulary, or it already has
                this split and `overwrite` is not set.
        """
        _check_name("split", split)
        self._out_dir = out_dir
        self._split = split
        self._max_shard_bytes = max_shard_bytes
        self._own_index = ShardIndex(dataset, vocabulary, {})
        if split in self._index().splits and not overwrite:
            raise ValueError(f"{out_dir} already has a split {split}. Give another folder, or --overwrite it.")
        self._keys: set[str] = set()
        self._masks_per_class: Counter[int] = Counter()
        self._shards: list[ShardInfo] = []
        self._file: BinaryIO | None = None
        self._begin_shard_counts()

    def __enter__(self) -> Self:
        self._out_dir.mkdir(parents=True, exist_ok=True)
        self._discard()
        return self

    def write(self, record: Record) -> None:
        """Appends one record.

        Raises:
            ValueError: the key is not plain, or the split has it already.
        """
        _check_name("sample key", record.key)
        if record.key in self._keys:
            raise ValueError(f"sample {record.key} stands twice in split {self._split}. Keys must be unique.")
        members = records.encode(record)
        num_bytes = sum(_TAR_BLOCK + -(-len(data) // _TAR_BLOCK) * _TAR_BLOCK for data in members.values())
        if self._file is not None and self._num_bytes + num_bytes > self._max_shard_bytes:
            self._end_shard()
        if self._file is None:
            self._begin_shard()
        for ending, data in members.items():  # one by one: TarWriter sorts the members that it is given together
            self._tar.write({"__key__": record.key, ending: data})
        self._keys.add(record.key)
        self._num_bytes += num_bytes
        self._num_samples += 1
        for segment in record.segments:
            if segment.iscrowd or segment.area_px == 0:
                continue
            self._num_masks += 1
            if segment.class_id is not None:
                self._masks_per_class[segment.class_id] += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._discard()

    def _commit(self) -> None:
        """Puts the shards in place. Until the last step the index does not name the split, so it never lies."""
        if self._file is not None:
            self._end_shard()
        if not self._shards:
            raise ValueError(f"split {self._split} has no samples, so there is nothing to write. Check the source.")
        index = self._index()
        others = {name: split for name, split in index.splits.items() if name != self._split}
        if len(others) < len(index.splits):
            write_index(self._out_dir, replace(index, splits=others))
        for shard in self._shards:
            self._partial(shard.file).replace(self._out_dir / shard.file)
        split = SplitInfo(tuple(self._shards), dict(sorted(self._masks_per_class.items())))
        write_index(self._out_dir, replace(index, splits={**others, self._split: split}))
        written = {shard.file for shard in self._shards}
        for old in self._out_dir.glob(f"{self._split}-{_FIVE_DIGITS}.tar"):
            if old.name not in written:
                old.unlink()

    def _index(self) -> ShardIndex:
        """The folder's index, or an empty one. Read anew each time: another split may have been built meanwhile."""
        if not (self._out_dir / INDEX_FILE).exists():
            return self._own_index
        index = read_index(self._out_dir)
        for what in ("dataset", "vocabulary"):
            theirs, ours = getattr(index, what), getattr(self._own_index, what)
            if theirs != ours:
                raise ValueError(
                    f"{self._out_dir} holds shards whose {what} is {theirs!r}, not {ours!r}. A shard folder has one "
                    f"{what}: give another folder."
                )
        return index

    def _begin_shard(self) -> None:
        self._file = self._partial(self._shard_name()).open("wb")
        self._tar = TarWriter(self._file, user="", group="", mode=0o644, mtime=0, compress=False, encoder=False)
        self._begin_shard_counts()

    def _begin_shard_counts(self) -> None:
        self._num_bytes = self._num_samples = self._num_masks = 0

    def _end_shard(self) -> None:
        assert self._file is not None
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        path = self._partial(self._shard_name())
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self._shards.append(
            ShardInfo(self._shard_name(), sha256, path.stat().st_size, self._num_samples, self._num_masks)
        )

    def _shard_name(self) -> str:
        return f"{self._split}-{len(self._shards):05d}.tar"

    def _partial(self, name: str) -> Path:
        return self._out_dir / f".{name}.partial"

    def _discard(self) -> None:
        """Removes whatever has not been put in place, also what an earlier build that was killed left."""
        if self._file is not None:
            for closing in (self._tar, self._file):
                with suppress(OSError):  # closing writes, which fails again where the disk is full
                    closing.close()
            self._file = None
        for path in self._out_dir.glob(f".{self._split}-{_FIVE_DIGITS}.tar.partial"):
            path.unlink()


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{what} is {name!r}; it must be 1 to 80 letters, digits, '_' or '-': WebDataset splits a sample's "
            "file names at the first dot, and tar holds 100 characters. Rename it."
        )
