"""A fit that is killed at any moment and resumed trains on the very batches of one that never was."""

import os
import random
import signal
from collections import Counter

import pytest
from fitting import diary
from processes import Fit, finish, same

SLOW_DISK_S = 0.3
"""In some runs: every file of a checkpoint takes so long."""

FILES = {"ddp": 1, "deepspeed_zero2": 4, "deepspeed_zero3": 4, "fsdp2": 5}
"""Of a checkpoint of two ranks, by strategy."""

STEPS = 40
"""Of an epoch of the two that are killed twenty times."""


def resumed_until_done(folder, num_workers, kills, most_lines, **settings):
    """Kills a fit at random moments, resuming it each time, and lets it end at last."""
    rng = random.Random(num_workers)
    for number in range(kills):
        run = Fit(folder, num_workers, **settings)
        run.wait_for_lines(rng.randint(1, most_lines))
        run.processes[0].join(rng.uniform(0, 0.1))
        assert run.all_alive(), f"the fit ended after {number} of {kills} kills: give it more steps\n{run.said()}"
        run.kill()
    finish(folder, num_workers, **settings)


@pytest.mark.parametrize("num_workers", [pytest.param(0, marks=pytest.mark.cluster), 2])
def test_a_killed_fit_goes_on_with_the_batches_of_a_whole_one(folders, num_workers):
    whole, killed = folders
    finish(whole, num_workers)
    resumed_until_done(killed, num_workers, kills=3, most_lines=6)
    expected = diary(whole)
    assert len(expected) == 24
    assert diary(killed) == expected


@pytest.mark.cluster
def test_two_ranks_that_are_killed_go_on_alike(folders):
    whole, killed = folders
    finish(whole, 2, ranks=2)
    resumed_until_done(killed, 2, kills=2, most_lines=8, ranks=2)
    for rank in range(2):
        expected = diary(whole, rank)
        assert len(expected) == 24
        assert diary(killed, rank) == expected
    assert diary(whole, 0) != diary(whole, 1)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_twenty_kills_change_nothing(folders, num_workers):
    whole, killed = folders
    finish(whole, num_workers, steps=150)
    resumed_until_done(killed, num_workers, kills=20, most_lines=20, steps=150)
    assert diary(killed) == diary(whole)


def killed_once(folder, strategy, number, rng):
    """Starts two ranks, kills one of them at a random moment, and sees the other end by itself.

    Every third run has a slow disk and is killed while it saves, or not much later. The others are killed within their
    next step, or before their first.

    Returns:
        What the run was at.
    """
    slow = number % 3 == 2
    run = Fit(folder, ranks=2, strategy=strategy, steps=STEPS, slow_disk_s=SLOW_DISK_S if slow else 0.0)
    num_lines = rng.randint(0, 2 if slow else 6)
    run.wait_for_meeting()
    run.wait_for_lines(num_lines)
    if slow:
        run.wait_for_save()
    longest_s = 1.2 * SLOW_DISK_S * FILES[strategy] if slow else 0.5 if num_lines else 2.0
    run.processes[0].join(rng.uniform(0, longest_s))
    assert run.all_alive(), f"the fit ended before kill {number + 1}\n{run.said(0)}\n{run.said(1)}"
    moment = "save" if run.saves() else "step" if run.new_lines() else "start"
    whom = rng.randrange(2)
    os.killpg(run.pid(whom), signal.SIGKILL)
    codes = run.wait()
    assert codes[whom] == -signal.SIGKILL
    assert codes[1 - whom] == 1, run.said(1 - whom)
    assert f"because rank {whom} (" in run.said(1 - whom)
    return moment


@pytest.mark.cluster
@pytest.mark.parametrize("strategy", FILES)
def test_twenty_kills_of_one_rank_change_nothing(folders, strategy):
    whole, killed = folders
    finish(whole, ranks=2, strategy=strategy, steps=STEPS)
    rng = random.Random(strategy)
    moments = Counter(killed_once(killed, strategy, number, rng) for number in range(20))
    print(f"\n{strategy}: {dict(moments)}, last after step {max(diary(killed))}")
    assert min(moments[moment] for moment in ("start", "step", "save")) > 0, moments
    finish(killed, ranks=2, strategy=strategy, steps=STEPS)
    assert len(diary(whole)) == 2 * STEPS
    same(killed, whole, ranks=2)
