"""Label maps to records: one grey picture per image, whose pixels are class ids; a class in an image is one segment.

A map is read only if its pixels are certain to be ids as they were written: palettes, colours, and bits that a picture
library would stretch are refused, and so are 8-bit maps where class ids need 16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, TiffImagePlugin

from osm_lightning.datasets import ignored_ids as ignored_ids_of
from osm_lightning.picture import BROKEN_IMAGE, MAX_IMAGE_PIXELS
from osm_lightning.record import Segment
from osm_lightning.shards.conversion import RawSplit
from osm_lightning.shards.id_maps import IdMap, MappedImage, ids_in
from osm_lightning.shards.names import IMAGE_SUFFIXES, files_by_stem, sample_keys
from osm_lightning.shards.source import Findings
from osm_lightning.vocabulary import Vocabulary

MAP_SUFFIXES = frozenset({".png", ".tif", ".tiff"})
_NUM_IDS = 2**16
_MAX_8_BIT_ID = 2**8 - 1
_BITS_PER_SAMPLE, _PHOTOMETRIC, _BLACK_IS_ZERO = 258, 262, 1  # TIFF 6.0


@dataclass(frozen=True, slots=True)
class LabelMapLayout:
    """Where a dataset keeps its files, below its folder; `{split}` stands for the split's name."""

    dataset: str
    """Key of the dataset, whose ignored ids apply."""
    images: str
    """Folder of the images; `{folder}` stands for the split's name in `folders`."""
    label_maps: str
    """Folder of the label maps, which say what images the split has."""
    folders: Mapping[str, str] = field(default_factory=lambda: {"train": "training", "val": "validation"})
    """From a split to the name of its folders, where that is another."""


# prepare_ade20k_full_sem_seg.py (MaskFormer, FC-CLIP): uint16 TIFF, train ids 0-846, 65535 elsewhere; images and maps
# are scaled down to a short side of 512 px.
A847_PREPARED = LabelMapLayout("a847", "images_detectron2/{folder}", "annotations_detectron2/{folder}")

# prepare_pascal_ctx_full_sem_seg.py (ODISE, FC-CLIP): uint16 TIFF, ids 0-458, 65535 where the .mat file had 0.
PC459_PREPARED = LabelMapLayout("pc459", "images/{folder}", "annotations_ctx459/{folder}")

# prepare_pascal_context_459.py (CAT-Seg), within VOC2010 and of val only: the same TIFF.
PC459_IN_VOC = LabelMapLayout("pc459", "JPEGImages", "annotations_detectron2/pc459_{split}")


def read_split(layout: LabelMapLayout, src: Path, split: str, vocabulary: Vocabulary) -> RawSplit:
    """Reads a split of a dataset whose label maps others have prepared.

    Args:
        layout: where the files lie.
        src: the dataset's folder.
        split: name of the split.
        vocabulary: the classes that maps may hold.

    Raises:
        ValueError: see `read_label_maps`.
    """
    names = {"split": split, "folder": layout.folders.get(split, split)}
    image_folder, map_folder = (src / path.format(**names) for path in (layout.images, layout.label_maps))
    return read_label_maps(image_folder, map_folder, vocabulary, ignored_ids_of(layout.dataset))


