"""Small records and shard folders for the tests of `data/`: noise pictures with rectangles for masks."""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from webdataset.writer import TarWriter

from osm_lightning.record import Record, Segment, box_of, encode, encode_segment_map
from osm_lightning.rle import encode_rle
from osm_lightning.shard_index import ShardIndex, ShardInfo, SplitInfo, read_index, write_index

HEIGHT, WIDTH = 24, 32
PERSON, CAR, DOG = 1, 3, 18
"""Classes of the shipped COCO vocabulary; their first names are the names of these constants."""


def rectangle(x0: int, y0: int, x1: int, y1: int, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.bool_]:
    """bool[H, W] that is true inside; the ends are not included."""
    mask = np.zeros((height, width), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


LEFT, RIGHT, SMALL = rectangle(0, 0, 16, 24), rectangle(16, 0, 32, 12), rectangle(20, 16, 22, 18)


def noise_image(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> Image.Image:
    """RGB noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def make_record(
    key: str = "a",
    masks: Sequence[NDArray[np.bool_]] = (LEFT, RIGHT, SMALL),
    segments: Sequence[Segment] = (Segment("s1", PERSON), Segment("s2", CAR), Segment("s3", DOG)),
    *,
    as_rle: bool = False,
) -> Record:
    """A record of a noise picture. Masks must not overlap unless they become RLEs."""
    height, width = masks[0].shape if masks else (HEIGHT, WIDTH)
    filled = [
        replace(
            segment,
            area_px=int(mask.sum()),
            bbox_xywh_px=box_of(mask),
            rle=encode_rle(mask) if as_rle else None,
        )
        for segment, mask in zip(segments, masks, strict=True)
    ]
    segment_map = np.zeros((height, width), dtype=np.uint16)
    for position, mask in enumerate(masks, start=1):
        segment_map[mask] = position
    return Record(
        key=key,
        image_bytes=png(noise_image(height, width, seed=sum(key.encode()))),
        image_ending="png",
        height_px=height,
        width_px=width,
        segments=tuple(filled),
        segment_map_png=None if as_rle else encode_segment_map(segment_map),
    )


def write_split(
    folder: Path, shards: Sequence[Sequence[Record]], split: str = "train", vocabulary: str | None = "coco"
) -> Path:
    """Writes one tar for each list of records and adds the split to the folder's index."""
    folder.mkdir(exist_ok=True)
    infos = []
    for number, shard in enumerate(shards):
        path = folder / f"{split}-{number:05d}.tar"
        with path.open("wb") as file, TarWriter(file, compress=False, encoder=False) as tar:
            for record in shard:
                tar.write({"__key__": record.key, **encode(record)})
        num_masks = sum(len(record.segments) for record in shard)
        infos.append(ShardInfo(path.name, "0" * 64, path.stat().st_size, len(shard), num_masks))
    others = read_index(folder).splits if (folder / "index.json").exists() else {}
    classes = Counter(
        class_id
        for shard in shards
        for record in shard
        for class_id in {segment.class_id for segment in record.segments if segment.class_id is not None}
    )
    info = SplitInfo(tuple(infos), {}, images_per_class=classes)
    write_index(folder, ShardIndex("mine", vocabulary, {**others, split: info}))
    return folder


def write_sizes(folder: Path, sizes: Sequence[int], split: str = "train") -> Path:
    """Writes shards of these many records, with keys `SPLIT-0`, `SPLIT-1` and so on over all shards."""
    keys = iter(range(sum(sizes)))
    return write_split(folder, [[make_record(f"{split}-{next(keys)}") for _ in range(size)] for size in sizes], split)
