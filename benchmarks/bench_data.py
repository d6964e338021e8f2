"""Images and masks per second of the training stream, beside what any stream must do and what the released one does.

    python benchmarks/bench_data.py --shards data_shards/coco_mini --split train2017      (make bench: shipped scenes)

Everything runs in turn on one core, in one process, `--rounds` times over; the table shows medians. Compared are

* *bare*: reads the tar, decodes the image, resizes it to the input's size with the fastest call we know (OpenCV,
  bilinear), and forgets it. Also with bicubic interpolation, which training uses where it enlarges.
* *released order*: decodes image and map, resizes both whole, crops, makes one full-size mask and its box, tokenises:
  one mask per image.
* *stream*: what training is given: batches of images, patch shares, context boxes and text, with K masks per image.

Where the stream's time goes is shown for K = 1.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image

from osm_lightning.data import geometry, mixture, sample
from osm_lightning.data.coverage import Masks
from osm_lightning.data.module import OSMData, SourceConfig
from osm_lightning.data.stream import ShardSet
from osm_lightning.data.text import TextCodec
from osm_lightning.data.worker import keep_freed_memory
from osm_lightning.instructions import MASK_QUESTIONS
from osm_lightning.record import Record

SIDES = {1120: 100, 448: 16}
"""From the input's side to the smallest mask, both in pixels."""
MASKS = 32
"""Masks of a batch."""
PATCH_SIZE_PX = 14


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", default="data_shards/scenes", help="shard folder (default: %(default)s)")
    parser.add_argument("--split", default="train", help="its split (default: %(default)s)")
    parser.add_argument("--images", type=int, default=200, help="images of each round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds, after one that is not")
    args = parser.parse_args()
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    keep_freed_memory()  # as in the worker that this stands for
    print(f"{args.shards}, {args.split}: {args.images} images per round, one core, medians of {args.rounds} rounds")
    for side_px, min_mask_px in SIDES.items():
        measure(side_px, min_mask_px, args)


