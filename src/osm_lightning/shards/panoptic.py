"""COCO's panoptic format to records: one JSON, and one PNG per image whose colours are segment ids.

Pixels are believed and the JSON is checked against them: areas and boxes are computed anew. Images keep their bytes.
Datasets of this format differ in where their files lie; that is a row of `LAYOUTS`, not code.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from osm_lightning.record import Record, Segment, box_of, encode_segment_map
from osm_lightning.shards.conversion import RawSplit
from osm_lightning.shards.source import Findings, as_upright, read_header, stays_inside
from osm_lightning.vocabulary import Vocabulary

_NUM_COLOURS = 256**3
_MAX_SEGMENTS = 2**16 - 1


@dataclass(frozen=True, slots=True)
class PanopticLayout:
    """Where a dataset keeps its files, below its folder; `{split}` stands for the split's name."""

    annotations: str
    segment_maps: tuple[str, ...]
    """Folders that may hold the PNGs; the first that exists is taken."""
    images: str
    """Folder of the images; `{folder}` stands for the split's name in `folders`."""
    image_name: str = "{file_name}"
    """An image's path in it: its `{file_name}` or `{id}` in the JSON, and `{group}`, the id up to its first `_`."""
    folders: Mapping[str, str] = field(default_factory=dict)
    """From a split to the name of its folder of images, where that is another."""
    shared_ids: bool = False
    """Whether segments of an image may share an id: no pixel tells them apart, so they are left out."""


LAYOUTS = {
    "coco": PanopticLayout(
        annotations="annotations/panoptic_{split}.json",
        # The official archive of PNGs unpacks in annotations/; many move it up beside the images.
        segment_maps=("annotations/panoptic_{split}", "panoptic_{split}"),
        images="{split}",
    ),
    "ade20k": PanopticLayout(
        annotations="ade20k_panoptic_{split}.json",
        segment_maps=("ade20k_panoptic_{split}",),
        images="images/{folder}",
        folders={"train": "training", "val": "validation"},
        shared_ids=True,  # stuff's ids are colours of a palette, in which copies of the script have had equal ones
    ),
    "cityscapes": PanopticLayout(
        annotations="gtFine/cityscapes_panoptic_{split}.json",
        segment_maps=("gtFine/cityscapes_panoptic_{split}",),
        images="leftImg8bit/{split}",
        # The JSON's own file names, CITY_..._gtFine_leftImg8bit.png, are those of no file (createPanopticImgs.py).
        image_name="{group}/{id}_leftImg8bit.png",
    ),
}
"""From dataset to layout."""


@dataclass(frozen=True, slots=True)
class _AnnotatedImage:
    """One image's entries of the JSON."""

    image_path: Path
    map_path: Path
    segments: tuple[Segment, ...]
    """In the order of the JSON, with its areas and boxes."""
    shared_ids: tuple[int, ...]
    """Ids whose pixels belong to no segment, because several claim them."""
    source: Mapping[str, Any]

    @property
    def key(self) -> str:
        return self.image_path.stem

    def convert(self, errors: Findings, notes: Findings) -> Record | None:
        """Makes the record; None and an error if the files can't be read or don't fit together."""
        try:
            image_bytes = self.image_path.read_bytes()
            header = read_header(self.image_path)
            png = _read_map(self.map_path)
        except (OSError, ValueError) as error:
            errors.add("pictures that can't be read", str(error))
            return None
        upright = as_upright(png, header, self.image_path.name, notes)
        if upright.size != header.size_px:
            sizes = f"{png.width} x {png.height} px, not {header.size_px[0]} x {header.size_px[1]}"
            errors.add("segment maps of another size than their image", f"{self.map_path.name}: {sizes}")
            return None
        colours = _colours(upright)
        if self.shared_ids:
            colours[np.isin(colours, self.shared_ids)] = 0
        segment_map, segments, unknown = _number(colours, self.segments)
        if unknown:
            errors.add("segment maps with ids that the JSON lacks", f"{self.map_path.name}: {unknown[:5]}")
            return None
        _compare(self, segments, notes)
        return Record(
            key=self.key,
            image_bytes=image_bytes,
            image_ending=header.ending,
            height_px=upright.height,
            width_px=upright.width,
            segments=segments,
            segment_map_png=encode_segment_map(segment_map),
            source=self.source,
        )


