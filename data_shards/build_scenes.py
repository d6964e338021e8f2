"""Builds the small set that ships with the project: scenes of drawn objects with exact masks and plain names.

    pip install resvg_py==0.5.0        # draws SVG; npm must be on PATH, too
    python data_shards/build_scenes.py --out data_shards/scenes --seed 0

Emoji of several artists are strewn over painted backgrounds. The artist of the val scenes drew nothing in the train
scenes, so that val measures recognition, not memory. The classes are those of `scenes/vocabulary.tsv`, whose column
`drawings` gives the CLDR names of the emoji that show a class. The same seed gives the same bytes under the same
versions of NumPy, Pillow and resvg. What the set is for, and what not: `scenes/CARD.md`.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track
from scene_drawings import Drawing, read_drawings

from osm_lightning.record import Record, Segment, box_of, encode_segment_map
from osm_lightning.shards.write import ShardWriter

VOCABULARY = Path(__file__).parent / "scenes" / "vocabulary.tsv"
SPLITS = {"train": (500, ("noto", "noto-v1", "twemoji", "emojione")), "val": (140, ("fluent",))}
"""Scenes of each split, and the artists' sets that it shows."""
SHARD_BYTES = 1_000_000
"""Small, so that even this set has shards to share out among ranks and workers."""

SCENE_SIZES_PX = ((448, 336), (336, 448), (448, 448), (448, 300), (400, 400))
OBJECTS_PER_SCENE = (4, 9)
OBJECT_SIDE_PX = (48.0, 200.0)
MAX_TILT_DEGREES = 20.0
MIN_VISIBLE_SHARE = 0.5
"""Less of an object could not be named."""
MIN_VISIBLE_PX = 400
PLACING_TRIES = 40
WEBP_QUALITY = 78


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture and what is to be seen in it."""

    picture: Image.Image
    segment_map: NDArray[np.uint16]
    """uint16[H, W], position of each pixel's drawing from 1; 0 is background."""
    placed: tuple[Drawing, ...]
    left_over: tuple[Drawing, ...]
    """Drawings for which there was no room."""


def paint_background(width_px: int, height_px: int, rng: np.random.Generator) -> Image.Image:
    """A gradient between two colours, clouded by smooth noise and crossed by faint stripes, checks or rings."""
    y, x = np.mgrid[0:height_px, 0:width_px].astype(np.float32) / max(width_px, height_px)
    angle = rng.uniform(0, 2 * np.pi)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    ramp = (along - along.min()) / np.ptp(along)
    first, second = rng.uniform(30, 235, (2, 3))
    colours = first + ramp[..., None] * (second - first)

    coarse = Image.fromarray(rng.normal(size=(7, 7)).astype(np.float32))
    clouds = np.asarray(coarse.resize((width_px, height_px), Image.Resampling.BICUBIC)) * rng.uniform(4, 22)

    frequency = 2 * np.pi * rng.uniform(4, 14)
    waves = {
        "none": np.zeros_like(x),
        "stripes": np.sin(frequency * along),
        "checks": np.sin(frequency * along) * np.sin(frequency * across),
        "rings": np.sin(frequency * np.hypot(x - rng.uniform(0, 1), y - rng.uniform(0, 1))),
    }[str(rng.choice(["none", "stripes", "checks", "rings"]))]
    pattern = np.clip(3 * waves, -1, 1) * rng.uniform(4, 16)
    return Image.fromarray((colours + (clouds + pattern)[..., None]).clip(0, 255).astype(np.uint8))


