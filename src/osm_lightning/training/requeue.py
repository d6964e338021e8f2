"""Putting the own Slurm job back into the queue. It knows nothing of training."""

from __future__ import annotations

import os
import subprocess


def requeue_job() -> str:
    """Requeues the job that this process belongs to, if it should run again.

    A job that is being cancelled gets SIGTERM as a preempted one does, and Slurm would requeue it all the same: only a
    job that still counts as running is requeued. In the grace time before a preemption it does.

    Returns:
        What was done, or why nothing was, to end a sentence with.
    """
    job = job_name()
    if job is None:
        return "this is no Slurm job, so nothing starts it again"
    state = _output("squeue", "--noheader", f"--jobs={job}", "--format=%T")
    if state != "RUNNING":
        return f"job {job} is not requeued, for it is {state}"
    answer = _output("scontrol", "requeue", job)
    return f"job {job} is requeued" if not answer else f"job {job} could not be requeued: {answer}"


def job_name() -> str | None:
    """What `scontrol` calls the job; None outside of one.

    A task of an array has a name of its own: the id of one task is also the id of the whole array.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout + done.stderr).strip()
