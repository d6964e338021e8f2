"""Cityscapes panoptic from gtFine's instance maps, with the segments and ids of createPanopticImgs (cityscapesScripts).

An id from 1000 is a single object, 1000 times its label and a number; an id below is the label itself: stuff, or a
group of things that nobody told apart, which is a crowd. Labels that are not evaluated are no segments.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from osm_lightning.record import Segment
from osm_lightning.shards.conversion import RawSplit
from osm_lightning.shards.id_maps import IdMap, MappedImage, existing_folders, ids_in, raw_split, read_png
from osm_lightning.vocabulary import Vocabulary

_IMAGE_ENDING = "_leftImg8bit.png"
_MAP_ENDING = "_gtFine_instanceIds.png"
_LABEL_UNIT = 1000
_MAX_LABEL = 33
"""Bicycle; labels.py of cityscapesScripts counts on from 0 without a gap."""


def read(src: Path, split: str, vocabulary: Vocabulary) -> RawSplit:
    """Lists a split's images and instance maps, city by city. No picture is opened yet.

    Args:
        src: the folder that holds `gtFine` and `leftImg8bit`.
        split: `train` or `val`.
        vocabulary: the evaluated labels, under Cityscapes' own ids; its things are the labels that have instances.

    Raises:
        ValueError: a folder is missing, or there are no images.
    """
    archives = {
        f"leftImg8bit/{split}": "leftImg8bit_trainvaltest.zip",
        f"gtFine/{split}": "gtFine_trainvaltest.zip",
    }
    images, maps = existing_folders(src, archives)
    names = set()  # CITY/CITY_000000_000019, from either side, so that a missing partner is found
    for folder, ending in ((images, _IMAGE_ENDING), (maps, _MAP_ENDING)):
        for path in folder.glob(f"*/[!.]*{ending}"):
            names.add(path.relative_to(folder).as_posix().removesuffix(ending))
    read_map = partial(_read_map, is_thing={entry.id: entry.kind == "thing" for entry in vocabulary})
    return raw_split(
        maps,
        (
            MappedImage(images / f"{name}{_IMAGE_ENDING}", (maps / f"{name}{_MAP_ENDING}",), read_map)
            for name in sorted(names)
        ),
    )


def _read_map(path: Path, *, is_thing: dict[int, bool]) -> IdMap:
    """Reads one instance map; `is_thing` has the evaluated labels."""
    ids = read_png(path, "16-bit grey")
    segments = {}
    for segment_id in ids_in(ids):
        is_single = segment_id >= _LABEL_UNIT
        label = segment_id // _LABEL_UNIT if is_single else segment_id
        if label > _MAX_LABEL:
            raise ValueError(f"{path} has an id {segment_id}, but Cityscapes has no label {label}")
        if label in is_thing:
            iscrowd = is_thing[label] and not is_single
            segments[segment_id] = Segment(id=str(segment_id), class_id=label, iscrowd=iscrowd)
    return IdMap(ids, segments)
