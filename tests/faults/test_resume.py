"""A fit that is killed at any moment and resumed trains on the very batches of one that never was."""

import multiprocessing
import os
import random
import signal
import socket
import time

import pytest
from fitting import diary, diary_path, fit

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fitting"])


def run(folder, num_workers, kill_after_lines=None, delay_s=0.0, ranks=1, **settings):
    """Fits in processes of its own; kills them and their workers once the diary has so many more lines.

    Returns:
        Whether it was killed; else it came to its end.
    """
    wanted = None if kill_after_lines is None else lines(folder) + kill_after_lines
    arguments = (folder, num_workers, ranks, free_port())
    processes = [CONTEXT.Process(target=_own_group, args=(rank, *arguments), kwargs=settings) for rank in range(ranks)]
    for process in processes:
        process.start()
    while wanted is not None and processes[0].is_alive() and lines(folder) < wanted:
        time.sleep(0.002)
    if wanted is not None:
        time.sleep(delay_s)
    killed = wanted is not None and all(process.is_alive() for process in processes)
    for process in processes:
        if killed:
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    assert killed or not any(process.exitcode for process in processes)
    return killed


def _own_group(rank, folder, num_workers, ranks, port, **settings):
    os.setsid()
    if ranks > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    fit(folder, num_workers, ranks, **settings)


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def lines(folder):
    path = diary_path(folder)
    return path.read_bytes().count(b"\n") if path.exists() else 0


def resumed_until_done(folder, num_workers, kills, most_lines, **settings):
    """Kills a fit at random moments, resuming it each time, and lets it end at last."""
    rng = random.Random(num_workers)
    for number in range(kills):
        killed = run(folder, num_workers, rng.randint(1, most_lines), rng.uniform(0, 0.1), **settings)
        assert killed, f"the fit ended after {number} of {kills} kills: give it more steps"
    run(folder, num_workers, **settings)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_fit_goes_on_with_the_batches_of_a_whole_one(tmp_path, num_workers):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    run(whole, num_workers)
    resumed_until_done(killed, num_workers, kills=3, most_lines=6)
    expected = diary(whole)
    assert len(expected) == 24
    assert diary(killed) == expected


def test_two_ranks_that_are_killed_go_on_alike(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    run(whole, 2, ranks=2)
    resumed_until_done(killed, 2, kills=2, most_lines=8, ranks=2)
    for rank in range(2):
        expected = diary(whole, rank)
        assert len(expected) == 24
        assert diary(killed, rank) == expected
    assert diary(whole, 0) != diary(whole, 1)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_twenty_kills_change_nothing(tmp_path, num_workers):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    run(whole, num_workers, steps=150)
    resumed_until_done(killed, num_workers, kills=20, most_lines=20, steps=150)
    assert diary(killed) == diary(whole)
