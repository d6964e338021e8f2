"""Every strategy through the `osm` command on two CPU processes: what it trains, keeps, opens, scores and names.

The ranks are started by Lightning, as a user's are. tests/training/test_strategies.py compares losses and resumed runs.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shapes_run import run_osm, settings, shapes_record

from osm_lightning.weights.sharded import MARKER

pytestmark = pytest.mark.cluster

STRATEGIES = ("ddp", "deepspeed_zero2", "deepspeed_zero3", "fsdp2")
STEPS = 6
LORA = [
    "--model.language.lora",
    "{rank: 8}",
    "--model.qformer.lora",
    "{rank: 8, targets: [query, key, value, output, inner]}",
]
NUM_PHOTOS = 5
"""Odd, so that one of two ranks has nothing to name in the last round."""


def osm(*words: str | Path) -> str:
    """Runs the command and returns what it printed."""
    done = run_osm(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def on_two_ranks(strategy: str) -> list[str]:
    return ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", strategy]


def scores(run: Path) -> list[dict]:
    return json.loads((run / "scores.json").read_text())["scores"]


def step(run: Path) -> int:
    return json.loads((run / "scores.json").read_text())["step"]


def val_loss(run: Path) -> float:
    """Of the last validation; after a few steps all names are wrong, and scores would say nothing."""
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["val/loss/shapes"]) for row in csv.DictReader(file) if row["val/loss/shapes"]][-1]


def names(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words of the command for images of shapes, with a PNG per mask."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "images").mkdir()
    for number in range(NUM_PHOTOS):
        record = shapes_record(f"{number:02}", 100 + number, 2)
        record.image().save(folder / "images" / f"{record.key}.png")
        (folder / "masks" / record.key).mkdir(parents=True)
        for index, segment in enumerate(record.segments):
            mask = Image.fromarray(record.mask(index).astype(np.uint8) * 255)
            mask.save(folder / "masks" / record.key / f"{segment.id}.png")
    return ["--images", str(folder / "images"), "--masks", str(folder / "masks"), "--modes", "agnostic,shapes"]


@pytest.fixture(scope="module", params=["plain", "adapted"])
def alone(
    request: pytest.FixtureRequest, shapes: Path, photos: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of one process, long enough that names say what is in the mask, and what it names; also with adapters."""
    folder = tmp_path_factory.mktemp("alone")
    adapters = LORA if request.param == "adapted" else []
    osm("fit", *settings(shapes), *adapters, "--run", folder)
    osm("predict", "--ckpt", folder / "checkpoints" / "last.ckpt", *photos, "--out", folder / "named")
    assert all(row["acc"] > 0.8 for row in scores(folder)), "it has learnt too little to tell names apart"
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scores_are_those_of_one_process(strategy: str, alone: Path, tmp_path: Path) -> None:
    ckpt = ["--ckpt", alone / "checkpoints" / "last.ckpt"]
    said = osm("validate", *ckpt, *on_two_ranks(strategy), "--run", tmp_path)
    assert said.count("scores: ") == 1, "every rank says it"
    assert scores(tmp_path) == scores(alone)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_names_are_those_of_one_process(strategy: str, alone: Path, photos: list[str], tmp_path: Path) -> None:
    ckpt = ["--ckpt", alone / "checkpoints" / "last.ckpt"]
    said = osm("predict", *ckpt, *photos, *on_two_ranks(strategy), "--out", tmp_path / "named")
    assert said.count(f"named the masks of {NUM_PHOTOS} images") == 1, "every rank says it"
    found, wanted = names(tmp_path / "named"), names(alone / "named")
    assert len(found) == 3 * NUM_PHOTOS
    assert found == wanted


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_goes_on_and_its_checkpoint_is_used_everywhere(
    strategy: str, shapes: Path, photos: list[str], tmp_path: Path
) -> None:
    run, last = tmp_path / "run", tmp_path / "run" / "checkpoints" / "last.ckpt"
    short = ["--data.masks_per_epoch", str(2 * 8 * STEPS), "--data.num_workers", "0"]
    osm("fit", *settings(shapes), *short, *on_two_ranks(strategy), "--run", run)
    assert step(run) == STEPS
    assert last.is_dir() == (strategy != "ddp")
    # The config comes from the checkpoint, strategy included.
    osm("fit", "--ckpt", last, "--trainer.max_epochs", "2", "--run", run)
    assert step(run) == 2 * STEPS
    osm("validate", "--ckpt", last, *on_two_ranks(strategy), "--run", tmp_path / "again")
    assert val_loss(tmp_path / "again") == pytest.approx(val_loss(run), rel=1e-6)
    osm("weights", "consolidate", "--ckpt", last, "--out", tmp_path / "one.ckpt")
    osm("validate", "--ckpt", tmp_path / "one.ckpt", "--run", tmp_path / "one")
    assert scores(tmp_path / "one") == scores(run)  # val/loss of two ranks is that of rank 0's images
    if last.is_dir():
        (last / MARKER).unlink()
        words = ["predict", "--ckpt", last, *photos]
        refused = run_osm(*words, "--out", tmp_path / "refused")
        assert refused.returncode == 2
        assert "--trust-checkpoint" in refused.stderr
        osm(*words, "--trust-checkpoint", "--out", tmp_path / "trusted")
        osm("predict", "--ckpt", tmp_path / "one.ckpt", *photos, "--out", tmp_path / "named")
        assert names(tmp_path / "trusted") == names(tmp_path / "named")
