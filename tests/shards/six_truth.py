"""COCO's images as another dataset would annotate them: which of its classes each region has, and which masks follow.

A COCO class becomes the class of another dataset with which it shares most names, so that one and the same region is a
"tv" in COCO and a "television receiver" in ADE20K: the datasets contradict each other as the real ones do. All masks
come from COCO's own PNGs; nothing here uses the project's readers. `six_layouts.py` writes the files that hold them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from osm_lightning.vocabulary import Class, load_vocabulary

DATASETS = ("coco", "ade20k", "cityscapes", "lvis", "a847", "pc459")
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Region:
    """One mask that a reader must give."""

    class_id: int
    iscrowd: bool
    mask: NDArray[np.bool_]
    """bool[H, W]."""


@dataclass(frozen=True)
class CocoImage:
    """One image of COCO's panoptic layout."""

    split: str
    src: Path
    row: Mapping[str, Any]
    segments: Sequence[Mapping[str, Any]]

    @property
    def id(self) -> int:
        return int(self.row["id"])

    @property
    def jpeg(self) -> Path:
        return self.src / f"{self.split}2017" / self.row["file_name"]

    @property
    def png(self) -> Path:
        return self.src / f"panoptic_{self.split}2017" / f"{self.jpeg.stem}.png"

    def segment_ids(self) -> NDArray[np.int64]:
        """int64[H, W], COCO's segment id of each pixel; 0 is none."""
        with Image.open(self.png) as png:
            return np.asarray(png.convert("RGB")).astype(np.int64) @ np.array([1, 256, 256**2])

    def paint(self, value_of: Callable[[Mapping[str, Any]], int]) -> NDArray[np.int64]:
        """int64[H, W], a value for each segment; 0 where COCO has none."""
        ids = self.segment_ids()
        values = np.zeros_like(ids)
        for segment in self.segments:
            values[ids == segment["id"]] = value_of(segment)
        return values


def read_coco(src: Path, limit: int | None = None) -> list[CocoImage]:
    """Images of both splits in the order of their ids; with a limit so many of each, images with crowds first."""
    images = []
    for split in SPLITS:
        content = json.loads((src / f"annotations/panoptic_{split}2017.json").read_text())
        rows = {row["id"]: row for row in content["images"]}
        found = [CocoImage(split, src, rows[a["image_id"]], a["segments_info"]) for a in content["annotations"]]
        found.sort(key=lambda image: (not any(segment["iscrowd"] for segment in image.segments), image.id))
        images += sorted(found[:limit], key=lambda image: image.id)
    return images


@cache
def counterparts(dataset: str) -> Mapping[int, Class]:
    """From COCO class id to the dataset's class that shares most names with it.

    Among equals the same first name goes before a first name that COCO has too, before the lowest id.
    """
    coco, vocabulary = load_vocabulary("coco"), load_vocabulary(dataset)
    if dataset == "coco":
        return coco.by_id
    found = {}
    for first, names, coco_id in ((entry.names[0], set(entry.names), entry.id) for entry in coco):
        likeness = {
            entry: (len(names.intersection(entry.names)), entry.names[0] == first, entry.names[0] in names, -entry.id)
            for entry in vocabulary
        }
        best = max(likeness, key=likeness.__getitem__)
        if names.intersection(best.names):
            found[coco_id] = best
    return found


def expected(image: CocoImage, dataset: str) -> list[Region]:
    """What a reader must give for the image, from COCO's own PNG.

    COCO and LVIS keep every region apart, A-847 and PC-459 none (one mask for each class), ADE20K and Cityscapes those
    of things. Crowds: COCO keeps them, Cityscapes has one group for each class, ADE20K and LVIS have none.
    """
    ids = image.segment_ids()
    regions: dict[Hashable, Region] = {}
    for segment in image.segments:
        entry = counterparts(dataset).get(segment["category_id"])
        if entry is None:
            continue
        apart = is_apart(dataset, entry)
        iscrowd = apart and bool(segment["iscrowd"])
        if iscrowd and dataset in ("ade20k", "lvis"):
            continue
        alone = apart and not (iscrowd and dataset == "cityscapes")
        identity = segment["id"] if alone else (entry.id, iscrowd)
        mask = ids == segment["id"]
        regions[identity] = Region(entry.id, iscrowd, mask | regions[identity].mask if identity in regions else mask)
    return list(regions.values())


def is_apart(dataset: str, entry: Class) -> bool:
    """Whether the dataset tells regions of the class apart."""
    return dataset in ("coco", "lvis") or (dataset in ("ade20k", "cityscapes") and entry.kind == "thing")


def image_id_of(name: str) -> int:
    """COCO's image id in a file name or key of any of the datasets."""
    digits = re.search(r"\d{6,}", name)
    assert digits is not None, f"{name} is no name that write_six gives"
    return int(digits.group())
