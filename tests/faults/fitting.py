"""A tiny fit that writes down what it trained on, for tests that kill it: run in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_training import scenes_data, tiny_task, trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from osm_lightning.batch import MaskBatch
from osm_lightning.training.engine_state import WholeFiles, WritesBeside
from osm_lightning.training.guards import GradientGuard
from osm_lightning.training.interrupt import Interrupt, do_not_listen
from osm_lightning.training.task import OSMTask
from osm_lightning.training.watch import WatchRanks
from osm_lightning.weights.sharded import whole


class Diary(Callback):
    """Appends a line to a file for every batch: its number, and bit for bit content, loss and weights."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves word that the ranks have met and watch each other; nothing has been built or loaded yet."""
        met_path(self.path.parent).touch()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: MaskBatch, batch_idx: int
    ) -> None:
        line = {
            "number": trainer.fit_loop.total_batch_idx,
            "batch": digest(batch),
            "loss": float(outputs["loss"]).hex(),
            "weights": digest_of(trained(cast("OSMTask", pl_module))),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class Poison(Callback):
    """Makes what a layer gives for some batches no numbers, as an overflow does."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = numbers

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: MaskBatch, batch_idx: int
    ) -> None:
        if trainer.fit_loop.total_batch_idx in self.numbers:
            projection = cast("OSMTask", pl_module).osm.projection
            hook = projection.register_forward_hook(lambda module, given, made: (hook.remove(), made * float("nan"))[1])


def trained(task: OSMTask) -> dict[str, Tensor]:
    """What is trained, whole also where a process holds a part of it: then all of them must ask."""
    tensors = {name: parameter.detach() for name, parameter in task.osm.trained()}
    return {name: of.full_tensor() if isinstance(of, DTensor) else of for name, of in tensors.items()}


def digest(batch: MaskBatch) -> str:
    """sha256 of everything in a batch."""
    return digest_of({field.name: getattr(batch, field.name) for field in fields(batch)})


def digest_of(values: Mapping[str, Any]) -> str:
    """sha256 of tensors and of whatever else there is."""
    sha = hashlib.sha256()
    for value in values.values():
        sha.update(value.numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode())
    return sha.hexdigest()


def fit(
    folder: Path,
    num_workers: int,
    ranks: int = 1,
    strategy: str = "ddp",
    steps: int = 12,
    interruptible: bool = False,
    poisoned: Mapping[int, Sequence[int]] = MappingProxyType({}),
    slow_disk_s: float = 0.0,
    late_data_s: Mapping[int, float] = MappingProxyType({}),
    beside: bool = False,
    **settings: Any,
) -> None:
    """Fits for two epochs, from the folder's last.ckpt where there is one; saves every second step.

    One of several ranks finds its own number and the others' address in the environment.

    Args:
        folder: where all is written.
        num_workers: processes that prepare batches.
        ranks: processes that train.
        strategy: of several ranks.
        steps: batches of an epoch.
        interruptible: save when a signal comes, instead of every second step.
        poisoned: from a rank to the numbers of its batches that are made useless.
        slow_disk_s: how long the disk takes to have a file for good.
        late_data_s: from a rank to how long it waits for its data before it can begin; it leaves word that it does.
        beside: write checkpoints while training goes on, as --async_save does.
        settings: the trainer's.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if slow_disk_s:
        sync = os.fsync
        os.fsync = lambda file: (time.sleep(slow_disk_s), sync(file))[1]
    task = tiny_task()
    data = scenes_data(task, steps=steps * ranks, num_workers=num_workers, masks_per_image=2)
    moments: tuple[dict[str, Any], ...] = (
        {"every_n_train_steps": 2},
        {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    )
    saving: list[Callback] = [
        ModelCheckpoint(folder, filename="last", enable_version_counter=False, **when) for when in moments
    ]
    if interruptible:
        saving = [Interrupt(folder / "last.ckpt"), *saving[1:]]
        saving[0].listen()
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    if rank in late_data_s:
        make = data.train_dataloader
        data.train_dataloader = lambda: (late_path(folder).touch(), time.sleep(late_data_s[rank]), make())[2]
    loop = trainer(
        folder,
        max_epochs=2,
        devices=ranks,
        strategy=strategy if ranks > 1 else "auto",
        enable_checkpointing=True,
        use_distributed_sampler=False,
        plugins=[WritesBeside(WholeFiles()) if beside else WholeFiles()],
        callbacks=[
            WatchRanks(),
            Poison(poisoned.get(rank, ())),
            GradientGuard(max_skipped_in_row=2, spike_factor=10),
            Diary(diary_path(folder, rank)),  # behind the guard, which ends DeepSpeed's run after the step
            *saving,
        ],
        **settings,
    )
    do_not_listen(loop)
    saved = whole(folder / "last.ckpt")
    loop.fit(task, datamodule=data, ckpt_path=None if saved is None else str(saved), weights_only=True)
    at_end = trained(task)
    if rank == 0:
        torch.save(at_end, folder / "trained.pt")


def diary_path(folder: Path, rank: int = 0) -> Path:
    """Where a rank writes."""
    return folder / f"diary-{rank}.jsonl"


def met_path(folder: Path) -> Path:
    """A file that is there once the ranks of a run have met."""
    return folder / "met"


def late_path(folder: Path) -> Path:
    """A file that is there once a rank waits for data that come late."""
    return folder / "late"


def diary(folder: Path, rank: int = 0) -> dict[int, tuple[str, ...]]:
    """What was trained on at each step; a step that was done twice must have been the same both times.

    A line that a kill cut off says nothing.
    """
    steps: dict[int, tuple[str, ...]] = {}
    path = diary_path(folder, rank)
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        found = (line["batch"], line["loss"], line["weights"])
        assert steps.setdefault(line["number"], found) == found, f"step {line['number']} differs the second time"
    return steps
