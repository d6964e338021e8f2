"""Tiny fits, validations and predictions in processes that really talk to each other, for tests of the strategies."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tiny_training import scenes_data, tiny_task, trainer
from torch.utils.data import DataLoader

from osm_lightning.batch import MaskBatch
from osm_lightning.data.module import OSMData
from osm_lightning.data.stream import Share
from osm_lightning.training.engine_state import WholeFiles
from osm_lightning.training.optim import OptimConfig
from osm_lightning.training.strategies import register_strategies
from osm_lightning.training.zero import OSMDeepSpeed

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["engines"])

CONFIG = "trainer: {precision: 32}\nmodel: {modes: [scenes]}\n"


@dataclass(frozen=True)
class Job:
    """What every process does, one after the other."""

    folder: Path
    strategy: str = "auto"
    ranks: int = 1
    steps: int = 0
    """Optimizer steps of an epoch; 0 does not fit."""
    union_of: int = 1
    """Ranks whose batches a single process trains on, taking turns."""
    lets_go: bool = False
    """ZeRO-3 that gives every weight up after its use; by itself it keeps small ones, and all of a tiny model's are."""
    last_first: bool = False
    """The last of these ranks has the first turn: the same steps, with gradients added in another order."""
    accumulate: int = 1
    save: str | None = None
    """Name of the checkpoint that is written on the way."""
    save_at: int = 3
    """Optimizer step after which it is."""
    ckpt: str | None = None
    """Checkpoint to resume from."""
    weights: str | None = None
    """Checkpoint to take trained parts from."""
    validates: bool = False
    dropout: float = 0.0
    clip: float | None = 1.0
    gradients: bool = False
    """Keep the accumulated gradient after every batch."""
    task: dict[str, Any] = field(default_factory=dict)
    language: dict[str, Any] = field(default_factory=dict)
    qformer: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


class UnionOfRanks(OSMData):
    """The batches that several processes would have, for one: first batch of the first, first of the second ..."""

    num_ranks = 1
    last_first = False
    share = Share()

    @property
    def rank(self) -> Share:
        return self.share

    @property
    def batches_per_epoch(self) -> int:
        return self._num_batches() * self.num_ranks

    def train_dataloader(self) -> Any:
        loaders = []
        for index in range(self.num_ranks):
            self.share = Share(index, self.num_ranks)
            loaders.append(list(super().train_dataloader()))
        self.share = Share(0, self.num_ranks)
        self._loader = None
        if self.last_first:
            loaders.reverse()
        batches = [batch for turns in zip(*loaders, strict=True) for batch in turns]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list would be many loaders


class Record(Callback):
    """Keeps losses and names."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.losses: list[float] = []
        self.gradients: list[torch.Tensor] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: MaskBatch, batch_idx: int
    ) -> None:
        # Lightning hands over the share of an accumulated step; a power of two, so that nothing is rounded.
        self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
        if self.job.gradients:
            trained = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
            self.gradients.append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]))
        if self.job.save and trainer.global_step == self.job.save_at and len(self.losses) % self.job.accumulate == 0:
            trainer.save_checkpoint(self.job.folder / self.job.save)


def work(job: Job) -> dict[str, Any]:
    """One process's part of a job, and what came of it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    register_strategies()  # the task knows no engine, and nothing else here imports them
    record = Record(job)
    task = tiny_task(**{"optim": OptimConfig(lr=2e-3, warmup_steps=4), "weights": job.weights, **job.task})
    task.config_text = CONFIG
    task.language = replace(task.language, **job.language)
    task.qformer = replace(task.qformer, **{"dropout": job.dropout, **job.qformer})
    width = job.ranks * job.union_of * job.accumulate
    data = scenes_data(task, steps=max(1, job.steps) * width, quota=4, masks_per_image=2, **job.data)
    if job.union_of > 1:
        data.__class__, data.num_ranks, data.last_first = UnionOfRanks, job.union_of, job.last_first
        data.share = Share(0, job.union_of)
    loop = trainer(
        job.folder,
        devices=job.ranks,
        strategy=_without_reserves() if job.lets_go else job.strategy,
        accumulate_grad_batches=job.union_of * job.accumulate,
        use_distributed_sampler=False,
        callbacks=[record],
        enable_checkpointing=False,
        plugins=[WholeFiles()],
        **{"gradient_clip_val": job.clip, "limit_val_batches": 1.0 if job.validates else 0, **job.trainer},
    )
    done: dict[str, Any] = {"losses": record.losses, "gradients": record.gradients}
    if job.steps:
        loop.fit(task, data, ckpt_path=job.ckpt, weights_only=True)
        done["step"] = loop.global_step
    elif job.validates:
        loop.validate(task, data, verbose=False)
    if job.validates:
        done["scores"] = {(row.dataset, row.mode): row for row in task.score_rows}
    done["trained_in"] = {str(parameter.dtype) for _, parameter in task.osm.trained()}
    done["identity"] = task.osm.frozen_identity()
    return done


def _without_reserves() -> OSMDeepSpeed:
    strategy = OSMDeepSpeed(stage=3)
    nothing = dict.fromkeys(("param_persistence_threshold", "max_live_parameters", "max_reuse_distance"), 0)
    strategy.config["zero_optimization"] |= {f"stage3_{name}": value for name, value in nothing.items()}  # type: ignore[index]
    return strategy


def run(job: Job, timeout_s: float = 300) -> list[dict[str, Any]]:
    """Does a job in its processes.

    Returns:
        What each process has to say.

    Raises:
        AssertionError: one of them failed; all others are ended.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    results = [job.folder / f"result-{rank}" for rank in range(job.ranks)]
    for path in results:
        path.unlink(missing_ok=True)
    arguments = [(job, rank, port, path) for rank, path in enumerate(results)]
    processes = [CONTEXT.Process(target=_process, args=args) for args in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout_s)
        if process.exitcode != 0:
            for other in processes:
                other.kill()
    said = [path.read_bytes() if path.exists() else b"" for path in results]
    failed = [one[5:].decode() for one in said if one.startswith(b"ERROR")]
    assert not failed, "\n".join(failed)
    assert all(said), f"exit codes {[process.exitcode for process in processes]}"
    return [pickle.loads(one) for one in said]


def _process(job: Job, rank: int, port: int, result: Path) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    warnings.simplefilter("ignore")
    log = (job.folder / f"log-{rank}").open("w")
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    try:
        result.write_bytes(pickle.dumps(work(job)))
    except BaseException:
        result.write_bytes(b"ERROR" + traceback.format_exc().encode())
        os._exit(1)
