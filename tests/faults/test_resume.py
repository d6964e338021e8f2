"""A fit that is killed at any moment and resumed trains on the very batches of one that never was."""

import random

import pytest
from fitting import diary
from processes import Fit, finish


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


@pytest.fixture
def folders(tmp_path):
    made = tmp_path / "whole", tmp_path / "killed"
    for folder in made:
        folder.mkdir()
    return made


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_fit_goes_on_with_the_batches_of_a_whole_one(folders, num_workers):
    whole, killed = folders
    finish(whole, num_workers)
    resumed_until_done(killed, num_workers, kills=3, most_lines=6)
    expected = diary(whole)
    assert len(expected) == 24
    assert diary(killed) == expected


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
