from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.plugins.environments import LightningEnvironment

from osm_lightning.rank_label import rank_label
from osm_lightning.training.cluster import LAUNCHER, check_port, check_tasks, label_messages, told_once
from osm_lightning.training.requeue import job_name
from osm_lightning.training.watch import SAID

STEP = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS_PER_NODE": "2",
}


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a job nor one of several ranks."""
    for name in (*STEP, "SLURM_PROCID", "RANK", "LOCAL_RANK", "SLURMD_NODENAME", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


# What srun has started


@pytest.mark.parametrize(
    "trainer", [{"devices": 2, "num_nodes": 2}, {"devices": "2", "num_nodes": 2}, {"devices": "auto"}]
)
def test_what_srun_has_started_is_taken(trainer: dict[str, Any]) -> None:
    check_tasks(trainer, STEP)


@pytest.mark.parametrize(
    ("trainer", "changed", "message"),
    [
        ({"devices": 8}, {}, r"trainer\.devices is 8, but sbatch's --ntasks-per-node is 2.*--trainer\.devices 2"),
        ({"num_nodes": 1}, {}, r"trainer\.num_nodes is 1, but sbatch's --nodes is 2"),
        ({}, {"SLURM_NTASKS_PER_NODE": None}, r"--ntasks-per-node=2, in place of --ntasks"),
        ({}, {"SLURM_STEP_ID": None}, r"4 tasks, but this is one process that srun did not start"),
    ],
)
def test_a_launch_that_would_wait_for_ever_is_refused(
    trainer: dict[str, Any], changed: dict[str, str | None], message: str
) -> None:
    environment = {name: value for name, value in {**STEP, **changed}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        check_tasks(trainer, environment)


def test_an_interactive_shell_in_a_job_is_one_process() -> None:
    check_tasks({"devices": 1}, {**STEP, "SLURM_JOB_NAME": "bash"})
    check_tasks({"devices": 1}, {})


# The port


def meeting(world_size: int = 2) -> Any:
    return SimpleNamespace(world_size=world_size, strategy=SimpleNamespace(cluster_environment=LightningEnvironment()))


def test_a_port_in_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(ValueError, match=rf"port {port} of .*, at which 2 ranks .* in use.*set MASTER_PORT"):
            check_port(meeting())
        check_port(meeting(world_size=1))
        monkeypatch.setenv("LOCAL_RANK", "1")
        check_port(meeting())
    monkeypatch.delenv("LOCAL_RANK")
    check_port(meeting())


# Ranks that others have started


def waits(launcher: int) -> subprocess.Popen[str]:
    """A further rank that waits for others, started by this process and told that it was by another one."""
    code = "import time; from osm_lightning.training.cluster import end_with_launcher as end; end(); time.sleep(600)"
    environment = {**os.environ, "LOCAL_RANK": "1", LAUNCHER: str(launcher)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)


def test_a_rank_whose_launcher_is_gone_does_not_wait() -> None:
    orphan, child = waits(launcher=1), waits(launcher=os.getpid())
    assert orphan.wait(300) == 1
    assert "rank 1] stopped, because process 1, which has started it, is gone." in orphan.communicate()[1]
    time.sleep(3)
    assert child.poll() is None
    child.kill()
    child.communicate()


def test_an_error_of_all_ranks_is_left_to_rank_0() -> None:
    error = ValueError("no such thing")
    with pytest.raises(ValueError, match="no such thing"), told_once():
        raise error
    error.add_note(SAID)
    with pytest.raises(SystemExit) as ended, told_once():
        raise error
    assert ended.value.code == 2


# Messages


@pytest.mark.parametrize(
    ("environment", "label"),
    [
        ({}, ""),
        ({"SLURM_JOB_ID": "12", "SLURMD_NODENAME": "node01", "SLURM_PROCID": "3"}, "[job 12 node01 rank 3] "),
        ({"LOCAL_RANK": "1"}, f"[{socket.gethostname()} rank 1] "),
    ],
)
def test_messages_say_where_they_are_from(
    environment: dict[str, str], label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    label_messages()
    label_messages()  # as each command does that runs in this process
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert rank_label() == label
    assert warnings.formatwarning("hm", UserWarning, str(Path("a.py")), 1).startswith(f"{label}a.py:1: UserWarning: hm")


def test_a_task_of_an_array_goes_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The id of one of them is the array's, and would requeue them all."""
    assert job_name() is None
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert job_name() == "12"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert job_name() == "12_3"
