"""A rank that dies, hangs or fails: the others end within a minute, and say which one it was and why."""

import os
import signal
import time

import pytest
from processes import Fit

DEADLINE_S = 60


def end_of_two(folder, done_to, whom):
    """Lets two ranks train, does something to one of them, and waits for the other.

    Returns:
        Its exit code, what it said, how long it took, and the process id of the first.
    """
    run = Fit(folder, ranks=2)
    run.wait_for_lines(4)
    assert run.all_alive(), run.said(0) + run.said(1)
    run.signal(done_to, whom)
    began_s = time.monotonic()
    other = run.processes[1 - whom]
    other.join(DEADLINE_S)
    code, passed_s = other.exitcode, time.monotonic() - began_s
    run.kill()
    return code, run.said(1 - whom), passed_s, run.pid(whom)


@pytest.mark.parametrize("whom", [pytest.param(0, marks=pytest.mark.cluster), 1])
def test_a_killed_rank_ends_the_other_at_once(tmp_path, whom):
    code, message, passed_s, pid = end_of_two(tmp_path, signal.SIGKILL, whom)
    assert code == 1
    assert passed_s < 10
    said = message.splitlines()[-1]
    assert said.startswith(f"[{os.uname().nodename} rank {1 - whom}] stopped, because rank {whom} (")
    assert f"process {pid}) died without a word: killed, out of memory, or its node is gone." in said


@pytest.mark.cluster
@pytest.mark.parametrize("whom", [0, 1])
def test_a_stopped_rank_ends_the_other_within_a_minute(tmp_path, whom):
    code, message, _, _ = end_of_two(tmp_path, signal.SIGSTOP, whom)
    assert code == 1
    assert f"because rank {whom} (" in message
    assert "gave no sign of life for 40 s" in message
