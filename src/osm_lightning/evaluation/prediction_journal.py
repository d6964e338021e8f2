"""What is named so far, kept in a hidden folder of the output folder, so that nothing is named twice after a kill.

Every process appends to a part of its own, one line per image; a line that was cut off counts as none. `plan.json` says
what the lines are names of: only the very same is gone on with, by any number of processes. Whoever writes holds a lock
on its part. The kernel takes it back when a process ends, so that a free lock means: nobody will write here any more.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from osm_lightning.whole_file import write_whole

STAGING = ".predictions"
PLAN = "plan.json"
LOCK = "lock"
PICTURES = "overlay"

Plan = Mapping[str, str]
"""What names depend on: from what a message calls it to a value or a fingerprint."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where a run of `osm predict` begins; the same for all of its processes."""

    run: int
    """Number of the run among those that worked on this journal."""
    named: frozenset[str]
    """Keys of the images that earlier ones named."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an image's line stands."""

    part: Path
    offset: int


class PredictionJournal:
    """The journal of an output folder. One process begins and closes it; all append to parts of their own."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder, self.pictures = out, out / STAGING, out / STAGING / PICTURES
        self._made_out = False
        self._lock: IO[bytes] | None = None

    def begin(self, plan: Plan) -> Beginning:
        """Makes the folder, or goes on with what is in it. For one process of a run, before the others `join`.

        Args:
            plan: what is to be named by what; what was begun with another is not gone on with.

        Raises:
            ValueError: the folder cannot be written to, another run writes to it, or it holds names of another plan.
        """
        try:
            self._made_out = not self.out.exists()
            self.pictures.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / LOCK).open("ab")
        except OSError as error:
            raise ValueError(f"out: {self.out} is no folder to write to ({error}). Give another.") from error
        self._refuse_others(lock)
        self._lock = lock
        named = frozenset(row["key"] for _, row in self.rows())
        before = self._plan()
        if before != dict(plan):
            if named:
                raise ValueError(self._other_plan(before or {}, plan, len(named)))
            with self.on_disk():
                write_whole(self.folder / PLAN, json.dumps(dict(plan), indent=1) + "\n")
        return Beginning(1 + max((_run_of(part) for part in self._parts()), default=0), named)

    def _refuse_others(self, lock: IO[bytes]) -> None:
        """Takes the lock, and looks whether a process of an earlier run still writes."""
        try:
            _lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for part in self._parts():
                with part.open("rb") as file:
                    _lock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            # The run that held it may have ended, and removed the folder, since it was opened here.
            if os.path.samestat((self.folder / LOCK).stat(), os.fstat(lock.fileno())):
                return
        except (BlockingIOError, FileNotFoundError):
            pass
        lock.close()
        raise ValueError(
            f"another `osm predict` writes to {self.out}. Wait for it, stop all of its processes, or give another "
            "--out."
        )

    def _plan(self) -> dict[str, str] | None:
        try:
            return dict(json.loads((self.folder / PLAN).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def _other_plan(self, before: Plan, plan: Plan, num_named: int) -> str:
        changed = "; ".join(
            f"{what}: {before.get(what)} then, {plan.get(what)} now"
            for what in dict.fromkeys([*plan, *before])
            if before.get(what) != plan.get(what)
        )
        return (
            f"out: {self.folder} holds {num_named} images that were named otherwise ({changed}). Name the rest as they "
            f"were, give another --out, or remove {self.folder} to start over."
        )

    def join(self, beginning: Beginning, rank: int) -> JournalPart:
        """Opens this process's part of a run.

        Raises:
            ValueError: this process doesn't see the folder.
        """
        if not (self.folder / PLAN).is_file():
            raise ValueError(
                f"out: rank {rank} does not see {self.folder}, which rank 0 made. All nodes must share the folder that "
                "--out names."
            )
        return JournalPart(self, self._part(beginning.run, rank))

    def wait(self, beginning: Beginning, num_ranks: int) -> None:
        """Waits until no process of a run writes any more.

        Not by a collective: those have time limits, and one process may have hours more to do than another.
        """
        for rank in range(num_ranks):
            with suppress(FileNotFoundError), self._part(beginning.run, rank).open("rb") as file:
                _lock(file, fcntl.LOCK_SH)

    def rows(self) -> Iterator[tuple[Place, dict[str, Any]]]:
        """Every whole line, with its place."""
        for part in self._parts():
            offset = 0
            with part.open("rb") as file:
                for line in file:
                    # Besides a cut off end, a crash of the machine may leave zeros where text was to be.
                    with suppress(ValueError):
                        yield Place(part, offset), json.loads(line if line.endswith(b"\n") else b"")
                    offset += len(line)

    def close(self) -> bool:
        """Gives the folder free for another run; without any line in it, nothing is left of it.

        Returns:
            Whether there is something for another run to go on behind; False where this process didn't begin.
        """
        if self._lock is None:
            return False
        kept = any(part.stat().st_size for part in self._parts())
        if not kept:
            self.remove()
        self._lock.close()
        self._lock = None
        return kept

    def remove(self) -> None:
        """Removes the journal, and the output folder if that was made for nothing."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._made_out and not any(self.out.iterdir()):
            self.out.rmdir()

    @contextmanager
    def on_disk(self) -> Iterator[None]:
        """Says of a full disk that nothing is lost.

        Raises:
            ValueError: something could not be written.
        """
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"out: {self.out} cannot be written to ({error}). What is named so far is kept. Make room, then give "
                "the same command again: it goes on from there."
            ) from error

    def _part(self, run: int, rank: int) -> Path:
        return self.folder / f"{run:04}-{rank:05}.jsonl"

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("*.jsonl"))


class JournalPart:
    """The lines of one process in one run. Nothing counts before it is committed."""

    def __init__(self, journal: PredictionJournal, path: Path) -> None:
        self.journal = journal
        with journal.on_disk():
            self._file = path.open("xb")
        _lock(self._file, fcntl.LOCK_EX)

    def append(self, row: Mapping[str, Any]) -> None:
        """Takes an image's line."""
        with self.journal.on_disk():
            self._file.write(dump(row) + b"\n")

    def commit(self) -> None:
        """Brings all lines to the disk.

        Raises:
            ValueError: it is full.
        """
        with self.journal.on_disk():
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Ends the part; whoever waits for it goes on."""
        with suppress(OSError):  # what could not be written was said by `commit`
            self._file.close()


def dump(value: object) -> bytes:
    """JSON on one line of ASCII: file names may hold bytes that are no UTF-8, names characters that break a line."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False).encode()


def _lock(file: IO[bytes], operation: int) -> None:
    """Locks a file for this process alone: unlike `flock`, not for the loader's workers that it forks.

    Raises:
        BlockingIOError: another process holds it, and the operation is not to wait.
    """
    try:
        fcntl.lockf(file, operation)
    except BlockingIOError:
        raise
    except OSError:
        pass  # a file system without locks: whoever starts two runs there must keep them apart


def _run_of(part: Path) -> int:
    return int(part.name.partition("-")[0])
