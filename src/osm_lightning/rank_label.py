"""Which of a run's processes a message comes from, told by the environment that Slurm and launchers give."""

from __future__ import annotations

import os
import socket


def rank_label() -> str:
    """`[job 12 node01 rank 3] ` to stand before a message; empty for a process that is alone."""
    environment = os.environ
    for name in ("SLURM_PROCID", "RANK", "LOCAL_RANK"):
        if rank := environment.get(name):
            node = environment.get("SLURMD_NODENAME") or socket.gethostname()
            job = f"job {environment['SLURM_JOB_ID']} " if "SLURM_JOB_ID" in environment else ""
            return f"[{job}{node} rank {rank}] "
    return ""
