"""A fit on ranks that are processes of their own, for tests that stop, kill, freeze or starve them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from fitting import diary, diary_path, fit, late_path, met_path

from osm_lightning.weights.sharded import partial_of

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fitting", "deepspeed"])

TIMEOUT_S = 300
"""Longest fit; after it a test fails."""


class Fit:
    """The processes of one fit, started at once."""

    def __init__(
        self,
        folder: Path,
        num_workers: int = 0,
        ranks: int = 1,
        *,
        most_bytes: Sequence[int] = (),
        **settings: Any,
    ) -> None:
        """Starts them; what a rank says is written into the folder.

        Args:
            folder: of the run, which goes on from its last checkpoint where there is one.
            num_workers: processes of every rank that prepare batches.
            ranks: processes that train.
            most_bytes: largest file that each rank may write: a disk that is full for all that is larger.
            settings: of `fitting.fit`.
        """
        self.folder, self.ranks = folder, ranks
        self._lines_before = lines(folder)
        self._began_s = time.time()
        met_path(folder).unlink(missing_ok=True)
        port = free_port()
        limits = [*most_bytes, *[resource.RLIM_INFINITY] * (ranks - len(most_bytes))]
        self.processes: list[BaseProcess] = [
            CONTEXT.Process(target=_run, args=(rank, limits[rank], port, folder, num_workers, ranks), kwargs=settings)
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def wait_for_lines(self, number: int) -> None:
        """Waits until rank 0 has trained on so many more batches, or a rank has ended."""
        self._wait_until(lambda: self.new_lines() >= number)

    def wait_for_meeting(self) -> None:
        """Waits until the ranks watch each other, or one has ended."""
        self._wait_until(met_path(self.folder).exists)

    def wait_for_late_data(self) -> None:
        """Waits until a rank waits for data that come late, or one has ended."""
        self._wait_until(late_path(self.folder).exists)

    def wait_for_save(self) -> None:
        """Waits until a checkpoint has been begun, or a rank has ended."""
        self._wait_until(self.saves)

    def new_lines(self) -> int:
        """Batches that rank 0 has trained on in this run."""
        return lines(self.folder) - self._lines_before

    def saves(self) -> bool:
        """Whether there is a checkpoint that this run has begun, and that is not whole yet."""
        try:
            return partial_of(self.folder / "last.ckpt").stat().st_mtime > self._began_s  # earlier kills leave some too
        except FileNotFoundError:
            return False

    def _wait_until(self, holds: Callable[[], bool]) -> None:
        while self.all_alive() and not holds():
            time.sleep(0.002)

    def all_alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def pid(self, rank: int) -> int:
        return self.processes[rank].pid or 0

    def signal(self, number: signal.Signals, *ranks: int) -> None:
        for rank in ranks:
            os.kill(self.pid(rank), number)

    def kill(self) -> None:
        """SIGKILL to all processes and their workers, with no time for anything."""
        for rank in range(self.ranks):
            with contextlib.suppress(ProcessLookupError):  # it has ended, and so have its workers
                os.killpg(self.pid(rank), signal.SIGKILL)
        self.wait()

    def wait(self) -> list[int | None]:
        """Exit codes, once all have ended; whoever hangs is killed."""
        end_s = time.monotonic() + TIMEOUT_S
        for process in self.processes:
            process.join(max(0, end_s - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return codes

    def said(self, rank: int = 0) -> str:
        """What a rank has said in this run."""
        return _said(self.folder, rank).read_text()


def finish(folder: Path, num_workers: int = 0, ranks: int = 1, **settings: Any) -> Fit:
    """Fits to the end."""
    run = Fit(folder, num_workers, ranks, **settings)
    codes = run.wait()
    assert codes == [0] * ranks, f"exit codes {codes}:\n" + "\n".join(run.said(rank) for rank in range(ranks))
    return run


def lines(folder: Path) -> int:
    """Batches in the diary of rank 0."""
    path = diary_path(folder)
    return path.read_bytes().count(b"\n") if path.exists() else 0


def same(folder: Path, whole: Path, ranks: int = 1) -> None:
    """Two runs trained on the same batches, with the same losses, to the same weights."""
    for rank in range(ranks):
        assert diary(folder, rank) == diary(whole, rank)
    trained, expected = torch.load(folder / "trained.pt"), torch.load(whole / "trained.pt")
    assert trained.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(trained[name], tensor), name


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def _said(folder: Path, rank: int) -> Path:
    return folder / f"said-{rank}.txt"


def _run(rank: int, most_bytes: int, port: int, folder: Path, num_workers: int, ranks: int, **settings: Any) -> None:
    os.setsid()
    with _said(folder, rank).open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if ranks > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))
    fit(folder, num_workers, ranks, **settings)
