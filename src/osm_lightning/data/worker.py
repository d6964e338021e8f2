"""What a loader's worker does differently from the process that trains: with signals, and with memory."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import signal
from types import FrameType

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt (malloc.h)."""
KEPT_BYTES = 2**30
"""Free memory at the heap's end that is kept."""
WORKER_GRACE_S = 300
"""How long a worker goes on after SIGTERM: until the run has saved and ended it."""


def start_worker(_worker: int) -> None:
    """To be called first in every worker of a loader."""
    leave_signals()
    keep_freed_memory()


def leave_signals() -> None:
    """Leaves signals, which all processes of a job get, to the one that trains: a worker works until that ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)


def end_workers_at_exit() -> None:
    """Has this process end its workers when it exits while they work, as after an error in one of them.

    multiprocessing would end them with SIGTERM, which a worker takes for the job's and leaves to the run, and then wait
    for them.
    """
    atexit.unregister(_end_workers)  # what is registered last comes first
    atexit.register(_end_workers)


def _end_workers() -> None:
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises where a worker is killed
    for worker in workers:
        worker.kill()


def _end_later(_number: int, _frame: FrameType | None) -> None:
    signal.alarm(WORKER_GRACE_S)  # whose signal ends the process


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it frees, which pictures of changing sizes would make it ask for again.

    By default glibc gives large blocks back to the kernel at once; getting fresh pages for every picture took as long
    as decoding it (`docs/log.md`). For processes that do nothing but load. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
