"""A fit that is asked to stop saves, ends, and goes on exactly, whatever it was at and whichever rank was asked."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import Fit, finish, lines, same

EXIT_CODES = {signal.SIGUSR1: 138, signal.SIGTERM: 143, signal.SIGINT: 130}


def cluster(value):
    """A parameter that is too much for `make test`."""
    return pytest.param(value, marks=pytest.mark.cluster)


ENGINES = ["ddp", cluster("deepspeed_zero2"), cluster("fsdp2")]


def asked_to_stop(folder, asked, after_lines, to=(0,), **settings):
    """Fits until rank 0's diary has so many more lines, and asks some ranks to stop.

    Returns:
        The processes' exit codes.
    """
    run = Fit(folder, interruptible=True, **settings)
    run.wait_for_lines(after_lines)
    assert run.all_alive(), run.said()
    run.signal(asked, *to)
    return run.wait()


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """Folders of uninterrupted fits, by their settings."""
    made = {}

    def whole(**settings):
        key = repr(settings)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole")
            finish(made[key], interruptible=True, **settings)
        return made[key]

    return whole


@pytest.mark.parametrize("asked", [signal.SIGUSR1, cluster(signal.SIGTERM), cluster(signal.SIGINT)])
def test_a_fit_that_is_asked_to_stop_goes_on_exactly(tmp_path, wholes, asked):
    for after_lines in (3, 8, 4):
        assert asked_to_stop(tmp_path, asked, after_lines) == [EXIT_CODES[asked]]
    finish(tmp_path, interruptible=True)
    same(tmp_path, wholes())


@pytest.mark.parametrize("rank", [cluster(0), 1])
@pytest.mark.parametrize("strategy", ENGINES)
def test_all_ranks_stop_when_one_is_asked(tmp_path, wholes, strategy, rank):
    settings = {"ranks": 2, "strategy": strategy}
    for after_lines in (5, 6):
        assert asked_to_stop(tmp_path, signal.SIGTERM, after_lines, to=(rank,), **settings) == [143, 143]
    finish(tmp_path, interruptible=True, **settings)
    same(tmp_path, wholes(**settings), ranks=2)


@pytest.mark.parametrize("strategy", ENGINES)
def test_ranks_that_still_wait_for_their_first_batch_stop_at_the_first_step(tmp_path, wholes, strategy):
    settings = {"ranks": 2, "strategy": strategy}
    run = Fit(tmp_path, interruptible=True, late_data_s={1: 8}, **settings)
    run.wait_for_late_data()
    time.sleep(2)  # rank 0 is within a collective by now, where it waits for rank 1
    run.signal(signal.SIGTERM, 0, 1)
    assert run.wait() == [143, 143], run.said() + run.said(1)
    assert lines(tmp_path) == 1
    finish(tmp_path, interruptible=True, **settings)
    same(tmp_path, wholes(**settings), ranks=2)


@pytest.mark.cluster
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_zero2", "fsdp2"])
def test_it_stops_between_optimizer_steps(tmp_path, wholes, strategy):
    settings = {"ranks": 2, "strategy": strategy, "accumulate_grad_batches": 3}
    assert asked_to_stop(tmp_path, signal.SIGUSR1, 7, to=(0, 1), **settings) == [138, 138]
    assert lines(tmp_path) % 3 == 0
    finish(tmp_path, interruptible=True, **settings)
    same(tmp_path, wholes(**settings), ranks=2)


@pytest.mark.parametrize("after_lines", [cluster(11), cluster(12), cluster(13)])
def test_no_validation_is_lost_at_the_end_of_an_epoch(tmp_path, wholes, after_lines):
    settings = {"limit_val_batches": 4}
    assert asked_to_stop(tmp_path, signal.SIGUSR1, after_lines, **settings) == [138]
    finish(tmp_path, interruptible=True, **settings)
    same(tmp_path, wholes(**settings))


ASKED_TOO_LATE = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {path}
from fitting import fit

class AtTheEnd:
    def __del__(self, kill=os.kill, pid=os.getpid()):
        kill(pid, {asked})

fit(Path({folder!r}), num_workers=0, steps=2, interruptible=True)
at_the_end = AtTheEnd()  # until the interpreter clears its modules, when it has no handlers any more
"""


@pytest.mark.parametrize("asked", [signal.SIGUSR1, cluster(signal.SIGTERM)])
def test_a_run_that_is_through_is_not_killed_on_its_last_metres(tmp_path, asked):
    tests = Path(__file__).parents[1]
    path = [str(tests / "faults"), str(tests / "training")]
    script = ASKED_TOO_LATE.format(path=path, asked=int(asked), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path) == 4
