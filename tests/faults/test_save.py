"""A checkpoint that cannot be finished: the one before it stays, is found, and is gone on from; the error is one."""

import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
from fitting import diary
from processes import Fit, finish

from osm_lightning.weights.checkpoint import find_checkpoint, read_training_state
from osm_lightning.weights.sharded import partial_of

pytestmark = pytest.mark.cluster

ENGINES = ["ddp", "deepspeed_zero2", "fsdp2"]

SMALL = 60_000
"""Bytes of a file that holds a fit's diary, and no checkpoint, nor a part of one."""


def size(path):
    files = path.rglob("*") if path.is_dir() else [path]
    return max(file.stat().st_size for file in files)


def wait_for(path, run):
    while not path.exists():
        assert run.all_alive(), run.said(0) + run.said(1)
        time.sleep(0.0005)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Folders of runs of two ranks that were stopped, by strategy."""
    made = {}

    def folder(strategy):
        if strategy not in made:
            made[strategy] = tmp_path_factory.mktemp(strategy)
            run = Fit(made[strategy], ranks=2, strategy=strategy, interruptible=True)
            run.wait_for_lines(4)
            run.signal(signal.SIGTERM, 0)
            assert run.wait() == [143, 143], run.said()
        return made[strategy]

    return folder


@pytest.fixture
def saved(tmp_path, strategy, stopped):
    """A run of two ranks that was stopped and has a checkpoint."""
    return Path(shutil.copytree(stopped(strategy), tmp_path / "run"))


def goes_on(folder, strategy):
    """To its end; `diary` sees to it that steps that are done twice are the same both times."""
    finish(folder, ranks=2, strategy=strategy, interruptible=True)
    for rank in range(2):
        assert len(diary(folder, rank)) == 24


def step_of_last(folder):
    return read_training_state(find_checkpoint("last", folder))["global_step"]


@pytest.mark.parametrize("full", [(0,), (0, 1)], ids=["rank 0", "both ranks"])
@pytest.mark.parametrize("strategy", ENGINES)
def test_a_disk_that_is_full_for_a_checkpoint(saved, strategy, full):
    step = step_of_last(saved)
    assert size(saved / "last.ckpt") > SMALL
    limits = [SMALL if rank in full else resource.RLIM_INFINITY for rank in range(2)]
    run = Fit(saved, ranks=2, strategy=strategy, most_bytes=limits)  # saves every second step
    codes = run.wait()
    assert codes[0] == 1
    assert codes[1] in {1, 2}  # 2: it was told of the other's error, which the command ends with 2 for
    assert f"ValueError: checkpoint {saved}/last.ckpt could not be written: " in run.said()
    assert "The previous one is as it was" in run.said()
    assert not partial_of(saved / "last.ckpt").exists()
    assert step_of_last(saved) == step
    goes_on(saved, strategy)


@pytest.mark.parametrize("whom", [0, 1])
@pytest.mark.parametrize("strategy", ENGINES)
def test_a_rank_that_is_killed_within_a_save(saved, strategy, whom):
    step = step_of_last(saved)
    run = Fit(saved, ranks=2, strategy=strategy, slow_disk_s=0.5)
    wait_for(partial_of(saved / "last.ckpt"), run)
    os.killpg(run.pid(whom), signal.SIGKILL)
    codes = run.wait()
    assert sorted(codes) == [-9, 1]
    assert f"because rank {whom} (" in run.said(1 - whom)
    assert step_of_last(saved) in {step, step + 1, step + 2}
    goes_on(saved, strategy)
