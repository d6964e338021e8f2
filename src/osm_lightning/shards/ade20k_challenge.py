"""ADE20K panoptic from the downloads of its challenge: a map of 150 classes and a map of instances make one.

Stuff is what the semantic map says; things are the instances, which lie above it. A thing's class without an instance
is no segment. So the segments are those of Mask2Former's prepare_ade20k_pan_seg.py, but for their ids, which there are
colours drawn at random. Instances have 100 categories of their own: the 150 classes' things, in their order
(ade20k_instance_catid_mapping.txt in the same place).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from osm_lightning.record import Segment
from osm_lightning.shards.conversion import RawSplit
from osm_lightning.shards.id_maps import IdMap, MappedImage, existing_folders, ids_in, raw_split, read_png
from osm_lightning.vocabulary import Vocabulary

FOLDERS = {"train": "training", "val": "validation"}
"""From a split to the name of its folders; these names are taken for splits as well."""

_FIRST_INSTANCE_ID = 256
"""Instances follow the values of an 8-bit map in the ids of an image."""


def read(src: Path, split: str, vocabulary: Vocabulary) -> RawSplit:
    """Lists a split of ADEChallengeData2016 with its instances. No picture is opened yet.

    Args:
        src: the folder ADEChallengeData2016, with `images`, `annotations` and `annotations_instance` in it.
        split: `train` or `val`.
        vocabulary: the 150 classes, whose ids are the map's values less 1.

    Raises:
        ValueError: a folder is missing, or there are no images.
    """
    folder = FOLDERS.get(split, split)
    archives = {"images": "ADEChallengeData2016.zip", "annotations": "ADEChallengeData2016.zip"}
    archives["annotations_instance"] = "annotations_instance.tar of ChallengeData2017"
    images, classes, instances = existing_folders(src, {f"{path}/{folder}": name for path, name in archives.items()})
    stems = {path.stem for path in images.glob("ADE_*.jpg")}
    stems.update(path.stem for maps in (classes, instances) for path in maps.glob("ADE_*.png"))
    stuff = frozenset(entry.id for entry in vocabulary if entry.kind == "stuff")
    things = tuple(sorted(entry.id for entry in vocabulary if entry.kind == "thing"))
    read_map = partial(_read_map, stuff=stuff, things=things)
    return raw_split(
        images,
        (
            MappedImage(images / f"{stem}.jpg", (classes / f"{stem}.png", instances / f"{stem}.png"), read_map)
            for stem in sorted(stems)
        ),
    )


def _read_map(class_path: Path, instance_path: Path, *, stuff: frozenset[int], things: tuple[int, ...]) -> IdMap:
    """Lays the instances above the stuff.

    Args:
        class_path: 8-bit grey, class id + 1 of each pixel, 0 for none.
        instance_path: RGB; red is an instance's category, counted from 1, green its number in the image, 0 for none.
        stuff: class ids of stuff.
        things: class ids of things, ascending.
    """
    ids = read_png(class_path, "8-bit grey")
    red, green, _ = np.moveaxis(read_png(instance_path, "8-bit RGB"), -1, 0)
    if ids.shape != red.shape:
        raise ValueError(f"{class_path} and {instance_path} differ in height, width: {ids.shape} and {red.shape}")
    values = ids_in(ids)
    if values[-1] > len(stuff) + len(things):
        raise ValueError(f"{class_path} has a class {values[-1]}, but the challenge has {len(stuff) + len(things)}")
    segments = {value: Segment(id=str(value), class_id=value - 1) for value in values if value - 1 in stuff}
    placed = green > 0
    for code in ids_in((green * 256 + red)[placed]):
        number, category = divmod(code, 256)
        instance_id = _FIRST_INSTANCE_ID + number
        if not 1 <= category <= len(things):
            raise ValueError(f"{instance_path}: instance {number} is of category {category}, not 1 to {len(things)}")
        if instance_id in segments:
            raise ValueError(f"{instance_path}: instance {number} is of several categories")
        segments[instance_id] = Segment(id=str(instance_id), class_id=things[category - 1])
    ids[placed] = _FIRST_INSTANCE_ID + green[placed]
    return IdMap(ids, segments)
