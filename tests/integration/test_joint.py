"""The paper's recipe on all six datasets at once: quotas and mode halves of real steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from shapes_run import ROOT

from osm_lightning.batch import MaskBatch

QUOTAS = {"coco": 8, "lvis": 16, "ade20k": 4, "cityscapes": 2, "a847": 4, "pc459": 2}
Six = dict[str, dict[str, Any]]


class CountMasks(Callback):
    """Writes how many masks of every (dataset, mode) each step had."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.steps: list[dict[str, int]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: MaskBatch, batch_idx: int
    ) -> None:
        pairs = zip(batch.dataset_M.tolist(), batch.mode_M.tolist(), strict=True)
        self.steps.append(dict(Counter(f"{batch.datasets[dataset]}/{mode}" for dataset, mode in pairs)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.path.write_text(json.dumps(self.steps))


def six_sets(tmp_path: Path, of_photographs: bool) -> Six:
    """Shard sets of six datasets: real photographs under six vocabularies, or the scenes."""
    if not of_photographs:
        scenes = {"shards": str(ROOT / "data_shards" / "scenes"), "train": "train", "val": None}
        return dict.fromkeys(QUOTAS, scenes)
    out = tmp_path / "six"
    words = ["build", "--coco", str(Path(os.environ["OSM_SHARED_DATA"]) / "coco_mini"), "--out", str(out)]
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "six_vocabularies.py"), *words], check=True)
    train = {"coco": "train2017"}
    return {
        dataset: {"shards": str(out / dataset), "train": train.get(dataset, "train"), "val": None} for dataset in QUOTAS
    }


@pytest.mark.parametrize("steps", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_quotas_and_halves_are_exact(steps: int, tmp_path: Path) -> None:
    six = six_sets(tmp_path, of_photographs=steps == 200 and bool(os.environ.get("OSM_SHARED_DATA")))
    overlay = {
        "data": {"sources": six, "masks_per_epoch": steps * sum(QUOTAS.values()), "masks_per_image": 4},
        "trainer": {
            "precision": 32,
            "accumulate_grad_batches": 1,
            "callbacks": [{"class_path": "test_joint.CountMasks", "init_args": {"path": str(tmp_path / "steps.json")}}],
        },
    }
    (tmp_path / "six.yaml").write_text(yaml.safe_dump(overlay))
    configs = [ROOT / "configs" / "joint.yaml", ROOT / "configs" / "model" / "tiny.yaml"]
    configs += [ROOT / "configs" / "trainer" / "cpu.yaml", tmp_path / "six.yaml"]
    words = [word for config in configs for word in ("--config", str(config))]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "osm_lightning",
            "fit",
            *words,
            "--data.num_workers",
            "0",
            "--run",
            str(tmp_path / "run"),
        ],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    counted = json.loads((tmp_path / "steps.json").read_text())
    assert len(counted) == steps
    modes = ("agnostic", *yaml.safe_load(configs[0].read_text())["model"]["modes"])
    exact = {f"{dataset}/{mode}": quota // 2 for dataset, quota in QUOTAS.items() for mode in (0, modes.index(dataset))}
    assert all(step == exact for step in counted)
