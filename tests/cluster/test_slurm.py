"""Jobs of `slurm/*.sbatch` on a real Slurm: they train on two nodes, and come back after a signal as if nothing was."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from local_slurm import LocalSlurm
from shapes_run import QUOTA, ROOT, settings, write_shapes

from osm_lightning.weights.checkpoint import read_training_state

pytestmark = pytest.mark.cluster

NODES = 2
ENGINES = ("ddp", "deepspeed_zero2")
"""Strategies: one whose checkpoint is a file, one whose checkpoint is a folder."""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSlurm]:
    with LocalSlurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


class Cluster:
    """Submits fits of the shapes in a working folder of their own."""

    def __init__(self, slurm: LocalSlurm, folder: Path, engine: str) -> None:
        self.slurm, self.folder = slurm, folder
        write_shapes(folder / "shapes")
        self.words = [*settings(folder / "shapes"), "--trainer.strategy", engine]

    def fit(self, steps: int, *options: str) -> str:
        """Submits a fit of two epochs and returns the job's id."""
        words = [*self.words, "--data.masks_per_epoch", str(steps // 2 * QUOTA * NODES), "--trainer.max_epochs", "2"]
        nodes = (f"--nodes={NODES}", "--ntasks-per-node=1", "--cpus-per-task=1")
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        script = ROOT / "slurm" / "fit.sbatch"
        there = f"--chdir={self.folder}"
        return self.slurm.run("sbatch", "--parsable", there, *nodes, *options, script, *words, PATH=path).strip()

    def ended(self, job: str, within_s: float = 900) -> str:
        """Waits until a job has ended, and returns its state."""
        end_s = time.monotonic() + within_s
        while time.monotonic() < end_s:
            state = self.about(job, "JobState")
            if state not in {"PENDING", "RUNNING", "SIGNALING", "COMPLETING", "REQUEUED"}:
                return state
            time.sleep(1)
        raise AssertionError(f"job {job} does not end:\n{self.log(job)}")

    def about(self, job: str, what: str) -> str:
        found = re.search(rf"\b{what}=(\S+)", self.slurm.run("scontrol", "show", "job", job))
        assert found is not None
        return found[1]

    def log(self, job: str) -> str:
        path = self.folder / f"osm-fit-{job}.log"
        return path.read_text() if path.exists() else ""

    def run(self, job: str) -> Path:
        return self.folder / "runs" / f"slurm-{job}"

    def steps_per_s(self, job: str) -> float:
        with (self.run(job) / "metrics.csv").open(newline="") as file:
            speeds = [float(row["train/masks_per_s"]) for row in csv.DictReader(file) if row["train/masks_per_s"]]
        return speeds[-1] / QUOTA / NODES

    def result(self, job: str) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
        """What the run has trained, and its scores."""
        content = read_training_state(self.run(job) / "checkpoints" / "last.ckpt")
        return content["state_dict"], json.loads((self.run(job) / "scores.json").read_text())


@pytest.fixture(scope="module", params=ENGINES)
def cluster(slurm: LocalSlurm, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster(slurm, tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def short(cluster: Cluster) -> str:
    """A job that nothing happens to."""
    job = cluster.fit(40)
    assert cluster.ended(job) == "COMPLETED", cluster.log(job)
    return job


@pytest.fixture(scope="module")
def steps(cluster: Cluster, short: str) -> int:
    """Steps for two and a half minutes on this machine, if it stays as fast as it was for the short job."""
    return max(60, round(150 * cluster.steps_per_s(short)) // 2 * 2)


@pytest.fixture(scope="module")
def whole(cluster: Cluster, steps: int) -> str:
    """A job of that length, whose result all others must have."""
    job = cluster.fit(steps)
    assert cluster.ended(job) == "COMPLETED", cluster.log(job)
    assert cluster.about(job, "Restarts") == "0"
    return job


def same_result(cluster: Cluster, job: str, whole: str) -> None:
    (trained, scores), (expected, expected_scores) = cluster.result(job), cluster.result(whole)
    assert trained.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(trained[name], tensor), name
    assert scores == expected_scores


def wait_for_step(cluster: Cluster, job: str, restarts: int) -> None:
    """Waits until the job's run of that number has trained for a while."""
    for _ in range(300):
        running = cluster.about(job, "JobState") == "RUNNING" and int(cluster.about(job, "Restarts")) == restarts
        if running and cluster.log(job).count("Total params") > restarts:  # said right before the first step
            time.sleep(5)
            return
        time.sleep(1)
    raise AssertionError(cluster.log(job))


def test_a_job_on_two_nodes_trains(cluster: Cluster, short: str) -> None:
    log = cluster.log(short)
    assert re.search(rf"\[job {short} n1 rank 0\] .*MEMBER: 1/2", log), log
    assert re.search(rf"\[job {short} n2 rank 1\] .*MEMBER: 2/2", log), log
    _, scores = cluster.result(short)
    assert scores["step"] == 40


def test_a_time_limit_changes_nothing(cluster: Cluster, steps: int, whole: str) -> None:
    # Sent 30 to 60 s after the start: three runs or more, also on a machine that has become faster by a third.
    job = cluster.fit(steps, "--time=2", "--signal=SIGUSR1@60")
    assert cluster.ended(job) == "COMPLETED", cluster.log(job)
    assert int(cluster.about(job, "Restarts")) >= 2, cluster.log(job)
    same_result(cluster, job, whole)


def test_a_request_to_make_room_changes_nothing(cluster: Cluster, steps: int, whole: str) -> None:
    job = cluster.fit(steps)
    for restarts in range(2):
        wait_for_step(cluster, job, restarts)
        cluster.slurm.run("scancel", "--signal=TERM", job)
        for _ in range(120):
            if int(cluster.about(job, "Restarts")) > restarts:
                break
            time.sleep(1)
    assert cluster.ended(job) == "COMPLETED", cluster.log(job)
    assert cluster.about(job, "Restarts") == "2", cluster.log(job)
    same_result(cluster, job, whole)


def test_a_cancelled_job_saves_and_does_not_come_back(cluster: Cluster, steps: int) -> None:
    job = cluster.fit(steps)
    wait_for_step(cluster, job, 0)
    cluster.slurm.run("scancel", job)
    assert cluster.ended(job) == "CANCELLED"
    assert f"job {job} is not requeued" in cluster.log(job)
    assert (cluster.run(job) / "checkpoints" / "last.ckpt").exists()
