"""COCO's panoptic format to records: one JSON, and one PNG per image whose colours are segment ids.

Pixels are believed and the JSON is checked against them: areas and boxes are computed anew. Images keep their bytes.
Datasets of this format differ in where their files lie; that is a row of `LAYOUTS`, not code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from osm_lightning.record import Record, Segment, box_of, encode_segment_map
from osm_lightning.shards.source import Findings, as_upright, read_header, stays_inside
from osm_lightning.vocabulary import Vocabulary

_NUM_COLOURS = 256**3
_MAX_SEGMENTS = 2**16 - 1


@dataclass(frozen=True, slots=True)
class PanopticLayout:
    """Where a dataset keeps its files, below its folder; `{split}` stands for the split's name."""

    annotations: str
    """The JSON."""
    segment_maps: tuple[str, ...]
    """Folders that may hold the PNGs; the first that exists is taken."""
    images: str
    """Folder of the images."""


LAYOUTS = {
    "coco": PanopticLayout(
        annotations="annotations/panoptic_{split}.json",
        # The official archive of PNGs lies in annotations/ and unpacks there; many move it up beside the images.
        segment_maps=("annotations/panoptic_{split}", "panoptic_{split}"),
        images="{split}",
    ),
}
"""From dataset to layout."""


@dataclass(frozen=True, slots=True)
class PanopticSplit:
    """One split, checked as far as its JSON and file names go."""

    json_path: Path
    images: tuple[_AnnotatedImage, ...]
    """In the order of image ids."""
    notes: Findings
    """What was left out or corrected; complete after `records` has run."""

    def __len__(self) -> int:
        return len(self.images)

    def records(self) -> Iterator[Record]:
        """Converts image by image.

        Raises:
            ValueError: at the end, if some images or segment maps can't be read, or don't fit each other or the JSON.
        """
        errors = Findings()
        for image in self.images:
            record = _convert(image, errors, self.notes)
            if record is not None:
                yield record
        errors.raise_if_any(self.json_path)


@dataclass(frozen=True, slots=True)
class _AnnotatedImage:
    """One image's entries of the JSON."""

    image_path: Path
    map_path: Path
    segments: tuple[Segment, ...]
    """In the order of the JSON, with its areas and boxes."""
    source: Mapping[str, Any]


def read_split(layout: PanopticLayout, src: Path, split: str, vocabulary: Vocabulary) -> PanopticSplit:
    """Reads and checks a split's JSON, and that every file it names is there. No picture is opened yet.

    Args:
        layout: where the files lie.
        src: the dataset's folder.
        split: name of the split.
        vocabulary: the classes that segments may have.

    Raises:
        ValueError: a file or folder is missing, the JSON is not COCO's panoptic format, an id stands twice, a class is
            not in the vocabulary, or a file name leads out of its folder.
    """
    json_path, image_folder, map_folder = _locate(layout, src, split)
    errors, notes = Findings(), Findings()
    try:
        content = json.loads(json_path.read_bytes())
        licences = {row["id"]: row for row in content.get("licenses", ())}
        images = _by_id(content["images"], "id", "image ids that stand twice", errors)
        annotations = _by_id(content["annotations"], "image_id", "images annotated twice", errors)
        read = tuple(
            _AnnotatedImage(
                image_path=_path(image_folder, images[image_id]["file_name"], errors),
                map_path=_path(map_folder, annotations[image_id]["file_name"], errors),
                segments=_segments(image_id, annotations[image_id]["segments_info"], vocabulary, errors),
                source=_source(images[image_id], licences),
            )
            for image_id in sorted(images.keys() & annotations.keys())
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{json_path} is not in COCO's panoptic format ({type(error).__name__}: {error}). Download it again."
        ) from error
    for image_id in sorted(annotations.keys() - images.keys()):
        errors.add("annotations of images that the JSON does not list", str(image_id))
    for image_id in sorted(images.keys() - annotations.keys()):
        notes.add("images without annotation, left out", str(image_id))
    errors.raise_if_any(json_path)
    return PanopticSplit(json_path, read, notes)


def _locate(layout: PanopticLayout, src: Path, split: str) -> tuple[Path, Path, Path]:
    """Paths of the JSON, the folder of images and the folder of segment maps."""
    json_path = src / layout.annotations.format(split=split)
    image_folder = src / layout.images.format(split=split)
    map_folders = [src / folder.format(split=split) for folder in layout.segment_maps]
    map_folder = next((folder for folder in map_folders if folder.is_dir()), map_folders[0])
    missing = [str(path) for path in (json_path, image_folder, map_folder) if not path.exists()]
    if missing:
        raise ValueError(
            f"split {split} of --src {src} lacks {' and '.join(missing)}. Check --src and --split, or unpack the "
            "dataset's archives there."
        )
    return json_path, image_folder, map_folder


def _by_id(rows: list[dict[str, Any]], key: str, twice: str, errors: Findings) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        if not isinstance(row[key], int):
            raise TypeError(f"{key} is {row[key]!r}, not a whole number")
        if row[key] in found:
            errors.add(twice, str(row[key]))
        found[row[key]] = row
    return found


def _path(folder: Path, name: str, errors: Findings) -> Path:
    if not stays_inside(name):
        errors.add("file names that lead out of their folder", repr(name))
    elif not (folder / name).is_file():
        errors.add("missing files", str(folder / name))
    return folder / name


