"""What must hold before processes wait for each other, and messages that say which of them they are from."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import ClusterEnvironment

from osm_lightning.rank_label import rank_label
from osm_lightning.training.watch import SAID, exit_code_of

LAUNCHER = "OSM_LAUNCHER"
"""Environment of the processes that Lightning's launcher starts: the id of the one that they are started by."""

LEAVE_S = 5.0
"""How much longer a further rank stays: the launcher kills rank 0, silently, if it finds that another one has left."""


def check_tasks(trainer: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> None:
    """Compares what the config says of nodes and devices with what srun has started.

    Args:
        trainer: the config's section.
        environment: the process's.

    Raises:
        ValueError: they differ, so that some ranks would wait for others that nobody starts.
    """
    if "SLURM_NTASKS" not in environment or environment.get("SLURM_JOB_NAME") in {"bash", "interactive"}:
        return
    tasks, nodes = int(environment["SLURM_NTASKS"]), int(environment["SLURM_NNODES"])
    if tasks > 1 and "SLURM_STEP_ID" not in environment:
        raise ValueError(f"the job has {tasks} tasks, but this is one process that srun did not start: `srun osm ...`.")
    per_node = environment.get("SLURM_NTASKS_PER_NODE")
    if tasks > 1 and per_node is None:
        raise ValueError(
            f"srun starts {tasks} tasks, but not so many per node, so that nobody knows where each is. Give sbatch "
            f"--ntasks-per-node={tasks // nodes}, in place of --ntasks."
        )
    for setting, name, started in (
        ("devices", "--ntasks-per-node", int(per_node or 1)),
        ("num_nodes", "--nodes", nodes),
    ):
        wanted = trainer.get(setting)
        if str(wanted).isdigit() and int(str(wanted)) != started:
            raise ValueError(
                f"trainer.{setting} is {wanted}, but sbatch's {name} is {started}: one process is started for every "
                f"device. Set --trainer.{setting} {started}, or change {name}."
            )


def check_port(trainer: Trainer) -> None:
    """Sees that rank 0 can have the port at which the ranks are to meet.

    Raises:
        ValueError: somebody else has it; the ranks would meet nobody, or strangers.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.world_size == 1 or not isinstance(environment, ClusterEnvironment):
        return
    if environment.node_rank() or environment.local_rank():
        return
    port = environment.main_port
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise ValueError(
            f"port {port} of {socket.gethostname()}, at which {trainer.world_size} ranks are to meet, cannot be had: "
            f"{error.strerror}. Another run may have it: set MASTER_PORT to a free one on all nodes."
        ) from error


@contextmanager
def meeting() -> Iterator[None]:
    """Says what it means that the ranks have not met: once on every node.

    Raises:
        ValueError: some did not come in time, or rank 0 cannot be reached.
        SystemExit: the same, in a process that is not its node's first.
    """
    end_with_launcher()
    try:
        yield
    except dist.DistError as error:
        if dist.is_initialized():
            raise
        if int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0):
            time.sleep(LEAVE_S)
            raise SystemExit(2) from error
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ValueError(
            f"the ranks have not all met at {place}: {str(error).splitlines()[0]} A node may be missing, or another "
            "one started with other addresses: see that trainer.num_nodes nodes run the command, with the same "
            "MASTER_ADDR and MASTER_PORT, each with its own NODE_RANK."
        ) from error


@contextmanager
def told_once() -> Iterator[None]:
    """Leaves it to rank 0 to tell an error that all ranks have.

    Raises:
        SystemExit: this is another rank.
    """
    try:
        yield
    except Exception as error:
        if SAID in getattr(error, "__notes__", ()):
            raise SystemExit(exit_code_of(error)) from error
        raise


def end_with_launcher() -> None:
    """Has a rank that another one has started end with it, for as long as the ranks have not met.

    Later they watch each other (`watch.py`); until then it would wait for a rank 0 that is gone, half an hour long.
    """
    if not int(os.environ.get("LOCAL_RANK") or 0):
        os.environ[LAUNCHER] = str(os.getpid())  # which it hands on to those that it starts
    elif launcher := os.environ.get(LAUNCHER):
        threading.Thread(target=_watch_launcher, args=(int(launcher),), name="launcher-watch", daemon=True).start()


def _watch_launcher(pid: int) -> None:
    while not dist.is_initialized():
        if os.getppid() != pid:
            print(f"{rank_label()}stopped, because process {pid}, which has started it, is gone.", file=sys.stderr)
            os._exit(1)
        time.sleep(1)


PLAIN_WARNING = warnings.formatwarning
"""As it is without labels."""


class _Labelled(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return rank_label() + super().format(record)


def _labelled_warning(*words: Any, **named: Any) -> str:
    return rank_label() + PLAIN_WARNING(*words, **named)


def label_messages() -> None:
    """Has every warning and log line say which rank it is from, where there are several; again is no harm."""
    warnings.formatwarning = _labelled_warning
    for name in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.setFormatter(_Labelled())
