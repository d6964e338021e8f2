"""The JSON of COCO's instance format, as it is parsed: tables by id, and polygons that take little memory."""

from __future__ import annotations

import json
from array import array
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osm_lightning.shards.source import Findings

MALFORMED = (OSError, LookupError, TypeError, AttributeError, ValueError, RecursionError)
"""What reading a JSON raises that is broken or of another form."""


@dataclass(frozen=True, slots=True)
class CocoTables:
    """What such a JSON holds; rows are not checked beyond their ids."""

    images: Mapping[int | str, Mapping[str, Any]]
    """By id, in the order of the JSON."""
    annotations: Mapping[int | str, list[Mapping[str, Any]]]
    """By image id, in the order of the JSON. Polygons are arrays: see `as_coco`."""
    categories: tuple[Mapping[str, Any], ...]
    licences: Mapping[Any, Mapping[str, Any]]


def read_tables(json_path: Path, errors: Findings) -> CocoTables:
    """Parses a JSON; LVIS's 1.27 M annotations would fill several GB if their polygons stayed lists.

    Args:
        json_path: the file.
        errors: takes ids that stand twice, and annotations of no image.

    Raises:
        MALFORMED: it can't be read, or is of another form.
    """
    content = json.loads(json_path.read_text(encoding="utf-8-sig"), object_hook=_compact)
    images: dict[int | str, Mapping[str, Any]] = {}
    for row in content["images"]:
        if not isinstance(row["id"], int | str):
            raise TypeError(f"image id {row['id']!r} is neither a whole number nor a text")
        if row["id"] in images:
            errors.add("image ids that stand twice", str(row["id"]))
        images[row["id"]] = row
    annotations: defaultdict[int | str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in content["annotations"]:
        if row["image_id"] not in images:
            errors.add("annotations of images that the JSON does not list", f"{row['id']} of image {row['image_id']}")
        annotations[row["image_id"]].append(row)
    licences = {row["id"]: row for row in content.get("licenses", ())}
    return CocoTables(images, dict(annotations), tuple(content.get("categories", ())), licences)


def read_categories(json_path: Path) -> list[Mapping[str, Any]]:
    """The categories of a JSON of any of COCO's formats.

    Raises:
        MALFORMED: it can't be read, or is of another form.
    """
    content = json.loads(json_path.read_text(encoding="utf-8-sig"), object_hook=_compact)
    return list(content["categories"])


def as_coco(segmentation: object) -> object:
    """A segmentation as the JSON has it, its polygons lists again."""
    if not isinstance(segmentation, list):
        return segmentation
    return [polygon.tolist() if isinstance(polygon, array) else polygon for polygon in segmentation]


def _compact(row: dict[str, Any]) -> dict[str, Any]:
    """An object of the JSON as it is kept while the rest is parsed."""
    if isinstance(row.get("segmentation"), list):
        row["segmentation"] = [_as_array(polygon) for polygon in row["segmentation"]]
        for measured_anew in ("area", "bbox"):
            row.pop(measured_anew, None)
    return row


def _as_array(polygon: object) -> object:
    """Coordinates as an array; whatever is no list of numbers stays as it is, for `to_rle` to refuse."""
    try:
        return array("d", polygon) if isinstance(polygon, list) else polygon
    except (TypeError, OverflowError):
        return polygon