def pose(pixels: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A drawing flipped, tilted and shrunk at random, to a longer side that is log-uniform."""
    if rng.random() < 0.5:
        pixels = pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    tilt = rng.uniform(-MAX_TILT_DEGREES, MAX_TILT_DEGREES)
    tilted = pixels.rotate(tilt, resample=Image.Resampling.BICUBIC, expand=True)
    tilted = tilted.crop(tilted.getbbox())
    side_px = np.exp(rng.uniform(*np.log(OBJECT_SIDE_PX)))
    scale = min(side_px / max(tilted.size), 1.0)
    size_px = (max(1, round(tilted.width * scale)), max(1, round(tilted.height * scale)))
    return tilted.resize(size_px, Image.Resampling.LANCZOS)


def compose(drawings: Sequence[Drawing], rng: np.random.Generator) -> Scene:
    """Lays drawings over a background, one after the other, so that enough of each stays visible.

    A pixel belongs to the uppermost drawing that covers more than half of it.
    """
    width_px, height_px = SCENE_SIZES_PX[rng.integers(len(SCENE_SIZES_PX))]
    picture = paint_background(width_px, height_px, rng)
    segment_map = np.zeros((height_px, width_px), np.uint16)
    placed: list[Drawing] = []
    left_over: list[Drawing] = []
    least_px: list[float] = []
    for drawing in drawings:
        for _ in range(PLACING_TRIES):
            pixels = pose(drawing.pixels, rng)
            margin_x, margin_y = pixels.width // 6, pixels.height // 6  # by so much it may stick out of the picture
            x = int(rng.integers(-margin_x, width_px - pixels.width + margin_x + 1))
            y = int(rng.integers(-margin_y, height_px - pixels.height + margin_y + 1))
            alpha = Image.new("L", picture.size)
            alpha.paste(pixels.getchannel("A"), (x, y))
            tried = np.where(np.asarray(alpha) > 127, np.uint16(len(placed) + 1), segment_map)
            whole_px = np.count_nonzero(np.asarray(pixels.getchannel("A")) > 127)
            tried_least_px = [*least_px, max(MIN_VISIBLE_SHARE * whole_px, MIN_VISIBLE_PX)]
            visible_px = np.bincount(tried.ravel(), minlength=len(tried_least_px) + 1)[1:]
            if (visible_px >= tried_least_px).all():
                picture.paste(pixels, (x, y), pixels)
                segment_map, least_px = tried, tried_least_px
                placed.append(drawing)
                break
        else:
            left_over.append(drawing)
    return Scene(picture, segment_map, tuple(placed), tuple(left_over))


def to_record(key: str, scene: Scene) -> Record:
    """A scene as a record; its source says who drew each segment, in their order."""
    webp = io.BytesIO()
    scene.picture.save(webp, format="WEBP", quality=WEBP_QUALITY, method=6)
    segments = []
    for position, drawing in enumerate(scene.placed, start=1):
        mask = scene.segment_map == position
        area_px = int(np.count_nonzero(mask))
        segments.append(Segment(str(position), drawing.class_id, area_px=area_px, bbox_xywh_px=box_of(mask)))
    return Record(
        key=key,
        image_bytes=webp.getvalue(),
        image_ending="webp",
        height_px=scene.picture.height,
        width_px=scene.picture.width,
        segments=tuple(segments),
        segment_map_png=encode_segment_map(scene.segment_map),
        source={"drawings": [drawing.source for drawing in scene.placed]},
    )


def scenes(
    split: str, num_scenes: int, drawings: Mapping[int, Sequence[Drawing]], rng: np.random.Generator
) -> Iterator[Record]:
    """The scenes of a split: every class about equally often, and its drawings in turn."""
    waiting: deque[Drawing] = deque()
    turns = {class_id: int(rng.integers(len(options))) for class_id, options in drawings.items()}
    for number in range(num_scenes):
        num_objects = int(rng.integers(OBJECTS_PER_SCENE[0], OBJECTS_PER_SCENE[1] + 1))
        while len(waiting) < num_objects:
            for class_id in rng.permutation(list(drawings)).tolist():
                waiting.append(drawings[class_id][turns[class_id] % len(drawings[class_id])])
                turns[class_id] += 1
        scene = compose([waiting.popleft() for _ in range(num_objects)], rng)
        waiting.extendleft(scene.left_over)
        yield to_record(f"{split}-{number:04d}", scene)


def build(out_dir: Path, seed: int) -> None:
    """Writes both splits, the vocabulary and the index.

    Args:
        out_dir: shard folder; made where it does not exist. Splits that it has are replaced.
        seed: another seed strews the same drawings differently.
    """
    vocabulary = VOCABULARY.read_text(encoding="utf-8")
    rows = csv.DictReader(vocabulary.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    classes = {int(row["id"]): row["drawings"].split("|") for row in rows}
    for number, (split, (num_scenes, sets)) in enumerate(SPLITS.items()):
        records = scenes(split, num_scenes, read_drawings(classes, sets), np.random.default_rng([seed, number]))
        with ShardWriter(
            out_dir,
            dataset="scenes",
            split=split,
            vocabulary=VOCABULARY.name,
            max_shard_bytes=SHARD_BYTES,
            overwrite=True,
        ) as writer:
            for record in track(records, f"scenes of {split}", total=num_scenes):
                writer.write(record)
    if (out_dir / VOCABULARY.name).resolve() != VOCABULARY.resolve():
        (out_dir / VOCABULARY.name).write_text(vocabulary, encoding="utf-8")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Builds the small set that ships with the project.")
    parser.add_argument("--out", type=Path, required=True, help="shard folder to write, such as data_shards/scenes")
    parser.add_argument("--seed", type=int, default=0, help="the set that ships has the default, 0")
    arguments = parser.parse_args()
    build(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
