"""A rank that dies, hangs or fails: the others end within a minute, and say which one it was and why."""

import os
import signal
import time

import pytest
from test_interrupt import CONTEXT, _own_group, free_port, lines

DEADLINE_S = 60


def told(folder, rank, *words, **settings):
    """A rank whose messages go to a file."""
    with (folder / f"stderr-{rank}.txt").open("wb") as file:
        os.dup2(file.fileno(), 2)
    _own_group(rank, *words, **settings)


def end_of_two(folder, done_to, whom):
    """Lets two ranks train, does something to one of them, and waits for the other.

    Returns:
        Its exit code, what it said, and how long it took.
    """
    arguments = (folder, 0, 2, free_port())
    processes = [CONTEXT.Process(target=told, args=(folder, rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    while lines(folder) < 4:
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)
    os.kill(processes[whom].pid, done_to)
    began_s = time.monotonic()
    other = processes[1 - whom]
    other.join(DEADLINE_S)
    passed_s = time.monotonic() - began_s
    processes[whom].kill()
    processes[whom].join()
    return other.exitcode, (folder / f"stderr-{1 - whom}.txt").read_text(), passed_s, processes[whom].pid


@pytest.mark.parametrize("whom", [0, 1])
def test_a_killed_rank_ends_the_other_at_once(tmp_path, whom):
    code, message, passed_s, pid = end_of_two(tmp_path, signal.SIGKILL, whom)
    assert code == 1
    assert passed_s < 10
    said = message.splitlines()[-1]
    assert said.startswith(f"[{os.uname().nodename} rank {1 - whom}] stopped, because rank {whom} (")
    assert f"process {pid}) died without a word: killed, out of memory, or its node is gone." in said


@pytest.mark.slow
@pytest.mark.parametrize("whom", [0, 1])
def test_a_stopped_rank_ends_the_other_within_a_minute(tmp_path, whom):
    code, message, _, _ = end_of_two(tmp_path, signal.SIGSTOP, whom)
    assert code == 1
    assert f"because rank {whom} (" in message
    assert "gave no sign of life for 40 s" in message