def measure(side_px: int, min_mask_px: int, args: argparse.Namespace) -> None:
    """Prints the rows of one input size."""
    shards = ShardSet(args.shards, args.split)
    streams = {k: batches(args.shards, args.split, side_px, min_mask_px, k) for k in (1, 8)}
    runs: dict[str, Callable[[], tuple[int, int]]] = {
        "bare": lambda: bare(shards, args.images, side_px, cv2.INTER_LINEAR),
        "bare, bicubic": lambda: bare(shards, args.images, side_px, cv2.INTER_CUBIC),
        "released order": lambda: released_order(shards, args.images, side_px),
        "stream, K = 1": lambda: drawn(streams[1], args.images),
        "stream, K = 8": lambda: drawn(streams[8], args.images),
    }
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(args.rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            num_images, num_masks = run()
            passed_s = time.perf_counter() - start
            if number:
                rates[name].append((num_images / passed_s, num_masks / passed_s))
    print(f"\n{side_px} px{'':10}images/s   masks/s")
    images = {name: median(rate for rate, _ in rows) for name, rows in rates.items()}
    masks = {name: median(rate for _, rate in rows) for name, rows in rates.items()}
    for name in runs:
        print(f"{name:16}{images[name]:10.1f}{masks[name]:10.1f}")
    for name in ("bare", "bare, bicubic"):
        print(f"K = 1 against {name}: {images['stream, K = 1'] / images[name]:.0%} of its images/s")
    ratio = masks["stream, K = 8"] / masks["released order"]
    print(f"K = 8 against the released order: {ratio:.1f}x its masks/s")
    print("where the stream's time goes, K = 1:", where(streams[1], args.images))


def bare(shards: ShardSet, num_images: int, side_px: int, interpolation: int) -> tuple[int, int]:
    """Reads, decodes, resizes."""
    for number in range(num_images):
        record = shards[number % len(shards)]
        if record.image_ending == "jpg":
            pixels = simplejpeg.decode_jpeg(record.image_bytes)
        else:
            pixels = cv2.imdecode(np.frombuffer(record.image_bytes, np.uint8), cv2.IMREAD_COLOR)
        factor = side_px / max(pixels.shape)
        size = (round(pixels.shape[1] * factor), round(pixels.shape[0] * factor))
        cv2.resize(pixels, size, interpolation=interpolation)
    return num_images, 0


def released_order(shards: ShardSet, num_images: int, side_px: int) -> tuple[int, int]:
    """The released pipeline's order of work: everything at full size before anything is left out."""
    rng = np.random.default_rng(0)
    codec = TextCodec("builtin:512", "builtin:512")
    for number in range(num_images):
        record = shards[number % len(shards)]
        image, segment_map = record.image(), full_map(record)
        factor = side_px * rng.uniform(0.5, 1.5) / max(image.size)
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        image = image.resize(size, Image.Resampling.BICUBIC)
        segment_map = segment_map.resize(size, Image.Resampling.NEAREST)
        x, y = (int(rng.integers(0, max(0, length - side_px) + 1)) for length in size)
        box = (x, y, min(x + side_px, size[0]), min(y + side_px, size[1]))
        canvas = Image.new("RGB", (side_px, side_px))
        canvas.paste(image.crop(box))
        pixels = torch.from_numpy(np.asarray(canvas).transpose(2, 0, 1).copy())
        ids = np.zeros((side_px, side_px), np.int32)
        ids[: box[3] - y, : box[2] - x] = np.asarray(segment_map.crop(box))
        present = [segment_id for segment_id in np.unique(ids) if segment_id]
        mask = torch.from_numpy(ids == rng.choice(present or [0]))
        rows, columns = torch.where(mask)
        _ = rows.min(), rows.max(), columns.min(), columns.max(), pixels.float()
        codec._encode(MASK_QUESTIONS[int(rng.integers(len(MASK_QUESTIONS)))], "person")
    return num_images, num_images


def full_map(record: Record) -> Image.Image:
    """All segments of a record in one 32-bit picture, the later ones on top."""
    ids = np.zeros((record.height_px, record.width_px), np.int32)
    segment_map = record.segment_map()
    for index in range(len(record.segments)):
        ids[record.mask(index, segment_map)] = index + 1
    return Image.fromarray(ids)


def batches(shards: str, split: str, side_px: int, min_mask_px: int, k: int) -> Iterator[Any]:
    """Training batches without end."""
    data = OSMData(
        {"data": SourceConfig(shards, train=split, quota=MASKS)},
        "builtin:512",
        "builtin:512",
        modes=["data"],
        image_size_px=side_px,
        patch_size_px=PATCH_SIZE_PX,
        masks_per_image=k,
        min_mask_px=min_mask_px,
        num_workers=0,
    )
    return iter(data.train_dataloader())


def drawn(stream: Iterator[Any], num_images: int) -> tuple[int, int]:
    """Takes batches until there are enough images."""
    images = masks = 0
    while images < num_images:
        batch = next(stream)
        images, masks = images + batch.num_images, masks + batch.num_masks
    return images, masks


PARTS: dict[str, list[tuple[Any, str]]] = {
    "read": [(ShardSet, "read")],
    "decode image": [(Record, "pixels")],
    "resize image": [(geometry, "place_quickly")],
    "decode map": [(Masks, "__init__")],
    "masks": [(Masks, "place"), (Masks, "patches")],
    "text, tensors": [(sample, "_assemble")],
    "collate": [(mixture, "collate")],
}


def where(stream: Iterator[Any], num_images: int) -> str:
    """Share of every part in the stream's time."""
    times: dict[str, float] = {}
    with ExitStack() as stack:
        for part, functions in PARTS.items():
            for owner, name in functions:
                stack.enter_context(patch.object(owner, name, timed(getattr(owner, name), times, part)))
        start = time.perf_counter()
        num_images, _ = drawn(stream, num_images)
        total = time.perf_counter() - start
    times["other"] = total - sum(times.values())
    return ", ".join(f"{part} {seconds / num_images * 1e3:.2f} ms" for part, seconds in times.items())


def timed(function: Callable[..., Any], times: dict[str, float], part: str) -> Callable[..., Any]:
    """A function that adds its time to a part."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with clock(times, part):
            return function(*args, **kwargs)

    return run


@contextmanager
def clock(times: dict[str, float], part: str) -> Iterator[None]:
    """Adds the block's seconds to a part."""
    start = time.perf_counter()
    yield
    times[part] = times.get(part, 0.0) + time.perf_counter() - start


if __name__ == "__main__":
    main()
