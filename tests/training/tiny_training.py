"""A tiny OSMTask and its data on the shipped scenes, for tests of what happens around a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import yaml

import osm_lightning.training.strategies  # noqa: F401  Makes our names of strategies known to Lightning
from osm_lightning.data.module import OSMData, SourceConfig
from osm_lightning.model.config import LanguageConfig, QFormerConfig, VisionConfig
from osm_lightning.training.task import OSMTask

ROOT = Path(__file__).parents[2]
TINY = yaml.safe_load((ROOT / "configs" / "model" / "tiny.yaml").read_text(encoding="utf-8"))["model"]


def tiny_task(**settings: Any) -> OSMTask:
    """A task with the tiny model of the configs."""
    parts = VisionConfig(**TINY["vision"]), QFormerConfig(**TINY["qformer"]), LanguageConfig(**TINY["language"])
    return OSMTask(*parts, **{"modes": ["scenes"], **settings})


def scenes_data(task: OSMTask, steps: int = 4, quota: int = 4, **settings: Any) -> OSMData:
    """Data that belong to the task."""
    return OSMData(
        {"scenes": SourceConfig(str(ROOT / "data_shards" / "scenes"), quota=quota)},
        tokenizer=str(task.language.tokenizer),
        instruction_tokenizer=task.qformer.instruction_tokenizer,
        modes=task.modes,
        image_size_px=task.vision.image_size_px,
        patch_size_px=task.vision.patch_size_px,
        **{"masks_per_epoch": steps * quota, "min_mask_px": 4, "num_workers": 0, **settings},
    )


def trainer(folder: Path, **settings: Any) -> lightning.Trainer:
    """A quiet trainer of one epoch on the CPU, that validates nothing."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    own = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "limit_val_batches": 0, "enable_checkpointing": False}
    return lightning.Trainer(default_root_dir=folder, **{**quiet, **own, **settings})


def build(task: OSMTask, folder: Path) -> OSMTask:
    """Builds a task's model as a trainer would, without training."""
    task.trainer = trainer(folder)
    task.trainer.datamodule = scenes_data(task)
    task.configure_model()
    return task
