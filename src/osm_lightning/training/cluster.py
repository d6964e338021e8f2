"""What must hold before processes wait for each other, and messages that say which of them they are from."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import ClusterEnvironment

from osm_lightning.rank_label import rank_label


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
    """Says what it means that the ranks have not met.

    Raises:
        ValueError: some did not come in time, or rank 0 cannot be reached.
    """
    try:
        yield
    except dist.DistError as error:
        if dist.is_initialized():
            raise
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ValueError(
            f"the ranks have not all met at {place}: {str(error).splitlines()[0]} A node may be missing, or another "
            "one started with other addresses: see that trainer.num_nodes nodes run the command, with the same "
            "MASTER_ADDR and MASTER_PORT, each with its own NODE_RANK."
        ) from error


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
