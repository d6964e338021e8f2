"""`osm predict` on any number of processes: who names what, what is kept on the way, and one result at the end.

Rank 0 looks what an earlier run has named and tells the others. Every rank writes what it names into the journal
(`evaluation/prediction_journal.py`), and when all are through, rank 0 makes the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar, cast, overload

import torch.distributed as dist
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, uint8

from osm_lightning.batch import MaskBatch, NamedMask
from osm_lightning.data.module import OSMData
from osm_lightning.evaluation.prediction_journal import JournalPart, Plan, PredictionJournal
from osm_lightning.evaluation.predictions import publish, write_image
from osm_lightning.evaluation.segments import SegmentSource
from osm_lightning.record import Record
from osm_lightning.weights.checkpoint import read_checkpoint

ResultT = TypeVar("ResultT")

NAMING_SETTINGS = ("vision", "qformer", "language", "modes", "max_new_tokens")
"""Settings of the model that names depend on."""


class Chosen(Sequence[Record]):
    """Some records of a source, read when they are asked for."""

    def __init__(self, source: SegmentSource, positions: Sequence[int]) -> None:
        self.source, self.positions = source, positions

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Chosen: ...
    def __getitem__(self, index: int | slice) -> Record | Chosen:
        if isinstance(index, slice):
            return Chosen(self.source, self.positions[index])
        return self.source[self.positions[index]]


class WritePredictions(Callback):
    """Keeps every image's names as soon as they are there, and makes the files when all are."""

    num_named = 0
    """Images that are named when the run ends; fewer than all where the trainer was to stop earlier."""

    def __init__(
        self, source: SegmentSource, journal: PredictionJournal, plan: Callable[[], Plan], score_eos: bool = True
    ) -> None:
        """Opens nothing.

        Args:
            source: images and masks.
            journal: of the output folder.
            plan: what is to be named by what; only rank 0 asks.
            score_eos: whether scores include EOS.
        """
        self.source, self.journal, self.plan, self.score_eos = source, journal, plan, score_eos
        self._part: JournalPart | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Chooses what is left to name, before the model is built.

        Raises:
            ValueError: an image or a mask cannot be used, or the output folder cannot.
        """
        self._beginning = on_rank_zero(trainer, lambda: self.journal.begin(self.plan()))
        named = self._beginning.named
        keys = self.source.keys
        left = [position for position, key in enumerate(keys) if key not in named]
        # What an earlier run named it had looked at; the rest is looked at by all ranks together.
        mine = left[trainer.global_rank :: trainer.world_size]
        self.source.refuse(sorted(gathered(trainer, self.source.problems(mine))))
        self._position_of = {keys[position]: position for position in left}
        self._part = self.journal.join(self._beginning, trainer.global_rank)
        data = cast("OSMData", cast("Any", trainer).datamodule)
        data.predicted = Chosen(self.source, left)
        # After a kill fewer images may be left than there are ranks.
        data.allow_zero_length_dataloader_with_multiple_devices = True
        trainer.strategy.barrier("every rank has its part")
        if named and trainer.is_global_zero:
            print(f"Going on behind {len(named)} of {len(keys)} images, which are named.", flush=True)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: MaskBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the names of a batch; images that only fill up a rank's share have none, or have had their turn."""
        assert self._part is not None
        named: list[NamedMask] = outputs
        for key, masks in groupby(named, key=lambda mask: mask.image):
            position = self._position_of.pop(key, None)
            if position is not None:
                write_image(self._part, self.source[position], list(masks))
        self._part.commit()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes the files. Not when the loop ends, which a rank without any image never enters."""
        assert self._part is not None
        self._part.close()
        self.journal.wait(self._beginning, trainer.world_size)
        trainer.strategy.barrier("every rank has named its share")
        self.num_named = on_rank_zero(trainer, lambda: publish(self.journal, self.source.keys, self.score_eos))
        self.journal.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves what is named to the next run, or nothing where there is nothing."""
        begun = self._part is not None
        if self._part is not None:
            self._part.close()
            self._part = None
        if self.journal.close() and begun:
            print(f"Kept what is named, in {self.journal.folder}: the same command goes on behind it.", flush=True)


def on_rank_zero(trainer: Trainer, function: Callable[[], ResultT]) -> ResultT:
    """Lets rank 0 do something while the others wait; its result, or what it refuses, is everybody's.

    Raises:
        ValueError: rank 0 refused.
    """
    result, refusal = None, None
    if trainer.is_global_zero:
        try:
            result = function()
        except ValueError as error:
            refusal = error
    result, said = trainer.strategy.broadcast((result, refusal and str(refusal)))
    if refusal is not None:
        raise refusal
    if said is not None:
        raise ValueError(said)
    return cast("ResultT", result)


def gathered(trainer: Trainer, mine: list[str]) -> list[str]:
    """The lists of all ranks, put together."""
    if trainer.world_size == 1:
        return mine
    lists: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(lists, mine)
    return [entry for one in lists for entry in one]


def naming_plan(source: SegmentSource, options: Namespace) -> Plan:
    """Everything that names depend on; not how they are computed (devices, strategy, images per batch).

    Args:
        source: images and masks.
        options: of the command.
    """
    model = options.model.as_dict()
    settings = json.dumps({name: model[name] for name in NAMING_SETTINGS}, sort_keys=True, default=str)
    weights, untrained = options.model.weights, f"none, seed {options.seed_everything}"
    if weights is not None:
        settings = settings.replace(json.dumps(str(Path(weights).resolve()))[:-1], '"own:')  # its place doesn't count
    return {
        "osm_lightning": version("osm_lightning"),
        "checkpoint": untrained if weights is None else _fingerprint(weights, options.trust_checkpoint),
        "model settings": hashlib.sha256(settings.encode()).hexdigest()[:16],
        "precision": str(options.trainer.precision),
        "modes": ",".join(options.modes),
        "images and masks": f"{len(source)}, {source.fingerprint()}",
    }


def _fingerprint(path: str, trusted: bool) -> str:
    """Of the trained tensors, bit by bit, and of the frozen parts that they need. Its form and place don't count."""
    checkpoint = read_checkpoint(path, trusted)
    digest = hashlib.sha256(json.dumps(dict(checkpoint.frozen), sort_keys=True).encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()[:16]


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(uint8).numpy().data
