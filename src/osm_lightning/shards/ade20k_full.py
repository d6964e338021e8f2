"""A-847 from ADE20K's full release (ADE20K_2021_17_01): the map of classes beside each image.

In `*_seg.png` a class's index is red // 10 * 256 + green, counted from 1 as `name_ndx` in the images' JSONs; blue tells
objects apart and is not used. The 847 classes are those of Mask2Former's and FC-CLIP's
prepare_ade20k_full_sem_seg.py; others are no class. Those scripts also shrink images to 512 px on their shorter side;
here images and maps keep their size.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path

from osm_lightning.record import Segment
from osm_lightning.shards.ade20k_challenge import FOLDERS
from osm_lightning.shards.conversion import RawSplit
from osm_lightning.shards.id_maps import IdMap, MappedImage, existing_folders, raw_split, read_png
from osm_lightning.shards.plain_pickle import PickledArray, load_plain
from osm_lightning.shards.source import Findings
from osm_lightning.vocabulary import Vocabulary

INDEX_FILE = "index_ade20k.pkl"
MAX_INDEX_BYTES = 1_000_000_000
"""Its counts of every class in every image make it large."""

_IMAGE_ENDING = ".jpg"
_MAP_ENDING = "_seg.png"
_UNCHECKED = "class numbers not compared with the download's own"


def read(src: Path, split: str, vocabulary: Vocabulary) -> RawSplit:
    """Lists a split's images and maps, and compares the names of the classes. No picture is opened yet.

    Args:
        src: the folder ADE20K_2021_17_01, with `images/ADE` in it.
        split: `train` or `val`.
        vocabulary: the 847 classes.

    Raises:
        ValueError: a folder is missing, there are no images, or the download numbers its classes otherwise.
    """
    archive = "the archive of ADE20K's full release, 2021_17_01"
    (folder,) = existing_folders(src, {f"images/ADE/{FOLDERS.get(split, split)}": archive})
    notes = Findings()
    _compare_names(src / INDEX_FILE, vocabulary, notes)
    stems = sorted(set(_stems(folder)), key=lambda stem: (stem.name, stem))
    return raw_split(folder, (_image(stem) for stem in stems), notes)


@cache
def index_of_class() -> Mapping[int, int]:
    """From a class of A-847 to its index in ADE20K's full list: the column `other_id` of the vocabulary."""
    table = (files("osm_lightning") / "vocabularies" / "a847.tsv").read_text(encoding="utf-8")
    rows = csv.DictReader(table.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    return {int(row["id"]): int(row["other_id"]) for row in rows}


def _stems(folder: Path) -> Iterator[Path]:
    """Images below a folder, without ending; from either file, so that a missing partner is found."""
    for parent, subfolders, names in os.walk(folder):
        # Each image has a folder of its objects' masks, which hold thirty times as many files and are not needed.
        subfolders[:] = [name for name in subfolders if not name.startswith("ADE_")]
        for name in names:
            for ending in (_IMAGE_ENDING, _MAP_ENDING):
                if name.startswith("ADE_") and name.endswith(ending):
                    yield Path(parent, name.removesuffix(ending))


def _image(stem: Path) -> MappedImage:
    image_path, map_path = (stem.with_name(stem.name + ending) for ending in (_IMAGE_ENDING, _MAP_ENDING))
    return MappedImage(image_path, (map_path,), _read_map)


@cache
def _segments() -> Mapping[int, Segment]:
    """From an index in the full list to a segment, for the classes of A-847."""
    return {index: Segment(id=str(class_id), class_id=class_id) for class_id, index in index_of_class().items()}


def _read_map(path: Path) -> IdMap:
    rgb = read_png(path, "8-bit RGB")
    return IdMap(rgb[..., 0] // 10 * 256 + rgb[..., 1], _segments())


def _compare_names(path: Path, vocabulary: Vocabulary, notes: Findings) -> None:
    """Notes the classes that the release's index calls by no name of the vocabulary.

    Raises:
        ValueError: most are: the release counts its classes in another order.
    """
    if not path.is_file():
        notes.add(_UNCHECKED, f"{path} is not there")
        return
    try:
        theirs = _names_of_index(load_plain(path, MAX_INDEX_BYTES))
    except (OSError, ValueError) as error:
        notes.add(_UNCHECKED, str(error))
        return
    different = Findings()
    for class_id, index in index_of_class().items():
        name = theirs[index - 1] if index <= len(theirs) else None
        ours = {ours.lower() for ours in vocabulary.by_id[class_id].names}
        if not isinstance(name, str) or ours.isdisjoint(part.strip().lower() for part in name.split(",")):
            kind = "classes that ADE20K calls by other names"
            different.add(kind, f"{index} is {name!r:.60}, here {vocabulary.by_id[class_id].names[0]!r}")
    if different.counts.total() > len(vocabulary) / 2:
        raise ValueError(
            f"{path} numbers its classes otherwise than release 2021_17_01 ({different.lines()[0]}). A-847 is made of "
            "that release: download it."
        )
    notes.merge(different)


def _names_of_index(content: object) -> list[object]:
    """Names of all classes, in order, out of the index: a dict of lists and arrays."""
    names = content.get("objectnames") if isinstance(content, dict) else None
    if isinstance(names, PickledArray):
        names = names.texts()
    if not isinstance(names, list):
        raise ValueError("the index has no list objectnames")
    return names
