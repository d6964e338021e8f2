"""COCO's instance format, and LVIS, to records: one JSON with polygons or RLE. Segments may overlap and carry RLE.

Polygons become pixels as pycocotools makes them; areas and boxes are measured on those. A broken segmentation makes its
image unusable: with the others alone, the image would be taken to hold no such object.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from osm_lightning.record import Record, Segment
from osm_lightning.rle import area_and_box, decode_rle, encode_rle, to_rle
from osm_lightning.shards.coco_json import MALFORMED, CocoTables, as_coco, read_tables
from osm_lightning.shards.conversion import RawSplit
from osm_lightning.shards.names import sample_keys, spoken
from osm_lightning.shards.source import Findings, ImageHeader, as_upright, read_header, stays_inside
from osm_lightning.vocabulary import Vocabulary

LVIS_JSON = ("lvis_v1_{split}.json", "annotations/lvis_v1_{split}.json", "lvis/lvis_v1_{split}.json")
"""Where LVIS v1 may lie below --src: in the folder, among COCO's own annotations, or beside the folder `coco`."""
LVIS_IMAGES = (".", "coco")
"""Folders that may hold COCO's `train2017/` and `val2017/`; val of LVIS has images of both."""

_KEPT_OF_IMAGE = ("coco_url", "flickr_url", "neg_category_ids", "not_exhaustive_category_ids")
"""Kept in `Record.source` where the JSON has them. The last two are LVIS's: classes known to be absent from the image,
and classes of which not every instance is annotated."""


@dataclass(frozen=True, slots=True)
class _Annotation:
    """One mask's entry of the JSON."""

    id: str
    class_id: int | None
    name: str | None
    iscrowd: bool
    segmentation: object
    """See `as_coco`."""


@dataclass(frozen=True, slots=True)
class _AnnotatedImage:
    """One image's entries of the JSON."""

    key: str
    path: Path
    size_px: tuple[int, int]
    """Width, height that the JSON states: those of the picture that was annotated."""
    annotations: tuple[_Annotation, ...]
    """In the order of the JSON."""
    source: Mapping[str, Any]

    def convert(self, errors: Findings, notes: Findings) -> Record | None:
        """Makes the record; None and errors if the image or a segmentation can't be read, or they don't fit."""
        try:
            image_bytes = self.path.read_bytes()
            header = read_header(self.path)
        except (OSError, ValueError) as error:
            errors.add("pictures that can't be read", str(error))
            return None
        if self.size_px not in (header.size_px, header.stored_size_px):
            stated, true = (f"{width} x {height} px" for width, height in (self.size_px, header.size_px))
            errors.add("images of another size than their JSON states", f"{self.path.name}: {true}, not {stated}")
            return None
        # A blank of the annotated size tells whether masks have to be turned, and notes it once for all of them.
        blank = as_upright(Image.new("1", self.size_px), header, self.path.name, notes)
        segments = self._segments(header if blank.size != self.size_px else None, errors, notes)
        if segments is None:
            return None
        width, height = header.size_px
        return Record(self.key, image_bytes, header.ending, height, width, segments, source=self.source)

    def _segments(self, turning: ImageHeader | None, errors: Findings, notes: Findings) -> tuple[Segment, ...] | None:
        """The segments that have pixels; None if any can't be read.

        Args:
            turning: header of an image that was annotated as it is stored, whose masks turn with it.
            errors: takes every segmentation that can't be read.
            notes: takes what was left out.
        """
        width, height = self.size_px
        segments, num_broken = [], 0
        for annotation in self.annotations:
            where = f"annotation {annotation.id} of {self.path.name}"
            try:
                rle = to_rle(as_coco(annotation.segmentation), height, width)
            except ValueError as error:
                errors.add("annotations whose segmentation can't be read", f"{where} {error}")
                num_broken += 1
                continue
            if turning is not None:
                rle = _turned(rle, self.size_px, turning)
            area_px, box = area_and_box(rle, height if turning is None else width)
            if area_px == 0:
                notes.add("segments without pixels, left out", where)
                continue
            if annotation.iscrowd:
                notes.add("crowd segments, kept but not counted as masks", where)
            segments.append(
                Segment(annotation.id, annotation.class_id, annotation.name, annotation.iscrowd, area_px, box, rle)
            )
        return None if num_broken else tuple(segments)


def file_of_url(image: Mapping[str, Any]) -> str:
    """An image's file in LVIS v1, which names none: the last two parts of coco_url, train2017/000000391895.jpg."""
    return "/".join(str(image["coco_url"]).split("/")[-2:])


def read_lvis(src: Path, split: str, vocabulary: Vocabulary) -> RawSplit:
    """Reads LVIS v1, whose images are COCO 2017's.

    Args:
        src: folder with the JSON and COCO's image folders; see `LVIS_JSON` and `LVIS_IMAGES`.
        split: train or val.
        vocabulary: LVIS's.

    Raises:
        ValueError: see `read_instances`.
    """
    candidates = [src / path.format(split=split) for path in LVIS_JSON]
    json_path = next((path for path in candidates if path.is_file()), None)
    if json_path is None:
        raise ValueError(
            f"split {split} of --src {src} lacks {candidates[0].name}. Check --src and --split, or unpack "
            f"{candidates[0].name}.zip there or in annotations/."
        )
    return read_instances(json_path, [src / folder for folder in LVIS_IMAGES], vocabulary, file_of=file_of_url)


