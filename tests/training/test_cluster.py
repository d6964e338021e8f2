from __future__ import annotations

import socket
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.plugins.environments import LightningEnvironment

from osm_lightning.rank_label import rank_label
from osm_lightning.training.cluster import check_port, check_tasks, label_messages
from osm_lightning.training.requeue import job_name

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
