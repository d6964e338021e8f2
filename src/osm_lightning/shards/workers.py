"""Images to records in several processes, in order and with few of them in memory.

One process or ten give the same records. Workers import no torch: a spawned one is there in half a second.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Thread

from osm_lightning.record import Record
from osm_lightning.shards.conversion import RawImage, convert_fully
from osm_lightning.shards.source import Findings

_AHEAD = 4
"""Images per worker that are converted, or wait for it, before the first of them is taken."""


@dataclass(slots=True)
class Outcome:
    """What became of one image."""

    record: Record | None = None
    errors: Findings = field(default_factory=Findings)
    """Why the image is unusable, if it is."""
    notes: Findings = field(default_factory=Findings)


def convert_all(images: Sequence[RawImage], workers: int) -> Generator[Outcome]:
    """Converts images, in their order. Close it when done: that ends the workers.

    Args:
        images: what to convert.
        workers: number of processes; with 1 it is this one.

    Raises:
        ValueError: a worker died.
    """
    if workers == 1:
        yield from map(_convert, images)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_watch_parent)
    pending: deque[tuple[str, Future[Outcome]]] = deque()
    key = ""
    try:
        for image in images:
            with _uninterrupted():
                pending.append((image.key, pool.submit(_convert, image)))
            if len(pending) == workers * _AHEAD:
                key, future = pending.popleft()
                yield future.result()
        while pending:
            key, future = pending.popleft()
            yield future.result()
    except BrokenProcessPool as error:
        raise ValueError(
            f"a worker died near sample {key}, as it does when memory runs out. Build once more, with fewer --workers: "
            "it goes on behind the last finished shard."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _convert(image: RawImage) -> Outcome:
    outcome = Outcome()
    outcome.record = convert_fully(image, outcome.errors, outcome.notes)
    return outcome


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Blocks Ctrl-C, for a process that is started inside as well: the terminal sends it to all, only one may act."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _watch_parent() -> None:
    """Ends this worker with its parent: one that was killed can't say so, and the queue's end stays open."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    Thread(target=end, daemon=True).start()
