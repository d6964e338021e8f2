"""The process that has started the other ranks is killed: they end within a minute, and leave nothing running."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from shapes_run import OSM, QUOTA, ROOT, settings, write_shapes

pytestmark = pytest.mark.cluster

DEADLINE_S = 60

START_S = 600
"""Of two ranks, where the machine is busy."""


class Launched:
    """Two ranks of the command in a process group of their own."""

    def __init__(self, folder: Path, strategy: str) -> None:
        write_shapes(folder / "shapes")
        words = [*settings(folder / "shapes"), "--run", str(folder / "run"), "--trainer.max_epochs", "1000"]
        words += ["--data.masks_per_epoch", str(QUOTA * 2 * 4), "--data.num_workers", "0"]
        words += ["--trainer.devices", "2", "--trainer.strategy", strategy, "--trainer.limit_val_batches", "0"]
        self.log, self.last = folder / "said.txt", folder / "run" / "checkpoints" / "last.ckpt"
        with self.log.open("w") as log:
            own = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
            argv = [str(OSM), "fit", *words]
            self.rank_0 = subprocess.Popen(argv, cwd=ROOT, env=own, start_new_session=True, stdout=log, stderr=log)

    def said(self) -> str:
        return self.log.read_text()

    def wait_for_meeting_to_begin(self) -> None:
        self._wait_until(lambda: "rank 0] Initializing distributed" in self.said())

    def wait_for_first_epoch(self) -> None:
        self._wait_until(self.last.exists)

    def _wait_until(self, holds) -> None:
        end_s = time.monotonic() + START_S
        while not holds():
            assert self.rank_0.poll() is None, self.said()
            assert time.monotonic() < end_s, self.said()
            time.sleep(0.05)

    def runs(self) -> bool:
        """Whether any process of the group does."""
        try:
            os.killpg(self.rank_0.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def end(self) -> None:
        if self.runs():
            os.killpg(self.rank_0.pid, signal.SIGKILL)
        self.rank_0.wait()


@pytest.fixture
def launched(tmp_path: Path, strategy: str) -> Iterator[Launched]:
    ranks = Launched(tmp_path, strategy)
    yield ranks
    ranks.end()


def killed(launched: Launched) -> str:
    """Kills rank 0 and returns what is said until all others have ended."""
    began_s, before = time.monotonic(), len(launched.said())
    os.kill(launched.rank_0.pid, signal.SIGKILL)
    launched.rank_0.wait()
    while launched.runs() and time.monotonic() < began_s + DEADLINE_S:
        time.sleep(0.05)
    assert not launched.runs(), launched.said()[before:]
    return launched.said()[before:]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_before_the_ranks_have_met(launched: Launched) -> None:
    launched.wait_for_meeting_to_begin()
    said = killed(launched)
    assert f"stopped, because process {launched.rank_0.pid}, which has started it, is gone." in said
    assert "Traceback" not in said


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_zero2", "fsdp2"])
def test_while_they_train(launched: Launched) -> None:
    launched.wait_for_first_epoch()
    said = killed(launched)
    assert f"rank 1] stopped, because rank 0 ({os.uname().nodename}, process {launched.rank_0.pid}) died" in said
    assert "Traceback" not in said