def _segments(
    image_id: int, rows: list[dict[str, Any]], vocabulary: Vocabulary, errors: Findings
) -> tuple[Segment, ...]:
    segments = []
    for row in rows:
        if not isinstance(row["category_id"], int) or row["category_id"] not in vocabulary:
            errors.add(f"classes that vocabulary {vocabulary.key} lacks", f"{row['category_id']} in image {image_id}")
        if not isinstance(row["id"], int) or not 0 < row["id"] < _NUM_COLOURS:
            errors.add("segment ids that are no colour", f"{row['id']} in image {image_id}")
        x, y, width, height = row["bbox"]
        segments.append(
            Segment(
                id=str(row["id"]),
                class_id=row["category_id"],
                iscrowd=bool(row.get("iscrowd", 0)),
                area_px=row["area"],
                bbox_xywh_px=(x, y, width, height),
            )
        )
    if len({segment.id for segment in segments}) < len(segments):
        errors.add("images with segment ids that stand twice", str(image_id))
    if len(segments) > _MAX_SEGMENTS:
        errors.add(f"images with more than {_MAX_SEGMENTS} segments", str(image_id))
    return tuple(segments)


def _source(image: Mapping[str, Any], licences: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
    licence = licences.get(image.get("license"), {})
    source = {
        "file_name": image["file_name"],
        "image_id": image["id"],
        "licence": licence.get("name"),
        "licence_url": licence.get("url"),
        "coco_url": image.get("coco_url"),
        "flickr_url": image.get("flickr_url"),
    }
    return {key: value for key, value in source.items() if value is not None}


def _convert(image: _AnnotatedImage, errors: Findings, notes: Findings) -> Record | None:
    """One image's record, or None and an error if its files can't be read or don't fit together."""
    try:
        image_bytes = image.image_path.read_bytes()
        header = read_header(image.image_path)
        png = _read_map(image.map_path)
    except (OSError, ValueError) as error:
        errors.add("pictures that can't be read", str(error))
        return None
    upright = as_upright(png, header, image.image_path.name, notes)
    if upright.size != header.size_px:
        sizes = f"{png.width} x {png.height} px, not {header.size_px[0]} x {header.size_px[1]}"
        errors.add("segment maps of another size than their image", f"{image.map_path.name}: {sizes}")
        return None
    segment_map, segments, unknown = _number(_colours(upright), image.segments)
    if unknown:
        errors.add("segment maps with ids that the JSON lacks", f"{image.map_path.name}: {unknown}")
        return None
    _compare(image, segments, notes)
    return Record(
        key=image.image_path.stem,
        image_bytes=image_bytes,
        image_ending=header.ending,
        height_px=upright.height,
        width_px=upright.width,
        segments=segments,
        segment_map_png=encode_segment_map(segment_map),
        source=image.source,
    )


def _read_map(path: Path) -> Image.Image:
    read_header(path)  # refuses a decompression bomb before its pixels are decoded
    try:
        with Image.open(path, formats=("PNG",)) as png:
            if png.mode != "RGB":
                raise ValueError(f"{path} is a PNG of mode {png.mode}, not RGB")
            png.load()
            return png
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path}: {error}") from error


def _colours(png: Image.Image) -> NDArray[np.uint32]:
    """uint32[H, W], segment id of each pixel: R + 256 G + 256^2 B; 0 is no segment."""
    rgb = np.asarray(png).astype(np.uint32)
    return rgb[..., 0] + 256 * rgb[..., 1] + 256**2 * rgb[..., 2]


def _number(
    colours: NDArray[np.uint32], claimed: tuple[Segment, ...]
) -> tuple[NDArray[np.uint16], tuple[Segment, ...], list[int]]:
    """Numbers the segments that have pixels, in their order, and measures them.

    Args:
        colours: uint32[H, W], segment id of each pixel.
        claimed: the JSON's segments.

    Returns:
        uint16[H, W], number of each pixel's segment from 1, 0 for none; the segments with their true areas and boxes;
        ids of pixels that no segment has.
    """
    number_of_id = np.zeros(_NUM_COLOURS, np.uint16)  # zero pages are not touched, so this is cheaper than sorting
    number_of_id[[int(segment.id) for segment in claimed]] = np.arange(1, len(claimed) + 1)
    numbers = number_of_id[colours]
    unknown = np.unique(colours[(numbers == 0) & (colours != 0)])
    areas_px = np.bincount(numbers.ravel(), minlength=len(claimed) + 1)
    areas_px[0] = 0
    present = areas_px > 0
    segment_map = np.cumsum(present).astype(np.uint16)[numbers]
    segments = tuple(
        replace(claimed[old - 1], area_px=int(areas_px[old]), bbox_xywh_px=box_of(segment_map == new))
        for new, old in enumerate(np.flatnonzero(present), start=1)
    )
    return segment_map, segments, unknown.tolist()


def _compare(image: _AnnotatedImage, measured: tuple[Segment, ...], notes: Findings) -> None:
    by_id = {segment.id: segment for segment in measured}
    for claimed in image.segments:
        where = f"{claimed.id} in {image.map_path.name}"
        if claimed.id not in by_id:
            notes.add("segments without pixels, left out", where)
        elif claimed != by_id[claimed.id]:
            notes.add("segments whose area or box differs from the JSON, measured anew", where)
        if claimed.iscrowd:
            notes.add("crowd segments, kept but not counted as masks", where)
