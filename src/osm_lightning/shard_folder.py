"""A shard folder, wherever it lies: on a disk, behind http(s) or S3, or at the far end of a shell command.

A remote folder's shards are fetched whole when they are first wanted, checked against the index and kept in a cache;
from then on they are files like any others. They are not streamed: reading by offset is what makes shuffling exact.
Cached shards carry their checksum in their name, so one that changed remotely is another file, and whoever reads the
old one goes on. Nothing is ever evicted (`docs/remote_shards.md`).
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from osm_lightning.shard_index import INDEX_FILE, ShardIndex, ShardInfo, read_index
from osm_lightning.shard_transport import (
    CHUNK_BYTES,
    PATIENCE,
    LastingError,
    MissingError,
    Opener,
    PassingError,
    Patience,
    SpoiltError,
    allowed_command,
    open_command,
    open_http,
    open_s3,
)
from osm_lightning.whole_file import write_whole

MAX_SMALL_BYTES = 64_000_000
"""Largest index or side file: nothing states their sizes beforehand."""

_SIDE_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*\.[A-Za-z0-9_.-]+")
_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ShardFolder:
    """A shard folder whose shards can be had as local files. It can be pickled, for workers."""

    location: str
    """Where it lies, without credentials."""
    index: ShardIndex = field(repr=False)
    folder: Path
    """The folder itself, or the part of the cache that a remote one has."""
    _remote: _Remote | None = field(repr=False, default=None)

    def path(self, info: ShardInfo) -> Path:
        """Says where a shard is; a remote one is fetched and checked, unless it is in the cache.

        Of processes that want the same shard one fetches it while the others wait. Local shards are not looked at.

        Raises:
            ValueError: a remote shard cannot be had, is not what the index says, or cannot be written to the cache.
        """
        return self.folder / info.file if self._remote is None else self._remote.shard(info)

    def side_file(self, name: str) -> Path | None:
        """Says where a file beside the index is, or None if there is none; a remote one is fetched on every call.

        Remote folders are only asked for plain names with an ending: the key of a shipped vocabulary costs no request.

        Raises:
            ValueError: a remote file cannot be had, or cannot be written to the cache.
        """
        if self._remote is None:
            path = self.folder / name
            return path if path.is_file() else None
        return self._remote.small_file(name) if _SIDE_FILE.fullmatch(name) else None


def is_url(location: str) -> bool:
    """Whether a location is another than a path on this machine."""
    return location.startswith("pipe:") or urlsplit(location).scheme in ("file", "http", "https", "s3")


def open_folder(location: str, cache: Path | None = None, patience: Patience = PATIENCE) -> ShardFolder:
    """Opens a shard folder. A remote one's index is fetched anew every time, for it may have changed.

    Args:
        location: a folder; a `file:`, `http:`, `https:` or `s3:` url of one; or `pipe:` and a shell command that writes
            to its output the file whose name is put for `{file}`.
        cache: where remote shards are kept; None takes OSM_CACHE, or else `~/.cache/osm_lightning/shards`.
        patience: with remote folders.

    Raises:
        ValueError: the location is none of these, commands are not allowed, or the index cannot be had or is broken.
    """
    url = urlsplit(location)
    if location.startswith("pipe:"):
        shown, opener = location, partial(open_command, allowed_command(location), patience)
    elif url.scheme in ("http", "https", "s3") and url.hostname:
        shown = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path.rstrip('/')}"
        opener = partial(open_s3 if url.scheme == "s3" else open_http, location, patience)
    elif url.scheme == "file" and url.netloc in ("", "localhost"):
        return ShardFolder(location, read_index(Path(unquote(url.path))), Path(unquote(url.path)))
    elif "://" in location or url.scheme in ("http", "https", "s3"):
        raise ValueError(
            f"shard folder {location} is neither a folder nor a file:///PATH, http(s)://HOST/PATH or s3://BUCKET/PATH "
            "url of one. For any other store, name in data.sources.*.shards a command: 'pipe:COMMAND {file}'."
        )
    else:
        return ShardFolder(location, read_index(Path(location)), Path(location))

    root = cache or Path(os.environ.get("OSM_CACHE") or "~/.cache/osm_lightning/shards").expanduser()
    readable = re.sub(r"[^A-Za-z0-9.-]+", "_", shown)[-60:].strip("_.")
    folder = root / f"{readable}-{hashlib.sha256(shown.encode()).hexdigest()[:12]}"
    remote = _Remote(shown, folder, opener, patience)
    if remote.small_file(INDEX_FILE) is None:
        raise ValueError(f"{shown} has no {INDEX_FILE}, so it is no shard folder. Check data.sources.*.shards.")
    try:
        return ShardFolder(shown, read_index(folder), folder, remote)
    except ValueError as error:
        raise ValueError(f"the {INDEX_FILE} that {shown} gave is broken. Check the address. {error}") from error


@dataclass(frozen=True, slots=True)
class _Remote:
    """Gets a remote folder's files into its folder of the cache."""

    location: str
    folder: Path
    open: Opener
    patience: Patience

    def shard(self, info: ShardInfo) -> Path:
        """A shard's path, once it is there and whole."""
        path = self.folder / f"{info.sha256[:16]}-{info.file}"
        if not _is_whole(path, info):
            with self._writing(path) as unfinished:
                if not _is_whole(path, info):  # while this process waited, another may have fetched it
                    self._persist(info.file, partial(_receive, self.open, info, unfinished))
                    unfinished.replace(path)
        return path

    def small_file(self, name: str) -> Path | None:
        """The path of a file that no index describes, fetched anew; None if there is none."""
        path = self.folder / name
        content = self._persist(name, partial(_read_small, self.open, name))
        if content is None:
            return None
        with self._writing(path):
            write_whole(path, content)
        return path

    def _persist(self, name: str, attempt: Callable[[], _T]) -> _T:
        number = 1
        while True:
            try:
                return attempt()
            except (LastingError, PassingError) as error:
                if isinstance(error, LastingError) or number >= self.patience.attempts:
                    raise ValueError(
                        f"shard folder {self.location}: {name} could not be fetched in {number} of at most "
                        f"{self.patience.attempts} attempts, because {error}. Check the address, your rights, the "
                        "network and whether the upload was complete, or copy the folder to a disk and name the copy "
                        "in data.sources.*.shards."
                    ) from error
                _LOG.warning("%s: attempt %d for %s failed, because %s", self.location, number, name, error)
            self.patience.pause(number)
            number += 1

    @contextmanager
    def _writing(self, path: Path) -> Iterator[Path]:
        """Waits for the sole right to write a file, and yields the name to write it under until it is whole."""
        unfinished = path.with_name(f".{path.name}.partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.with_name(f".{path.name}.lock").open("w") as lock:  # left behind: to remove it would be a race
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield unfinished
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink()  # a full disk must not stay full
            raise ValueError(
                f"shard folder {self.location}: {path.name} cannot be written to the cache {self.folder} ({error}). "
                "Make room, or set OSM_CACHE to a folder on another disk."
            ) from error


def _is_whole(path: Path, info: ShardInfo) -> bool:
    return path.is_file() and path.stat().st_size == info.bytes


def _receive(open_at: Opener, info: ShardInfo, unfinished: Path) -> None:
    """Makes one attempt to complete a file, from where the last one ended, even in another process."""
    digest = hashlib.sha256()
    try:
        with unfinished.open("a+b") as file:
            file.seek(0)
            while block := file.read(CHUNK_BYTES):
                digest.update(block)
            num_bytes = file.tell()
            if num_bytes < info.bytes:
                with open_at(info.file, num_bytes) as (start, chunks):
                    if start < num_bytes:
                        file.truncate(0)
                        digest, num_bytes = hashlib.sha256(), 0
                    for chunk in chunks:
                        num_bytes += len(chunk)
                        if num_bytes > info.bytes:
                            raise LastingError(f"more than the {info.bytes:,} bytes that {INDEX_FILE} states came")
                        file.write(chunk)
                        digest.update(chunk)
            file.flush()
            os.fsync(file.fileno())
        if num_bytes < info.bytes:
            raise PassingError(f"it ended after {num_bytes:,} of {info.bytes:,} bytes")
        if digest.hexdigest() != info.sha256:
            raise SpoiltError(f"its sha256 is {digest.hexdigest()}, but {INDEX_FILE} states {info.sha256}")
    except (LastingError, SpoiltError):
        unfinished.unlink()
        raise


def _read_small(open_at: Opener, name: str) -> bytes | None:
    content = bytearray()
    try:
        with open_at(name, 0) as (_, chunks):
            for chunk in chunks:
                content += chunk
                if len(content) > MAX_SMALL_BYTES:
                    raise LastingError(f"more than {MAX_SMALL_BYTES:,} bytes came, too many for such a file")
    except MissingError:
        return None
    return bytes(content)
