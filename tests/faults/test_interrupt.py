"""A fit that is asked to stop saves, ends, and goes on exactly, whatever it was at and whichever rank was asked."""

import os
import signal
import time

import pytest
import torch
from fitting import diary
from test_resume import CONTEXT, _own_group, free_port, lines

EXIT_CODES = {signal.SIGUSR1: 138, signal.SIGTERM: 143, signal.SIGINT: 130}


def run(folder, asked=None, after_lines=0, ranks=1, to=(0,), **settings):
    """Fits in processes of its own, and asks some of them to stop once the diary has so many more lines.

    Returns:
        The processes' exit codes.
    """
    wanted = lines(folder) + after_lines
    arguments = (folder, 0, ranks, free_port())
    keywords = {"interruptible": True, **settings}
    processes = [CONTEXT.Process(target=_own_group, args=(rank, *arguments), kwargs=keywords) for rank in range(ranks)]
    for process in processes:
        process.start()
    while asked is not None and processes[0].is_alive() and lines(folder) < wanted:
        time.sleep(0.002)
    if asked is not None:
        for rank in to:
            os.kill(processes[rank].pid, asked)
    for process in processes:
        process.join(300)
        assert process.exitcode is not None, "it does not end"
    return [process.exitcode for process in processes]


def same(folder, whole, ranks=1):
    for rank in range(ranks):
        assert diary(folder, rank) == diary(whole, rank)
    trained, expected = torch.load(folder / "trained.pt"), torch.load(whole / "trained.pt")
    assert trained.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(trained[name], tensor), name


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """Folders of uninterrupted fits, by their settings."""
    made = {}

    def whole(**settings):
        key = repr(settings)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole")
            assert run(made[key], **settings) == [0] * settings.get("ranks", 1)
        return made[key]

    return whole


@pytest.mark.parametrize("asked", EXIT_CODES)
def test_a_fit_that_is_asked_to_stop_goes_on_exactly(tmp_path, wholes, asked):
    whole = wholes()
    for after_lines in (3, 8, 4):
        assert run(tmp_path, asked, after_lines) == [EXIT_CODES[asked]]
    assert run(tmp_path) == [0]
    same(tmp_path, whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_stop_when_one_is_asked(tmp_path, wholes, rank):
    whole = wholes(ranks=2)
    assert run(tmp_path, signal.SIGTERM, 5, ranks=2, to=(rank,)) == [143, 143]
    assert lines(tmp_path) >= 5
    assert run(tmp_path, ranks=2) == [0, 0]
    same(tmp_path, whole, ranks=2)


def test_it_stops_between_optimizer_steps(tmp_path, wholes):
    settings = {"ranks": 2, "accumulate_grad_batches": 3}
    whole = wholes(**settings)
    assert run(tmp_path, signal.SIGUSR1, 7, to=(0, 1), **settings) == [138, 138]
    assert lines(tmp_path) % 3 == 0
    assert run(tmp_path, **settings) == [0, 0]
    same(tmp_path, whole, ranks=2)


@pytest.mark.parametrize("after_lines", [11, 12, 13])
def test_no_validation_is_lost_at_the_end_of_an_epoch(tmp_path, wholes, after_lines):
    settings = {"limit_val_batches": 4}
    whole = wholes(**settings)
    assert run(tmp_path, signal.SIGUSR1, after_lines, **settings) == [138]
    assert run(tmp_path, **settings) == [0]
    same(tmp_path, whole)
