"""Twenty optimizer steps of the tiny model on the shipped scenes: loss and gradient norm stay what they were.

A refactor leaves `golden_fit.json` as it is. A change that is meant to change numbers writes it anew and says why, in
the commit and in docs/log.md:

    python tests/golden/test_golden_fit.py --write

The numbers are kept at full precision, for a look at how far a change moves them. The test allows 1e-4, relative: other
CPUs and other builds of torch add in another order, and twenty steps make more of the difference.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml
from torch.nn.utils import get_total_norm

from osm_lightning.data.module import OSMData, SourceConfig
from osm_lightning.model.config import LanguageConfig, QFormerConfig, VisionConfig
from osm_lightning.training.optim import OptimConfig
from osm_lightning.training.task import OSMTask

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("golden_fit.json")
NUM_STEPS = 20
RELATIVE_TOLERANCE = 1e-4


class Recorder(lightning.Callback):
    """Loss, and gradient norm before clipping, of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.steps.append(
            {"loss": float(trainer.callback_metrics["train/loss"]), "norm": float(get_total_norm(gradients))}
        )


def tiny_fit(folder: Path) -> list[dict[str, float]]:
    """Trains for twenty steps: seed 0, one thread, float32, dropout and augmentation as ever."""
    model = yaml.safe_load((ROOT / "configs" / "model" / "tiny.yaml").read_text(encoding="utf-8"))["model"]
    vision, qformer = VisionConfig(**model["vision"]), QFormerConfig(**model["qformer"])
    language = LanguageConfig(**model["language"])
    data = OSMData(
        {"scenes": SourceConfig(str(ROOT / "data_shards" / "scenes"), quota=8)},
        tokenizer=str(language.tokenizer),
        instruction_tokenizer=qformer.instruction_tokenizer,
        modes=["scenes"],
        image_size_px=vision.image_size_px,
        patch_size_px=vision.patch_size_px,
        context=qformer.context,
        masks_per_image=2,
        masks_per_epoch=NUM_STEPS * 8,
        min_mask_px=4,
        num_workers=0,
        seed=0,
    )
    recorder = Recorder()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[recorder],
        default_root_dir=folder,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    lightning.seed_everything(0, verbose=False)
    task = OSMTask(vision, qformer, language, ["scenes"], OptimConfig(lr=2e-3, warmup_steps=5))
    trainer.fit(task, data)
    torch.set_num_threads(threads)
    return recorder.steps


def test_twenty_steps_are_what_they_were(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))["steps"]
    steps = tiny_fit(tmp_path)
    assert len(steps) == len(golden) == NUM_STEPS
    for number, (now, before) in enumerate(zip(steps, golden, strict=True)):
        assert now == pytest.approx(before, rel=RELATIVE_TOLERANCE), f"step {number}"


def write() -> None:
    """Runs the fit and keeps its numbers, with what they were made by."""
    made_by = {"torch": torch.__version__.partition("+")[0], "lightning": lightning.__version__, "num_steps": NUM_STEPS}
    content = {"made_by": made_by, "steps": tiny_fit(Path())}
    partial = GOLDEN.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(GOLDEN)
    print(f"{GOLDEN}: loss {content['steps'][0]['loss']:.4f} -> {content['steps'][-1]['loss']:.4f}")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: python {sys.argv[0]} --write")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    write()
