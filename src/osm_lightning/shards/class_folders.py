"""Binary masks in a folder per class to records: MASKS/<class>/<image>.png, or several as <image>__<anything>.png.

Masks may overlap and carry RLE. What a mask is called is the name of its folder.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from osm_lightning.picture import BROKEN_IMAGE, MAX_IMAGE_PIXELS
from osm_lightning.record import Record, Segment
from osm_lightning.rle import area_and_box, encode_rle
from osm_lightning.shards.conversion import RawSplit
from osm_lightning.shards.names import IMAGE_SUFFIXES, files_by_stem, sample_keys, spoken
from osm_lightning.shards.source import Findings, ImageHeader, as_upright, read_header
from osm_lightning.vocabulary import Vocabulary

SEPARATOR = "__"
"""Between an image's name and whatever tells its masks of one class apart."""


@dataclass(frozen=True, slots=True)
class _Mask:
    """One mask's file and what it is called."""

    id: str
    """The file's path below the folder of masks, without its ending."""
    path: Path
    class_id: int | None
    name: str | None


@dataclass(frozen=True, slots=True)
class _MaskedImage:
    """One image and the files of its masks."""

    key: str
    path: Path
    file_name: str
    masks: tuple[_Mask, ...]

    def convert(self, errors: Findings, notes: Findings) -> Record | None:
        """Makes the record; None and errors if the image or a mask can't be read, or they don't fit each other."""
        try:
            image_bytes = self.path.read_bytes()
            header = read_header(self.path)
        except (OSError, ValueError) as error:
            errors.add("pictures that can't be read", str(error))
            return None
        segments, num_broken = [], 0
        for mask in self.masks:
            try:
                segment = _segment(mask, header, notes)
            except (OSError, ValueError) as error:
                errors.add("masks that can't be read", str(error))
                num_broken += 1
                continue
            if segment.area_px == 0:
                notes.add("segments without pixels, left out", str(mask.path))
                continue
            segments.append(segment)
        if num_broken:
            return None
        width, height = header.size_px
        source = {"file_name": self.file_name}
        return Record(self.key, image_bytes, header.ending, height, width, tuple(segments), source=source)


def class_names(mask_folder: Path) -> list[str]:
    """Names of the class folders, sorted; hidden ones are passed over.

    Raises:
        ValueError: there is no such folder, or none in it.
    """
    if not mask_folder.is_dir():
        raise ValueError(f"there is no folder {mask_folder}. Check the paths.")
    names = sorted(path.name for path in mask_folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise ValueError(
            f"{mask_folder} holds no folder; it must hold one for each class, with its masks as PNG files."
        )
    return names


def read_class_folders(image_folder: Path, mask_folder: Path, vocabulary: Vocabulary | None) -> RawSplit:
    """Finds each mask's image by its name, and its class by its folder's. No picture is opened yet.

    Args:
        image_folder: folder of the images, subfolders included.
        mask_folder: folder of the class folders; below these, paths are those of the images.
        vocabulary: the classes, found by any of their names; None for the folders' names as free text.

    Returns:
        The images in the order of their names. Masks without an image are among its errors.

    Raises:
        ValueError: a folder is missing, no class or several have a folder's name, or two images differ only in their
            ending.
    """
    if not image_folder.is_dir():
        raise ValueError(f"there is no folder {image_folder}. Check the paths.")
    errors, notes, unusable = Findings(), Findings(), Findings()
    images = files_by_stem(image_folder, IMAGE_SUFFIXES, errors)
    masks: defaultdict[str, list[_Mask]] = defaultdict(list)
    orphans = set()
    for label in class_names(mask_folder):
        class_id = None if vocabulary is None else _class_id(label, vocabulary, errors)
        name = spoken(label) if vocabulary is None else None
        for stem, path in files_by_stem(mask_folder / label, {".png"}, errors).items():
            image = _image_of(stem, images)
            if image is None:
                unusable.add("masks without an image", str(path))
                orphans.add(stem.split(SEPARATOR)[0])
            else:
                masks[image].append(_Mask(f"{label}/{stem}", path, class_id, name))
    errors.raise_if_any(mask_folder)
    for stem in images:
        if stem not in masks:
            notes.add("images without a mask, left out", str(images[stem]))
    files = {stem: path.relative_to(image_folder).as_posix() for stem, path in images.items() if stem in masks}
    read = [
        _MaskedImage(key, images[stem], file, tuple(masks[stem]))
        for key, (stem, file) in zip(sample_keys(list(files.values())), files.items(), strict=True)
    ]
    return RawSplit(mask_folder, read, notes, unusable, len(orphans))


def _image_of(stem: str, images: Collection[str]) -> str | None:
    """The image that a mask belongs to: of several that would do, the one with the longest name."""
    name = stem
    while name not in images:
        name, separator, _ = name.rpartition(SEPARATOR)
        if not separator:
            return None
    return name


def _class_id(label: str, vocabulary: Vocabulary, errors: Findings) -> int | None:
    """The class that has the folder's name."""
    found = [entry.id for entry in vocabulary if spoken(label) in map(spoken, entry.names)]
    if len(found) != 1:
        kind = "folders that several classes have the name of" if found else "folders with the name of no class"
        errors.add(f"{kind} in vocabulary {vocabulary.key}", repr(label))
    return found[0] if found else None


def _segment(mask: _Mask, header: ImageHeader, notes: Findings) -> Segment:
    """Reads a mask.

    Raises:
        ValueError: the file is no PNG of the image's size with two values.
    """
    upright = as_upright(_read_binary(mask.path), header, mask.path.name, notes)
    if upright.size != header.size_px:
        width, height = header.size_px
        raise ValueError(f"{mask.path}: it is {upright.width} x {upright.height} px, its image {width} x {height}")
    pixels = np.asarray(upright)
    values = np.unique(pixels)
    if len(values) > 2 or (len(values) == 2 and values[0] != 0):
        raise ValueError(
            f"{mask.path}: it has {len(values)} grey levels from {values[0]} to {values[-1]}, but a mask has two, of "
            "which black is outside. Save it without smoothing"
        )
    inside = pixels != 0
    rle = encode_rle(inside)
    area_px, box = area_and_box(rle, upright.height)
    return Segment(mask.id, mask.class_id, mask.name, False, area_px, box, rle)


def _read_binary(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            if picture.width * picture.height > MAX_IMAGE_PIXELS:
                raise ValueError(f"it is {picture.width} x {picture.height} px, more than {MAX_IMAGE_PIXELS:,} pixels")
            if picture.mode not in {"1", "L"}:
                raise ValueError(
                    f"it is a PNG of mode {picture.mode}; save the mask as black and white, or as 8-bit grey"
                )
            picture.load()
            return picture
    except BROKEN_IMAGE as error:
        raise ValueError(f"{path}: {error}") from error