def read_label_maps(
    image_folder: Path, map_folder: Path, vocabulary: Vocabulary, ignored_ids: Sequence[int] = ()
) -> RawSplit:
    """Pairs images and label maps that have the same path but for its ending. No picture is opened yet.

    Args:
        image_folder: folder of the images, subfolders included.
        map_folder: folder of the maps, PNG or TIFF.
        vocabulary: the classes that maps may hold.
        ignored_ids: ids that stand for no class: their pixels belong to no segment, even if the vocabulary has them.

    Returns:
        The images in the order of their names. Maps without an image are among its errors.

    Raises:
        ValueError: a folder is missing, two files differ only in their ending, or an id does not fit into 16 bits.
    """
    missing = [str(folder) for folder in (image_folder, map_folder) if not folder.is_dir()]
    if missing:
        raise ValueError(
            f"there is no folder {' and no '.join(missing)}. Check the paths, or unpack the archives there."
        )
    class_ids = tuple(sorted(vocabulary.by_id.keys() - set(ignored_ids)))
    if not class_ids or max((*class_ids, *ignored_ids)) >= _NUM_IDS or min(ignored_ids, default=0) < 0:
        raise ValueError(
            f"vocabulary {vocabulary.key} has {len(class_ids)} classes that are not ignored, with ids up to "
            f"{max(class_ids, default=0)}, and {list(ignored_ids)} are ignored; label maps need at least one class, "
            f"and hold ids from 0 to {_NUM_IDS - 1}. Number the classes anew."
        )
    errors, notes, unusable = Findings(), Findings(), Findings()
    images = files_by_stem(image_folder, IMAGE_SUFFIXES, errors)
    maps = files_by_stem(map_folder, MAP_SUFFIXES, errors)
    errors.raise_if_any(map_folder)
    for stem in maps:
        if stem not in images:
            unusable.add("label maps without an image", str(maps[stem]))
    for stem in images:
        if stem not in maps:
            notes.add("images without a label map, left out", str(images[stem]))
    files = {stem: images[stem].relative_to(image_folder).as_posix() for stem in maps if stem in images}
    read_map = partial(_segments, class_ids, tuple(ignored_ids))
    read = [
        MappedImage(images[stem], (maps[stem],), read_map, key, file)
        for key, (stem, file) in zip(sample_keys(list(files.values())), files.items(), strict=True)
    ]
    return RawSplit(map_folder, read, notes, unusable, len(maps) - len(files))


def read_label_map(path: Path, max_id: int) -> Image.Image:
    """Reads a label map as it was written; mode L or I;16.

    Args:
        path: PNG or TIFF file.
        max_id: highest class id that maps of this dataset can hold.

    Raises:
        ValueError: the file is broken or too large, or its pixels are not certain to be ids.
    """
    try:
        with Image.open(path, formats=("PNG", "TIFF")) as picture:
            if picture.width * picture.height > MAX_IMAGE_PIXELS:
                raise ValueError(f"it is {picture.width} x {picture.height} px, more than {MAX_IMAGE_PIXELS:,} pixels")
            num_bits = _grey_bits(path, picture)
            if num_bits not in (8, 16):
                raise ValueError(
                    f"it is of mode {picture.mode}{f' with {num_bits} bits' if num_bits else ''}, but a label map is "
                    "grey with 8 or 16 bits, so that pixels are ids and not colours. Save the ids themselves"
                )
            if num_bits == 8 and max_id > _MAX_8_BIT_ID:
                raise ValueError(
                    f"it has 8 bits, but class ids go up to {max_id}, which takes 16: were its ids cut off when it was "
                    "converted? Save it with 16 bits"
                )
            picture.load()
            return picture if num_bits == 8 else Image.fromarray(np.asarray(picture).astype(np.uint16))
    except BROKEN_IMAGE as error:
        raise ValueError(f"{path}: {error}") from error


def _grey_bits(path: Path, picture: Image.Image) -> int | None:
    """Bits per pixel of a grey picture as the file has them (Pillow stretches fewer than 8 to 8); None for others."""
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        # Mode I would be signed or wider; where white is zero, Pillow turns the values round.
        unsigned = picture.mode in {"L", "I;16", "I;16B"} and picture.tag_v2.get(_PHOTOMETRIC) == _BLACK_IS_ZERO
        return int(picture.tag_v2[_BITS_PER_SAMPLE][0]) if unsigned else None
    if picture.mode not in {"1", "L", "I", "I;16"}:
        return None
    with path.open("rb") as file:
        return file.read(25)[24]  # of the IHDR chunk, which PNG begins with


def _segments(class_ids: Sequence[int], ignored_ids: Sequence[int], path: Path) -> IdMap:
    """A label map, every class of which is a segment.

    Raises:
        ValueError: it can't be read as ids, or has one that is neither a class nor ignored.
    """
    ids = np.asarray(read_label_map(path, max(class_ids))).astype(np.uint16)
    known = {*class_ids, *ignored_ids}
    unknown = [class_id for class_id in ids_in(ids) if class_id not in known]
    if unknown:
        shown = ", ".join(map(str, unknown[:5])) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise ValueError(f"{path.name} has ids that are no class: {shown}")
    return IdMap(ids, {class_id: Segment(id=str(class_id), class_id=class_id) for class_id in class_ids})
