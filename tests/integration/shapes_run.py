"""What the tests of the command share: a data set of two shapes, made on the spot, and the settings of a small run.

Boxes and round lights on a wall: few enough, and with names of one token, that the tiny model learns to name them in
seconds. Scores then say something: a model that doesn't see the masks is right in a third of them at best.
"""

from __future__ import annotations

import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

import osm_lightning.cli  # noqa: F401  Lightning keeps the stderr that it is first imported under: let it not be a test's
from osm_lightning.record import Record, Segment, box_of, encode_segment_map
from osm_lightning.shards.write import ShardWriter

ROOT = Path(__file__).parents[2]
OSM = Path(sys.executable).parent / "osm"
CLASSES = {1: "box", 2: "light", 3: "wall"}
STEPS = 60
QUOTA = 8


def run_osm(*words: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs the installed command, on one thread so that sums are added in one order."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    argv = [str(OSM), *map(str, words)]
    return subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def settings(data: Path) -> list[str]:
    """Words of the command for the tiny model on the shapes in a folder, with paths that any working folder finds."""
    overlay = data / "shapes.yaml"
    overlay.write_text(
        f"model:\n  modes: [shapes]\ndata:\n  sources:\n    shapes: {{shards: {data}, quota: {QUOTA}}}\n",
        encoding="utf-8",
    )
    stack = [ROOT / "configs" / name for name in ("joint.yaml", "model/tiny.yaml", "trainer/cpu.yaml")]
    words = [word for path in (*stack, overlay) for word in ("--config", str(path))]
    words += ["--trainer.precision", "32", "--trainer.accumulate_grad_batches", "1"]
    # Random embeddings of the usual spread leave all logits near zero; spread ones let the frozen LLM say something.
    words += ["--model.language.architecture.initializer_range", "0.2", "--model.qformer.dropout", "0"]
    words += ["--data.masks_per_epoch", str(STEPS * QUOTA), "--trainer.log_every_n_steps", "6"]
    return [*words, "--model.optim.lr", "5e-3", "--model.optim.warmup_steps", "5", "--model.max_new_tokens", "5"]


def write_shapes(folder: Path, class_of_lights: int = 2, num_train: int = 16, num_val: int = 8) -> None:
    """Writes shards of training and validation images, one of each split, with their vocabulary.

    Args:
        folder: shard folder.
        class_of_lights: class id that lights are given in the training split.
        num_train: training images.
        num_val: validation images.
    """
    folder.mkdir(parents=True)
    rows = "".join(f"{class_id}\tthing\t{name}\n" for class_id, name in CLASSES.items())
    (folder / "vocabulary.tsv").write_text(f"id\tkind\tnames\n{rows}", encoding="utf-8")
    for split, num_images, lights in (("train", num_train, class_of_lights), ("val", num_val, 2)):
        with ShardWriter(folder, dataset="shapes", split=split, vocabulary="vocabulary.tsv") as writer:
            for number in range(num_images):
                writer.write(shapes_record(f"{split}-{number:02}", number, lights))


def shapes_record(key: str, seed: int, class_of_lights: int) -> Record:
    """One image of 96 x 72 px: a wall, and a box and a light somewhere on it."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:72, :96]
    segment_map = np.ones((72, 96), np.uint16)
    left, top = rng.integers(2, 20, size=2)
    segment_map[top : top + 30, left : left + 24] = 2
    segment_map[(x - rng.integers(66, 76)) ** 2 + (y - rng.integers(20, 50)) ** 2 < 15**2] = 3
    colours = np.array([(0, 0, 0), (90, 120, 90), (220, 60, 50), (60, 80, 230)])
    pixels = colours[segment_map] + rng.integers(-20, 21, size=(72, 96, 3))
    data = BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(data, "PNG")
    segments = tuple(
        Segment(str(place), class_id, area_px=int(mask.sum()), bbox_xywh_px=box_of(mask))
        for place, class_id in enumerate((3, 1, class_of_lights), start=1)
        for mask in [segment_map == place]
    )
    return Record(key, data.getvalue(), "png", 72, 96, segments, encode_segment_map(segment_map))
