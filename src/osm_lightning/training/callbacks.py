"""One callback per concern: throughput, the resolved config, scores on disk. Predictions have a file of their own."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

from osm_lightning.batch import MaskBatch
from osm_lightning.evaluation.naming import format_scores
from osm_lightning.training.task import OSMTask
from osm_lightning.whole_file import write_whole


class Throughput(Callback):
    """Logs masks seen, masks/s, images/s, the share of time spent waiting for data, vanished masks and skipped images.

    Lightning's own monitor takes every batch to be of one size; here a batch is as many masks as it holds.
    """

    def __init__(self) -> None:
        self.masks_seen = 0
        self._step = 0
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """Masks seen go on counting when a run is resumed."""
        return {"masks_seen": self.masks_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the count."""
        self.masks_seen = state_dict["masks_seen"]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock; what came before was not training."""
        self._step = trainer.global_step
        self._forget()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock anew; validation was not training."""
        self._forget()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: MaskBatch, batch_idx: int
    ) -> None:
        """What has passed since the last step was waiting."""
        self._wait_s += time.perf_counter() - self._step_ended_s

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: MaskBatch, batch_idx: int
    ) -> None:
        """Counts a step, and logs when it is time to."""
        self._step_ended_s = time.perf_counter()
        self.masks_seen += batch.num_masks * trainer.world_size
        self._masks += batch.num_masks * trainer.world_size
        self._images += batch.num_images * trainer.world_size
        self._vanished += batch.num_vanished
        self._skipped += batch.num_skipped
        # Lightning writes at these steps only, and drops what is logged at others.
        accumulates = trainer.global_step == self._step
        self._step = trainer.global_step
        if accumulates or trainer.global_step % trainer.log_every_n_steps:
            return
        passed_s = self._step_ended_s - self._since_s
        pl_module.log("train/masks_per_s", self._masks / passed_s, prog_bar=True)
        pl_module.log_dict(
            {
                "train/masks_seen": float(self.masks_seen),
                "train/images_per_s": self._images / passed_s,
                "train/data_wait_share": self._wait_s / passed_s,
                "train/vanished_masks": float(self._vanished),
                "train/skipped_images": float(self._skipped),
            }
        )
        self._forget()

    def _forget(self) -> None:
        self._masks = self._images = self._vanished = self._skipped = 0
        self._wait_s = 0.0
        self._since_s = self._step_ended_s = time.perf_counter()


def checkpoints(folder: Path) -> list[ModelCheckpoint]:
    """Two checkpoints of a run: the last, written often, and the best by validation accuracy."""
    in_folder = partial(ModelCheckpoint, dirpath=folder, enable_version_counter=False, auto_insert_metric_name=False)
    return [
        in_folder(filename="last", every_n_train_steps=200),
        in_folder(filename="last", every_n_epochs=1, save_on_train_epoch_end=True),
        in_folder(filename="best", monitor="val/acc", mode="max"),
    ]


@rank_zero_only
def set_aside(metrics: Path) -> None:
    """Numbers the metrics.csv of a run's earlier part, which CSVLogger would delete."""
    if metrics.exists():
        parts = len(list(metrics.parent.glob("metrics.*.csv")))
        metrics.rename(metrics.with_name(f"metrics.{parts + 1}.csv"))


class KeepConfig(SaveConfigCallback):
    """Writes the resolved config beside the logs of a fit, and into its checkpoints."""

    PER_CALL = ("config", "ckpt", "run", "images", "masks", "modes", "out", "trust_checkpoint", "async_save")
    """Settings that belong to one call of the command and not to what is trained."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hands the text to the task, which puts it into every checkpoint."""
        if stage != "fit":
            return
        config = self.config.clone()
        for key in self.PER_CALL:
            config.pop(key, None)
        text = self.parser.dump(config, skip_unset=False, skip_validation=True)
        config["model.allow"] = None  # what this run began without, its checkpoints have
        kept = self.parser.dump(config, skip_unset=False, skip_validation=True)
        cast("OSMTask", pl_module).config_text = kept
        log_dir = trainer.log_dir  # which all ranks must ask for: rank 0 broadcasts it
        if trainer.is_global_zero and log_dir is not None:
            folder = Path(log_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / self.config_filename, text)


class WriteScores(Callback):
    """Prints the scores after every validation, and keeps the last ones as JSON in the run's folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "scores.json"

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what validation measured."""
        rows = cast("OSMTask", pl_module).score_rows
        if trainer.sanity_checking or not rows:
            return
        print("\n" + format_scores(rows), flush=True)
        if trainer.fast_dev_run:
            return
        content = {"step": trainer.global_step, "scores": [asdict(row) for row in rows]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(content, indent=1) + "\n")

    on_test_end = on_validation_end
