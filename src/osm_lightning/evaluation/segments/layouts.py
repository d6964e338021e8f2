"""Finds out how masks lie on disk and which image each belongs to. Reads JSON and file names, no pixels.

Layouts: COCO panoptic (JSON and a folder of PNG files), COCO instance JSON, a list of COCO results (with image ids),
the list of one image's masks that SAM gives (without), and a folder of binary PNG files per image.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from osm_lightning.evaluation.segments.stored import (
    MAX_SEGMENTS,
    AnnotatedMasks,
    BinaryMasks,
    ImageMasks,
    PanopticMasks,
)

KNOWN_LAYOUTS = (
    "COCO panoptic or instance JSON, a JSON list of COCO results, a list as SAM gives it for one image, "
    "a folder of <image stem>.json with such lists, or a folder of <image stem>/<mask id>.png"
)


def find_masks(masks: Path, stems: Sequence[str]) -> dict[str, ImageMasks]:
    """Masks by image stem; images without any are left out.

    Args:
        masks: a JSON file or a folder.
        stems: names of the images without their endings, each once.

    Raises:
        ValueError: there is no such path, it is of no known layout or broken, or it has masks for none of the images.
    """
    if masks.is_dir():
        return _in_folder(masks, stems)
    if not masks.is_file():
        raise ValueError(f"masks: there is no file or folder {masks}. Give one of: {KNOWN_LAYOUTS}.")
    data = _read_json(masks)
    match data:
        case {"images": list() as images, "annotations": list() as annotations}:
            rows = _rows_by_stem(masks, images, stems)
            by_image = _by_image(masks, annotations)
            if any("segments_info" in row for row in annotations):
                return _in_panoptic(masks, rows, by_image)
            return _in_instances(masks, rows, by_image)
        case list() if any("image_id" in row for row in _objects(masks, data)):
            return _in_results(masks, _by_image(masks, data), stems)
        case list() | {"annotations": list()}:
            annotations = _annotations_of_one_image(masks, data)
            if not annotations:
                raise ValueError(f"{masks} holds no mask. Give masks to name.")
            if len(stems) != 1:
                raise ValueError(
                    f"{masks} holds {len(annotations)} masks without image_id, so that they belong to one image, but "
                    f"there are {len(stems)}. Give one image, or a folder with one <image stem>.json per image."
                )
            return {stems[0]: AnnotatedMasks(masks, _segmentations(masks, annotations))}
    keys = f"an object with the keys {_some(data)}" if isinstance(data, dict) else f"{type(data).__name__} {data!r:.40}"
    raise ValueError(f"{masks} is of no known layout: it holds {keys}. Give one of: {KNOWN_LAYOUTS}.")


def _in_folder(folder: Path, stems: Sequence[str]) -> dict[str, ImageMasks]:
    found: dict[str, ImageMasks] = {}
    for stem in stems:
        pngs, listed = folder / stem, folder / f"{stem}.json"
        if pngs.is_dir() and listed.is_file():
            raise ValueError(f"{folder} holds both {stem}/ and {stem}.json. Remove the one that is not meant.")
        if pngs.is_dir():
            paths = _numbered_pngs(pngs)
            _refuse_twice(pngs, "mask", (path.stem for path in paths))
            if paths:
                found[stem] = BinaryMasks(tuple(paths))
        elif listed.is_file():
            annotations = _annotations_of_one_image(listed, _read_json(listed))
            if annotations:
                found[stem] = AnnotatedMasks(listed, _segmentations(listed, annotations))
    if not found:
        raise ValueError(
            f"{folder} has masks for none of the {len(stems)} images: looked for <stem>/*.png and <stem>.json with the "
            f"stems {_some(stems)}. It holds {_some(sorted(path.name for path in folder.iterdir()))}."
        )
    return found


def _numbered_pngs(folder: Path) -> list[Path]:
    """The PNG files of a folder, numbers in numeric order, then other names."""
    found = [path for path in folder.iterdir() if path.suffix.lower() == ".png" and not path.name.startswith(".")]
    return sorted(found, key=lambda path: (not path.stem.isdecimal(), path.stem.zfill(20), path.name))


def _in_instances(
    path: Path, rows: Mapping[str, Mapping[str, Any]], by_image: Mapping[Any, list[dict[str, Any]]]
) -> dict[str, ImageMasks]:
    found: dict[str, ImageMasks] = {
        stem: AnnotatedMasks(path, _segmentations(path, by_image[row["id"]]), _stated_size(row))
        for stem, row in rows.items()
        if by_image.get(row["id"])
    }
    if not found:
        raise ValueError(f"{path} lists {_some(rows)}, but has no annotation of these images. Give masks to name.")
    return found


def _in_panoptic(
    path: Path, rows: Mapping[str, Mapping[str, Any]], by_image: Mapping[Any, list[dict[str, Any]]]
) -> dict[str, ImageMasks]:
    places = (path.with_suffix(""), path.parent.parent / path.stem)
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise ValueError(f"{path} is COCO panoptic, but its PNG folder is neither {places[0]} nor {places[1]}. Add it.")
    found: dict[str, ImageMasks] = {}
    for stem, row in rows.items():
        annotations = by_image.get(row["id"], [])
        if len(annotations) > 1:
            raise ValueError(f"{path}: image {row['id']} has {len(annotations)} annotations; COCO panoptic has one.")
        if annotations and annotations[0].get("segments_info"):
            found[stem] = _panoptic_masks(path, folder, annotations[0])
    if not found:
        raise ValueError(f"{path} lists {_some(rows)}, but has no segment of these images. Give masks to name.")
    return found


def _panoptic_masks(path: Path, folder: Path, annotation: Mapping[str, Any]) -> PanopticMasks:
    name, infos = annotation.get("file_name"), annotation["segments_info"]
    if not isinstance(name, str) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{path}: the file_name {name!r} is not a path within {folder}. Mend the annotation.")
    if not (folder / name).is_file():
        raise ValueError(f"{path}: there is no {folder / name}. Add the file, or leave its image out.")
    if not isinstance(infos, list) or len(infos) > MAX_SEGMENTS:
        raise ValueError(f"{path}: segments_info of {name} is not a list of up to {MAX_SEGMENTS} segments. Mend it.")
    ids: list[int] = []
    for info in _objects(path, infos):
        segment_id = info.get("id")
        if not isinstance(segment_id, int) or not 0 <= segment_id < 2**24:
            raise ValueError(
                f"{path}: {name} has the segment id {segment_id!r}, but an id is a whole number of 24 bits."
            )
        ids.append(segment_id)
    _refuse_twice(path, f"segment of {name}", ids)
    return PanopticMasks(folder / name, tuple(ids))


def _in_results(
    path: Path, by_image: Mapping[Any, list[dict[str, Any]]], stems: Sequence[str]
) -> dict[str, ImageMasks]:
    found: dict[str, ImageMasks] = {}
    ids: dict[str, Any] = {stem: int(stem) if stem.isdecimal() else stem for stem in stems}
    _refuse_twice(path, "image id that file names stand for:", (i for i in ids.values() if i in by_image))
    for stem, image_id in ids.items():
        annotations = by_image.get(image_id) or by_image.get(stem)
        if annotations:
            found[stem] = AnnotatedMasks(path, _segmentations(path, annotations))
    if not found:
        raise ValueError(
            f"{path} has masks for none of the {len(stems)} images: looked for the image ids {_some(ids.values())} "
            f"(the file names, as numbers), and it has {_some(by_image)}. Name the images by their ids."
        )
    return found


def _rows_by_stem(path: Path, images: list[Any], stems: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Rows of the table of images, in the order of the stems."""
    listed: dict[str, Mapping[str, Any]] = {}
    wanted = set(stems)
    for row in _objects(path, images):
        name, image_id = row.get("file_name"), row.get("id")
        if not isinstance(name, str) or not isinstance(image_id, int | str):
            raise ValueError(f"{path}: an image of its table has no file_name or no id ({row!r:.80}). Mend the table.")
        stem = PurePosixPath(name).stem
        if stem in wanted and stem in listed:
            raise ValueError(
                f"{path} lists two images of the name {stem}: {listed[stem]['file_name']} and {name}. Name them apart."
            )
        listed[stem] = row
    found = {stem: listed[stem] for stem in stems if stem in listed}
    if not found:
        raise ValueError(
            f"{path} has masks for none of the {len(stems)} images: looked for {_some(stems)}, and it lists "
            f"{_some(listed)}. Name the images as in its file_name."
        )
    return found