def read_instances(
    json_path: Path,
    image_folders: Sequence[Path],
    vocabulary: Vocabulary | None,
    *,
    file_of: Callable[[Mapping[str, Any]], str] = lambda image: str(image["file_name"]),
) -> RawSplit:
    """Reads and checks a JSON of COCO's instance format, and that its images are there. No picture is opened yet.

    Args:
        json_path: the JSON.
        image_folders: folders in which an image's file is looked for; the first that has it is taken.
        vocabulary: the classes that segments may have; None for free-text names, which are the annotations' own `name`
            or else their categories'.
        file_of: an image's file, below one of the folders, from its entry in the JSON.

    Returns:
        The images in the order of their ids. Those with a missing file, a file name that leads out of its folder, a
        class that the vocabulary lacks, no name where one is needed, no segmentation, or an annotation id that stands
        twice are among its errors instead.

    Raises:
        ValueError: the JSON is missing or of another format, or an image stands twice.
    """
    if not json_path.is_file():
        raise ValueError(f"there is no file {json_path}. Check the paths, or download it.")
    errors, notes, unusable = Findings(), Findings(), Findings()
    usable, num_unusable = [], 0
    try:
        tables = read_tables(json_path, errors)
        naming = _Naming(vocabulary, {row["id"]: row["name"] for row in tables.categories})
        annotated = sorted(
            tables.annotations.keys() & tables.images.keys(), key=lambda id_: (isinstance(id_, str), id_)
        )
        files = [file_of(tables.images[image_id]) for image_id in annotated]
        for image_id, file, key in zip(annotated, files, sample_keys(files), strict=True):
            problems = Findings()
            image = _image(tables, image_id, key, file, image_folders, naming, problems)
            if problems.counts:
                unusable.merge(problems)
                num_unusable += 1
            else:
                usable.append(image)
    except MALFORMED as error:
        raise ValueError(
            f"{json_path} is not in COCO's instance format ({type(error).__name__}: {error}). Download or export it "
            "again."
        ) from error
    for file, times in Counter(files).items():
        if times > 1:
            errors.add("files of several images", file)
    for image_id in tables.images:
        if image_id not in tables.annotations:
            notes.add("images without annotation, left out", str(image_id))
    errors.raise_if_any(json_path)
    return RawSplit(json_path, usable, notes, unusable, num_unusable)


@dataclass(frozen=True, slots=True)
class _Naming:
    """What annotations are called: by class, or freely."""

    vocabulary: Vocabulary | None
    names: Mapping[Any, str]
    """From category to name, where names are free."""

    def read(self, row: Mapping[str, Any], where: str, problems: Findings) -> tuple[int | None, str | None]:
        """Class id and name of an annotation, of which one is None."""
        category = row.get("category_id")
        if self.vocabulary is not None:
            if not isinstance(category, int) or category not in self.vocabulary:
                problems.add(f"classes that vocabulary {self.vocabulary.key} lacks", f"{category} ({where})")
            return category, None
        own = row.get("name")
        name = own.strip() if isinstance(own, str) and own.strip() else spoken(self.names.get(category, ""))
        if not name:
            problems.add("annotations with neither a name of their own nor a category that has one", where)
        return None, name


def _image(
    tables: CocoTables,
    image_id: int | str,
    key: str,
    file: str,
    folders: Sequence[Path],
    naming: _Naming,
    problems: Findings,
) -> _AnnotatedImage:
    """An image with its annotations, as far as the tables tell; problems make it unusable."""
    image = tables.images[image_id]
    annotations: dict[str, _Annotation] = {}
    for row in tables.annotations[image_id]:
        annotation_id = str(row["id"])
        where = f"annotation {annotation_id} of image {image_id}"
        if annotation_id in annotations:
            problems.add("annotation ids that stand twice in an image", where)
        if "segmentation" not in row:
            problems.add("annotations without segmentation", where)
        class_id, name = naming.read(row, where, problems)
        iscrowd = bool(row.get("iscrowd", 0))
        annotations[annotation_id] = _Annotation(annotation_id, class_id, name, iscrowd, row.get("segmentation"))
    if not isinstance(image["width"], int) or not isinstance(image["height"], int):
        raise TypeError(f"size {image['width']!r} x {image['height']!r} of image {image_id} is not in whole pixels")
    return _AnnotatedImage(
        key=key,
        path=_path(folders, file, problems),
        size_px=(image["width"], image["height"]),
        annotations=tuple(annotations.values()),
        source=_source(image, file, tables.licences),
    )


def _path(folders: Sequence[Path], file: str, problems: Findings) -> Path:
    """The file in the first folder that has it."""
    candidates = [folder / file for folder in folders]
    if not stays_inside(file):
        problems.add("file names that lead out of their folder", repr(file))
        return candidates[0]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        problems.add("missing files", " or ".join(map(str, candidates)))
    return found or candidates[0]


def _source(image: Mapping[str, Any], file: str, licences: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
    licence = licences.get(image.get("license"), {})
    source = {
        "file_name": file,
        "image_id": image["id"],
        "licence": licence.get("name"),
        "licence_url": licence.get("url"),
        **{key: image.get(key) for key in _KEPT_OF_IMAGE},
    }
    return {key: value for key, value in source.items() if value is not None}


def _turned(rle: str, size_px: tuple[int, int], header: ImageHeader) -> str:
    """RLE of a mask on the stored pixels, as it lies on the upright image."""
    assert header.turn is not None
    width, height = size_px
    stored = Image.fromarray(decode_rle(rle, height, width).astype(np.uint8))
    return encode_rle(np.asarray(stored.transpose(header.turn)).astype(bool))
