"""Records into shards: plain WebDataset tars of about equal size, and their entry in the folder's index.

The same records give the same bytes, whoever writes them and when. Shards keep temporary names until the whole split
is written, so a build that fails leaves what was there before. What makes a build go on where it was killed is
`build.py`. Nothing here knows what a record's pixels mean.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from webdataset.writer import TarWriter

from osm_lightning import record as records
from osm_lightning.record import Record
from osm_lightning.shard_index import INDEX_FILE, ShardIndex, ShardInfo, SplitInfo, read_index, write_index
from osm_lightning.shards.lock import exclusive

MAX_SHARD_BYTES = 64_000_000
"""Small enough for COCO's val split to be shared out among 8 GPUs, large enough to be read in one sweep."""

PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]{1,80}")
"""What splits and samples may be called: WebDataset splits file names at the first dot, tar holds 100 characters."""

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
    it already has. Leaving it by an exception removes what was written, but for what `keep` was called for.
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
        self.out_dir = out_dir
        self.split = split
        self.max_shard_bytes = max_shard_bytes
        self._overwrite = overwrite
        self._own_index = ShardIndex(dataset, vocabulary, {})
        self._check_free()
        self._keys: set[str] = set()
        self._masks_per_class: Counter[int] = Counter()
        self._images_per_class: Counter[int] = Counter()
        self._shards: list[ShardInfo] = []
        self._num_kept = 0
        self._file: BinaryIO | None = None
        self._begin_shard_counts()

    @property
    def journal(self) -> Path:
        """Where a build may note how far it came; it stays as long as kept shards do."""
        return self.out_dir / f".{self.split}.journal"

    @property
    def identity(self) -> dict[str, Any]:
        """What the bytes depend on beside the records."""
        index = self._own_index
        return {"dataset": index.dataset, "vocabulary": index.vocabulary, "max_shard_bytes": self.max_shard_bytes}

    @property
    def num_finished(self) -> int:
        """How many shards are complete."""
        return len(self._shards)

    @property
    def finished(self) -> SplitInfo:
        """The shards that are complete, and what they hold."""
        per_class = (dict(sorted(counts.items())) for counts in (self._masks_per_class, self._images_per_class))
        return SplitInfo(tuple(self._shards), *per_class)

    def __enter__(self) -> Self:
        with self.on_disk(), ExitStack() as stack:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(exclusive(self.out_dir / f".{self.split}.lock", wait=False))
            except BlockingIOError as error:
                raise ValueError(
                    f"split {self.split} of {self.out_dir} is being built by another process. Wait for it, or stop it."
                ) from error
            self._check_free()  # again: it may have been built since
            self._lock = stack.pop_all()
        return self

    def keep(self) -> None:
        """Lets the shards finished so far outlive an exception, for another writer to `resume` behind them."""
        self._num_kept = len(self._shards)

    def resume(self, finished: SplitInfo, keys: Iterable[str]) -> None:
        """Goes on behind shards that an earlier writer kept. To be called before the first record.

        Args:
            finished: what that writer had finished.
            keys: sample keys that must not come again.

        Raises:
            ValueError: one of the shards is not there as it was; the writer then begins with an empty split.
        """
        for number, shard in enumerate(finished.shards):
            path = self._partial(shard.file)
            if shard.file != self._shard_name(number) or not path.is_file() or path.stat().st_size != shard.bytes:
                raise ValueError(f"{path} is not as it was left")
            if _sha256(path) != shard.sha256:
                raise ValueError(f"{path} has changed")
        self._shards = list(finished.shards)
        self._masks_per_class = Counter(finished.masks_per_class)
        self._images_per_class = Counter(finished.images_per_class)
        self._keys = set(keys)
        self.keep()

    def write(self, record: Record) -> None:
        """Appends one record.

        Raises:
            ValueError: the key is not plain, or the split has it already.
            OSError: the disk is full, or can't be written to.
        """
        _check_name("sample key", record.key)
        if record.key in self._keys:
            raise ValueError(f"sample {record.key} stands twice in split {self.split}. Keys must be unique.")
        members = records.encode(record)
        num_bytes = sum(_TAR_BLOCK + -(-len(data) // _TAR_BLOCK) * _TAR_BLOCK for data in members.values())
        if self._file is not None and self._num_bytes + num_bytes > self.max_shard_bytes:
            self._end_shard()
        with self.on_disk():
            if self._file is None:
                self._begin_shard()
            for ending, data in members.items():  # one by one: TarWriter sorts the members that it is given together
                self._tar.write({"__key__": record.key, ending: data})
        self._keys.add(record.key)
        self._num_bytes += num_bytes
        self._num_samples += 1
        masks = [segment for segment in record.segments if segment.is_mask]
        classes = [mask.class_id for mask in masks if mask.class_id is not None]
        self._num_masks += len(masks)
        self._shard_masks_per_class.update(classes)
        self._shard_images_per_class.update(set(classes))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            try:
                if kind is None:
                    self._commit()
                    self._num_kept = 0
            finally:
                self._discard()

    def _commit(self) -> None:
        """Puts the shards in place. Until the last step the index does not name the split, so it never lies."""
        if self._file is not None:
            self._end_shard()
        if not self._shards:
            raise ValueError(f"split {self.split} has no samples, so there is nothing to write. Check the source.")
        # Splits of one folder may be built at the same time, and each writes the whole index.
        with self.on_disk(), exclusive(self.out_dir / f".{INDEX_FILE}.lock", wait=True):
            index = self._index()
            others = {name: split for name, split in index.splits.items() if name != self.split}
            if len(others) < len(index.splits):
                write_index(self.out_dir, replace(index, splits=others))
            for shard in self._shards:
                self._partial(shard.file).replace(self.out_dir / shard.file)
            write_index(self.out_dir, replace(index, splits={**others, self.split: self.finished}))
        written = {shard.file for shard in self._shards}
        for old in self.out_dir.glob(f"{self.split}-{_FIVE_DIGITS}.tar"):
            if old.name not in written:
                old.unlink()

    def _check_free(self) -> None:
        if self.split in self._index().splits and not self._overwrite:
            raise ValueError(
                f"{self.out_dir} already has a split {self.split}. Give another folder, or --overwrite it."
            )

    def _index(self) -> ShardIndex:
        """The folder's index, or an empty one. Read anew each time: another split may have been built meanwhile."""
        if not (self.out_dir / INDEX_FILE).exists():
            return self._own_index
        index = read_index(self.out_dir)
        for what in ("dataset", "vocabulary"):
            theirs, ours = getattr(index, what), getattr(self._own_index, what)
            if theirs != ours:
                raise ValueError(
                    f"{self.out_dir} holds shards whose {what} is {theirs!r}, not {ours!r}. A shard folder has one "
                    f"{what}: give another folder."
                )
        return index

    def _begin_shard(self) -> None:
        if not self._shards:
            self._discard()  # what an earlier build left takes space
        self._file = self._partial(self._shard_name(len(self._shards))).open("wb")
        self._tar = TarWriter(self._file, user="", group="", mode=0o644, mtime=0, compress=False, encoder=False)
        self._begin_shard_counts()

    def _begin_shard_counts(self) -> None:
        self._num_bytes = self._num_samples = self._num_masks = 0
        self._shard_masks_per_class: Counter[int] = Counter()
        self._shard_images_per_class: Counter[int] = Counter()

    def _end_shard(self) -> None:
        assert self._file is not None
        with self.on_disk():
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._file = None
        name = self._shard_name(len(self._shards))
        path = self._partial(name)
        info = ShardInfo(name, _sha256(path), path.stat().st_size, self._num_samples, self._num_masks)
        self._shards.append(info)
        self._masks_per_class += self._shard_masks_per_class
        self._images_per_class += self._shard_images_per_class

    def _shard_name(self, number: int) -> str:
        return f"{self.split}-{number:05d}.tar"

    def _partial(self, name: str) -> Path:
        return self.out_dir / f".{name}.partial"

    def _discard(self) -> None:
        """Removes whatever is neither in place nor kept, also what an earlier build that was killed left."""
        if self._file is not None:
            for closing in (self._tar, self._file):
                with suppress(OSError):  # closing writes, which fails again where the disk is full
                    closing.close()
            self._file = None
        kept = {self._partial(shard.file) for shard in self._shards[: self._num_kept]}
        for path in self.out_dir.glob(f".{self.split}-{_FIVE_DIGITS}.tar.partial"):
            if path not in kept:
                path.unlink()
        if not kept:
            self.journal.unlink(missing_ok=True)

    @contextmanager
    def on_disk(self) -> Iterator[None]:
        """Makes an OSError say where it was, how far the split came, and what that means."""
        try:
            yield
        except OSError as error:
            num_bytes = sum(shard.bytes for shard in self._shards) + self._num_bytes
            raise OSError(
                f"{self.out_dir} cannot be written to ({error.strerror or error}) after {num_bytes:,} bytes of split "
                f"{self.split}. {INDEX_FILE} does not name them. Free space there, or give another folder, and build "
                "once more."
            ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_name(what: str, name: str) -> None:
    if not PLAIN_NAME.fullmatch(name):
        raise ValueError(
            f"{what} is {name!r}; it must be 1 to 80 letters, digits, '_' or '-': WebDataset splits a sample's "
            "file names at the first dot, and tar holds 100 characters. Rename it."
        )