def _by_image(path: Path, annotations: list[Any]) -> dict[Any, list[dict[str, Any]]]:
    by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for row in _objects(path, annotations):
        image_id = row.get("image_id")
        if not isinstance(image_id, int | str):
            raise ValueError(f"{path}: an annotation has no image_id ({row!r:.80}). Mend it.")
        by_image[image_id].append(row)
    return dict(by_image)


def _annotations_of_one_image(path: Path, data: Any) -> list[dict[str, Any]]:
    """The list of one image's masks, bare (SAM's generator) or as the `annotations` of an object (SA-1B's files)."""
    rows = data.get("annotations") if isinstance(data, dict) else data
    if not isinstance(rows, list):
        raise ValueError(f"{path} is {type(data).__name__}, not a list of one image's masks. Write what SAM gives.")
    return _objects(path, rows)


def _segmentations(path: Path, annotations: list[dict[str, Any]]) -> tuple[tuple[str, object], ...]:
    """Id (the annotation's own, else its position) and segmentation of each annotation of one image."""
    found = []
    for position, row in enumerate(annotations):
        mask_id = row.get("id", position)
        if not isinstance(mask_id, int | str):
            raise ValueError(f"{path}: annotation {position} has the id {mask_id!r}; it must be a number or a text.")
        if "segmentation" not in row:
            raise ValueError(
                f"{path}: annotation {mask_id} has no segmentation, only {_some(row)}. Boxes alone cannot be named: "
                "export masks."
            )
        found.append((str(mask_id), row["segmentation"]))
    _refuse_twice(path, "mask of one image", (mask_id for mask_id, _ in found))
    return tuple(found)


def _stated_size(row: Mapping[str, Any]) -> tuple[int, int] | None:
    height_px, width_px = row.get("height"), row.get("width")
    return (height_px, width_px) if isinstance(height_px, int) and isinstance(width_px, int) else None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}). Was it cut off? Give one of: {KNOWN_LAYOUTS}.") from error


def _objects(path: Path, rows: list[Any]) -> list[dict[str, Any]]:
    for position, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: entry {position} of a list is {row!r:.40}, not an object. Give {KNOWN_LAYOUTS}.")
    return rows


def _refuse_twice(path: Path, what: str, ids: Iterable[object]) -> None:
    seen: set[object] = set()
    for entry in ids:
        if entry in seen:
            raise ValueError(f"{path}: the {what} {entry} stands twice. Make the ids unique within an image.")
        seen.add(entry)


def _some(items: Iterable[object]) -> str:
    every = [str(item) for item in items]
    return ", ".join(every[:5]) + (f", ... ({len(every)} in all)" if len(every) > 5 else "") if every else "nothing"