def read_split(layout: PanopticLayout, src: Path, split: str, vocabulary: Vocabulary) -> RawSplit:
    """Reads and checks a split's JSON, and that every file it names is there. No picture is opened yet.

    Args:
        layout: where the files lie.
        src: the dataset's folder.
        split: name of the split.
        vocabulary: the classes that segments may have.

    Returns:
        The images in the order of their ids. Those with a missing file, a file name that leads out of its folder, a
        class that the vocabulary lacks, or segment ids that can't be are among its errors instead.

    Raises:
        ValueError: the JSON or a folder is missing, the JSON is not COCO's panoptic format, or an image stands twice.
    """
    json_path, image_folder, map_folder = _locate(layout, src, split)
    errors, notes, unusable = Findings(), Findings(), Findings()
    usable, num_unusable = [], 0
    try:
        content = json.loads(json_path.read_bytes())
        licences = {row["id"]: row for row in content.get("licenses", ())}
        images = _by_id(content["images"], "id", "image ids that stand twice", errors)
        annotations = _by_id(content["annotations"], "image_id", "images annotated twice", errors)
        for image_id in sorted(images.keys() & annotations.keys()):
            image, annotation, problems = images[image_id], annotations[image_id], Findings()
            group = str(image_id).partition("_")[0]
            name = layout.image_name.format(file_name=image["file_name"], id=image_id, group=group)
            image_path = _path(image_folder, name, problems)
            segments, shared_ids = _segments(annotation, layout.shared_ids, vocabulary, problems, notes)
            map_path = _path(map_folder, annotation["file_name"], problems)
            if problems.counts:
                unusable.merge(problems)
                num_unusable += 1
            else:
                source = _source(image, image_path, licences)
                usable.append(_AnnotatedImage(image_path, map_path, segments, shared_ids, source))
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{json_path} is not in COCO's panoptic format ({type(error).__name__}: {error}). Download it again."
        ) from error
    for image_id in sorted(annotations.keys() - images.keys()):
        errors.add("annotations of images that the JSON does not list", str(image_id))
    for image_id in sorted(images.keys() - annotations.keys()):
        notes.add("images without annotation, left out", str(image_id))
    errors.raise_if_any(json_path)
    return RawSplit(json_path, usable, notes, unusable, num_unusable)


def _locate(layout: PanopticLayout, src: Path, split: str) -> tuple[Path, Path, Path]:
    """Paths of the JSON, the folder of images and the folder of segment maps."""
    json_path = src / layout.annotations.format(split=split)
    image_folder = src / layout.images.format(split=split, folder=layout.folders.get(split, split))
    map_folders = [src / folder.format(split=split) for folder in layout.segment_maps]
    map_folder = next((folder for folder in map_folders if folder.is_dir()), map_folders[0])
    missing = [str(path) for path in (json_path, image_folder, map_folder) if not path.exists()]
    if missing:
        raise ValueError(
            f"split {split} of --src {src} lacks {' and '.join(missing)}. Check --src and --split, or unpack the "
            "dataset's archives there."
        )
    return json_path, image_folder, map_folder


def _by_id(rows: list[dict[str, Any]], key: str, twice: str, errors: Findings) -> dict[Any, dict[str, Any]]:
    """From an id to its row. Ids are whole numbers (COCO) or texts (Cityscapes, ADE20K), which do not mix."""
    found: dict[Any, dict[str, Any]] = {}
    for row in rows:
        if not isinstance(row[key], int | str):
            raise TypeError(f"{key} is {row[key]!r}, neither a whole number nor a text")
        if row[key] in found:
            errors.add(twice, str(row[key]))
        found[row[key]] = row
    return found


def _path(folder: Path, name: str, problems: Findings) -> Path:
    if not stays_inside(name):
        problems.add("file names that lead out of their folder", repr(name))
    elif not (folder / name).is_file():
        problems.add("missing files", str(folder / name))
    return folder / name


def _segments(
    annotation: Mapping[str, Any], may_share: bool, vocabulary: Vocabulary, problems: Findings, notes: Findings
) -> tuple[tuple[Segment, ...], tuple[int, ...]]:
    """An image's segments that no other shares its id with, and the ids that are shared."""
    image_id, rows, segments = annotation["image_id"], annotation["segments_info"], []
    uses = Counter(row["id"] for row in rows)
    shared_ids = tuple(segment_id for segment_id, num in uses.items() if num > 1)
    if shared_ids and not may_share:
        problems.add("images with segment ids that stand twice", str(image_id))
    if len(uses) > _MAX_SEGMENTS:
        problems.add(f"images with more than {_MAX_SEGMENTS} segments", str(image_id))
    for row in rows:
        if not isinstance(row["category_id"], int) or row["category_id"] not in vocabulary:
            problems.add(f"classes that vocabulary {vocabulary.key} lacks", f"{row['category_id']} in image {image_id}")
        if not isinstance(row["id"], int) or not 0 < row["id"] < _NUM_COLOURS:
            problems.add("segment ids that are no colour", f"{row['id']} in image {image_id}")
        if row["id"] in shared_ids:
            notes.add("segments that share their id, left out", f"{row['id']} in image {image_id}")
            continue
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
    return tuple(segments), shared_ids


def _source(image: Mapping[str, Any], path: Path, licences: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
    licence = licences.get(image.get("license"), {})
    source = {"file_name": path.name, "image_id": image["id"]}
    source |= {"licence": licence.get("name"), "licence_url": licence.get("url")}
    source |= {key: image.get(key) for key in ("coco_url", "flickr_url")}
    return {key: value for key, value in source.items() if value is not None}


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
