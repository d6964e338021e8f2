"""What one shard sample holds: an image's original bytes, its segments, and the segments' pixels.

A record is three members of a plain WebDataset tar: `<key>.jpg` (or `.png`, `.webp`: the original bytes, never encoded
again), `<key>.json` (schema, size, segments) and, for annotations that do not overlap, `<key>.seg.png`, a grey PNG (8
or 16 bit) whose pixel is the position of its segment in the JSON, counted from 1; 0 is no segment. Where segments may
overlap they carry compressed COCO RLE in the JSON instead. Foreign records are checked when they are decoded.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from osm_lightning.picture import BROKEN_IMAGE, MAX_IMAGE_PIXELS, decode_image, decode_jpeg
from osm_lightning.rle import check_fills, decode_runs, fill

SCHEMA = 1
"""Version of the layout; a reader refuses any other."""

IMAGE_ENDINGS = ("jpg", "png", "webp")


@dataclass(frozen=True, slots=True)
class Segment:
    """One mask's facts. Its pixels are the record's."""

    id: str
    """Unique within the image; the annotation's own id where it has one."""
    class_id: int | None = None
    """Class in the dataset's vocabulary, or None where `name` is free text."""
    name: str | None = None
    """Free-text name, for masks without a vocabulary; None for masks without any name."""
    iscrowd: bool = False
    """A crowd region: neither trained on nor counted."""
    area_px: int = 0
    """Pixels of the mask."""
    bbox_xywh_px: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Tight box: x, y, width, height."""
    rle: str | None = None
    """Compressed COCO RLE counts, where the record has no segment map."""

    @property
    def is_mask(self) -> bool:
        """Whether it is trained on and counted, its class permitting: no crowd region, and not empty."""
        return not self.iscrowd and self.area_px > 0


@dataclass(frozen=True, slots=True)
class Record:
    """One image and its segments, still encoded."""

    key: str
    image_bytes: bytes
    image_ending: str
    height_px: int
    width_px: int
    segments: tuple[Segment, ...]
    segment_map_png: bytes | None = None
    source: Mapping[str, Any] = field(default_factory=dict)
    """Where the image came from: file name, licence, ids. Free form, never interpreted."""

    def image(self) -> Image.Image:
        """Decodes the image: RGB, upright, of the recorded size.

        Raises:
            ValueError: the image is broken, too large, or of another size than recorded.
        """
        image = decode_image(self.image_bytes, self.key)
        if image.size != (self.width_px, self.height_px):
            raise ValueError(
                f"sample {self.key}: the image is {image.size[0]} x {image.size[1]} px, but its record says "
                f"{self.width_px} x {self.height_px}. Build the shard again from its source."
            )
        return image

    def pixels(self, reduction: int) -> tuple[NDArray[np.uint8], int]:
        """Decodes the image, an ordinary JPEG at 1/reduction of its size (rounded up) and anything else in full.

        Args:
            reduction: 1, 2, 4 or 8.

        Returns:
            uint8[h, w, 3], RGB, upright; and how many times smaller it is than recorded.

        Raises:
            ValueError: as `image`.
        """
        pixels = decode_jpeg(self.image_bytes, self.width_px, self.height_px, reduction)
        return (np.asarray(self.image()), 1) if pixels is None else (pixels, reduction)

    def segment_map(self) -> NDArray[np.uint8] | NDArray[np.uint16] | None:
        """uint8 or uint16[H, W], position of each pixel's segment from 1, 0 for none; None where segments carry RLE.

        Raises:
            ValueError: the map is not a grey PNG of the recorded size, or points at no segment.
        """
        if self.segment_map_png is None:
            return None
        try:
            with Image.open(io.BytesIO(self.segment_map_png), formats=("PNG",)) as png:
                mode, size = png.mode, png.size
                if size == (self.width_px, self.height_px) and mode in {"L", "I", "I;16"}:
                    array = np.asarray(png)
                    array = array if mode == "L" else array.astype(np.uint16)
                else:
                    array = None
        except BROKEN_IMAGE as error:
            raise ValueError(f"sample {self.key}: the segment map cannot be decoded ({error}).") from error
        if array is None:
            raise ValueError(
                f"sample {self.key}: the segment map is {mode} {size[0]} x {size[1]} px; it must be a grey PNG "
                f"(8 or 16 bit) of {self.width_px} x {self.height_px} px. Build the shard again."
            )
        if array.max(initial=0) > len(self.segments):
            raise ValueError(
                f"sample {self.key}: the segment map points at segment {array.max()}, but there are "
                f"{len(self.segments)}. Build the shard again."
            )
        return array

    def runs(self, index: int) -> NDArray[np.int64]:
        """int64[R], lengths of a segment's runs, background first, column by column; they fill the image.

        Raises:
            ValueError: its RLE is missing or broken, or of another size.
        """
        try:
            runs = decode_runs(self.segments[index].rle or "")
            check_fills(runs, self.height_px, self.width_px)
        except ValueError as error:
            raise ValueError(f"sample {self.key}: segment {self.segments[index].id} {error}.") from error
        return runs

    def mask(self, index: int, segment_map: NDArray | None = None) -> NDArray[np.bool_]:
        """bool[H, W], one segment's pixels.

        Args:
            index: position of the segment.
            segment_map: what `segment_map()` returned, so that many masks decode it once.
        """
        if self.segments[index].rle is not None:
            return fill(self.runs(index), self.height_px, self.width_px)
        decoded = self.segment_map() if segment_map is None else segment_map
        if decoded is None:
            raise ValueError(f"sample {self.key}: segment {self.segments[index].id} has neither RLE nor a segment map.")
        inside: NDArray[np.bool_] = decoded == index + 1
        return inside


def box_of(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Tight x, y, width, height of bool[H, W]; all zero for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return (0, 0, 0, 0)
    x, y = int(columns[0]), int(rows[0])
    return (x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1)


def encode_segment_map(segment_map: NDArray[np.uint16]) -> bytes:
    """Grey PNG of uint16[H, W], with 8 bits where they are enough."""
    narrow = segment_map.astype(np.uint8) if segment_map.max(initial=0) < 256 else segment_map
    out = io.BytesIO()
    Image.fromarray(narrow).save(out, format="PNG", optimize=True)
    return out.getvalue()


def encode(record: Record) -> dict[str, bytes]:
    """A record as tar members, from ending to bytes, in the order in which they are written."""
    segments = []
    for segment in record.segments:
        row: dict[str, Any] = {"id": segment.id, "area_px": segment.area_px, "bbox_xywh_px": segment.bbox_xywh_px}
        if segment.class_id is not None:
            row["class_id"] = segment.class_id
        if segment.name is not None:
            row["name"] = segment.name
        if segment.iscrowd:
            row["iscrowd"] = True
        if segment.rle is not None:
            row["rle"] = segment.rle
        segments.append(row)
    meta = {
        "schema": SCHEMA,
        "height_px": record.height_px,
        "width_px": record.width_px,
        "segments": segments,
        "source": dict(record.source),
    }
    members = {record.image_ending: record.image_bytes}
    members["json"] = json.dumps(meta, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
    if record.segment_map_png is not None:
        members["seg.png"] = record.segment_map_png
    return members


def decode(key: str, members: Mapping[str, bytes]) -> Record:
    """A record from its tar members; pixels stay encoded.

    Raises:
        ValueError: a member is missing, the JSON is not a record of this schema, the size is impossible, two segments
            share an id, or a segment has neither RLE nor a segment map.
    """
    ending = next((e for e in IMAGE_ENDINGS if e in members), None)
    if ending is None or "json" not in members:
        raise ValueError(
            f"sample {key}: it holds {sorted(members)}, but a record needs .json and one of "
            f"{', '.join('.' + e for e in IMAGE_ENDINGS)}. Was the shard cut off? `osm shards build` makes it again."
        )
    meta, segments = _facts(key, members)
    try:
        record = Record(
            key=key,
            image_bytes=members[ending],
            image_ending=ending,
            height_px=int(meta["height_px"]),
            width_px=int(meta["width_px"]),
            segments=segments,
            segment_map_png=members.get("seg.png"),
            source=dict(meta.get("source", {})),
        )
        if min(record.height_px, record.width_px) < 1 or record.height_px * record.width_px > MAX_IMAGE_PIXELS:
            raise ValueError(f"{record.width_px} x {record.height_px} px is no picture's size")
    except (LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise _no_record(key, error) from error
    if any((segment.rle is None) != (record.segment_map_png is not None) for segment in segments):
        raise ValueError(
            f"sample {key}: its segments must all be in the .seg.png, or all carry RLE. Build the shard again."
        )
    return record


def decode_segments(key: str, members: Mapping[str, bytes]) -> tuple[Segment, ...]:
    """A sample's segments from its `.json` alone.

    Raises:
        ValueError: the JSON is missing or not a record of this schema, or two segments share an id.
    """
    return _facts(key, members)[1]


def _facts(key: str, members: Mapping[str, bytes]) -> tuple[Mapping[str, Any], tuple[Segment, ...]]:
    try:
        meta = json.loads(members["json"])
        if meta["schema"] != SCHEMA:
            raise ValueError(f"schema {meta['schema']}, but this version reads schema {SCHEMA}")
        segments = tuple(_segment(row) for row in meta["segments"])
        if len({segment.id for segment in segments}) < len(segments):
            raise ValueError("two segments share an id")
    except (LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise _no_record(key, error) from error
    return meta, segments


def _no_record(key: str, error: Exception) -> ValueError:
    return ValueError(f"sample {key}: its JSON is not a record ({error!r}). Build the shard again.")


def _segment(row: Mapping[str, Any]) -> Segment:
    box: Sequence[int] = row["bbox_xywh_px"]
    for key in ("name", "rle"):
        if not isinstance(row.get(key), str | None):
            raise TypeError(f"{key} {row[key]!r} of segment {row['id']!r} is not a text")
    return Segment(
        id=str(row["id"]),
        class_id=None if row.get("class_id") is None else int(row["class_id"]),
        name=row.get("name"),
        iscrowd=bool(row.get("iscrowd", False)),
        area_px=int(row["area_px"]),
        bbox_xywh_px=(int(box[0]), int(box[1]), int(box[2]), int(box[3])),
        rle=row.get("rle"),
    )
