"""Records: round trips, and sizes, segment maps and JSON that lie."""

import dataclasses
import io
import json
import warnings
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from osm_lightning.record import (
    Record,
    Segment,
    box_of,
    decode,
    encode,
    encode_segment_map,
)
from osm_lightning.rle import encode_rle

HEIGHT, WIDTH = 8, 16
COLOUR = (200, 100, 50)


def packed(image: Image.Image, ending: str = "png", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format=ending, **options)
    return out.getvalue()


def plain(mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", (WIDTH, HEIGHT), COLOUR).convert(mode)


TEXT_BOMB = PngInfo()
TEXT_BOMB.add_text("comment", "x" * 4_000_000, zip=True)


def record_with(segment_map: NDArray[np.uint16] | None = None, num_segments: int = 2, **changes: Any) -> Record:
    segments = tuple(
        Segment(id=str(10 + i), class_id=i, area_px=1, bbox_xywh_px=(0, 0, 1, 1)) for i in range(num_segments)
    )
    if segment_map is None:
        segment_map = np.zeros((HEIGHT, WIDTH), np.uint16)
    record = Record("k", packed(plain(), "jpeg"), "jpg", HEIGHT, WIDTH, segments, encode_segment_map(segment_map))
    return dataclasses.replace(record, **changes)


# Round trips


@pytest.mark.parametrize(
    ("num_segments", "depth"), [(0, "L"), (1, "L"), (255, "L"), (256, "I;16"), (70_000 // 2, "I;16")]
)
def test_segment_map_comes_back_exactly(num_segments: int, depth: str) -> None:
    segment_map = np.zeros((300, 200), np.uint16)
    segment_map.flat[: num_segments + 1] = np.arange(num_segments + 1)
    png = encode_segment_map(segment_map)
    assert Image.open(io.BytesIO(png)).mode == depth
    record = record_with(segment_map, num_segments, height_px=300, width_px=200)
    decoded = decode("k", encode(record)).segment_map()
    assert decoded is not None
    assert decoded.dtype == (np.uint8 if depth == "L" else np.uint16)
    assert np.array_equal(decoded, segment_map)


def test_record_comes_back_equal_and_in_order() -> None:
    segments = (
        Segment("7", class_id=0, area_px=3, bbox_xywh_px=(1, 2, 3, 1)),
        Segment("é", name="chat noir", iscrowd=True),
    )
    record = record_with(segments=segments, source={"licence": "CC BY 4.0", "ids": [1, None]})
    members = encode(record)
    assert list(members) == ["jpg", "json", "seg.png"]
    assert decode("k", members) == record
    assert encode(decode("k", members)) == members
    assert members["jpg"] == record.image_bytes


def test_masks_by_map() -> None:
    segment_map = np.zeros((HEIGHT, WIDTH), np.uint16)
    segment_map[2:4, 3:9] = 2
    decoded = decode("k", encode(record_with(segment_map)))
    assert not decoded.mask(0).any()
    assert np.array_equal(decoded.mask(1), segment_map == 2)
    assert np.array_equal(decoded.mask(1, decoded.segment_map()), segment_map == 2)


def test_record_without_map_has_rle_only() -> None:
    mask = np.eye(HEIGHT, WIDTH, dtype=bool)
    record = record_with(segments=(Segment("1", rle=encode_rle(mask)),), segment_map_png=None)
    assert "seg.png" not in encode(record)
    decoded = decode("k", encode(record))
    assert decoded.segment_map() is None
    assert np.array_equal(decoded.mask(0), mask)


def test_box_of() -> None:
    mask = np.zeros((5, 9), bool)
    assert box_of(mask) == (0, 0, 0, 0)
    mask[1, 4] = mask[3, 7] = True
    assert box_of(mask) == (4, 1, 4, 3)


# Sizes and segment maps that lie


def test_image_keeps_the_recorded_size() -> None:
    assert record_with().image().size == (WIDTH, HEIGHT)
    with pytest.raises(ValueError, match="sample k: the image is 16 x 8 px, but its record says 8 x 16"):
        record_with(height_px=WIDTH, width_px=HEIGHT).image()


@pytest.mark.parametrize("mode", ["1", "P", "RGB", "RGBA", "LA"])
def test_map_that_is_not_grey_is_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"sample k: the segment map is {mode} 16 x 8 px"):
        record_with(segment_map_png=packed(plain(mode))).segment_map()


def test_map_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sample k: the segment map is L 8 x 16 px; .* of 16 x 8 px"):
        record_with(np.zeros((WIDTH, HEIGHT), np.uint16)).segment_map()


def test_map_that_points_at_no_segment_is_refused() -> None:
    with pytest.raises(ValueError, match="sample k: the segment map points at segment 3, but there are 2"):
        record_with(np.full((HEIGHT, WIDTH), 3, np.uint16)).segment_map()


@pytest.mark.parametrize(
    "data",
    [b"", packed(plain("L"), "jpeg"), packed(plain("L"))[:45], packed(plain("L"), pnginfo=TEXT_BOMB)],
    ids=["empty", "jpeg", "cut", "text bomb"],
)
def test_map_that_cannot_be_decoded_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="sample k: the segment map cannot be decoded"):
        record_with(segment_map_png=data).segment_map()


def test_map_above_pillows_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 3)
    with pytest.raises(ValueError, match=r"sample k: the segment map cannot be decoded .*decompression bomb"):
        record_with().segment_map()


def test_rle_of_another_size_is_refused_by_sample_and_segment() -> None:
    counts = encode_rle(np.ones((HEIGHT, WIDTH + 1), bool))
    record = record_with(segments=(Segment("31", rle=counts),), segment_map_png=None)
    with pytest.raises(
        ValueError, match="sample k: segment 31 has RLE runs that add up to 136, but a picture of 16 x 8 px"
    ):
        record.mask(0)


# Members and JSON that lie


def meta_of(**changes: Any) -> dict[str, bytes]:
    """The members of a good record, with some of the JSON's entries replaced, or taken out where they are ..."""
    members = encode(record_with())
    meta = json.loads(members["json"])
    meta.update(changes)
    meta = {key: value for key, value in meta.items() if value is not ...}
    return {**members, "json": json.dumps(meta).encode()}


ROW = {"id": "1", "area_px": 1, "bbox_xywh_px": [0, 0, 1, 1]}


def test_unchanged_members_are_good() -> None:
    assert len(decode("k", meta_of()).segments) == 2
    assert len(decode("k", meta_of(segments=[ROW])).segments) == 1


@pytest.mark.parametrize("missing", ["jpg", "json"])
def test_missing_member_is_named(missing: str) -> None:
    members = encode(record_with())
    del members[missing]
    with pytest.raises(
        ValueError, match=r"sample k: it holds .* a record needs \.json and one of \.jpg, \.png, \.webp"
    ):
        decode("k", members)


def test_missing_map_is_noticed_where_a_segment_needs_it() -> None:
    members = encode(record_with())
    del members["seg.png"]
    with pytest.raises(ValueError, match=r"sample k: its segments must all be in the \.seg\.png, or all carry RLE"):
        decode("k", members)


def test_a_mixture_of_map_and_rle_is_refused() -> None:
    record = record_with()
    mixed = dataclasses.replace(
        record, segments=(*record.segments, Segment("12", rle=encode_rle(np.eye(HEIGHT, WIDTH) > 0)))
    )
    with pytest.raises(ValueError, match=r"sample k: its segments must all be in the \.seg\.png, or all carry RLE"):
        decode("k", encode(mixed))


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"null", b"[]", b"3", b'"text"', b"[" * 100_000])
def test_json_that_is_no_object_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="sample k: its JSON is not a record"):
        decode("k", {**meta_of(), "json": data})


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"schema": "1"},
        {"schema": ...},
        {"segments": ...},
        {"segments": None},
        {"segments": "two"},
        {"segments": [ROW, ROW]},
        {"segments": [{**ROW, "id": ...}]},
        {"segments": [{**ROW, "bbox_xywh_px": [1, 2]}]},
        {"segments": [{**ROW, "bbox_xywh_px": "none"}]},
        {"segments": [{**ROW, "area_px": float("inf")}]},
        {"segments": [{**ROW, "area_px": float("nan")}]},
        {"segments": [{**ROW, "class_id": "cat"}]},
        {"segments": [{**ROW, "name": 3}]},
        {"segments": [{**ROW, "rle": [3, 4]}]},
        {"height_px": ...},
        {"height_px": None},
        {"height_px": 0},
        {"width_px": -16},
        {"height_px": 1e300},
        {"height_px": 20_000, "width_px": 20_000},
        {"source": 3},
    ],
    ids=lambda changes: ",".join(f"{key}={value}" for key, value in changes.items()),
)
def test_json_that_lies_is_refused(changes: dict[str, Any]) -> None:
    for row in changes["segments"] if isinstance(changes.get("segments"), list) else []:
        for key in [key for key, value in row.items() if value is ...]:
            del row[key]
    with pytest.raises(ValueError, match="sample k: its JSON is not a record"):
        decode("k", meta_of(**changes))


def test_other_schema_is_named() -> None:
    with pytest.raises(ValueError, match="schema 2, but this version reads schema 1"):
        decode("k", meta_of(schema=2))


def test_random_damage_to_a_record_is_a_value_error_or_harmless() -> None:
    members = encode(record_with(np.ones((HEIGHT, WIDTH), np.uint16)))
    draw = np.random.default_rng(0)
    messages = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata
        for trial in range(600):
            name = ("jpg", "json", "seg.png")[trial % 3]
            data = bytearray(members[name])
            for _ in range(draw.integers(1, 4)):
                data[draw.integers(len(data))] = draw.integers(256)
            damaged = {**members, name: bytes(data[: draw.integers(len(data)) + 1] if trial % 2 else data)}
            try:
                record = decode("k", damaged)
                record.image()
                record.mask(0)
            except ValueError as error:
                messages.append(str(error))
    assert len(messages) > 300
    assert [message for message in messages if not message.startswith(("sample k", "image k"))] == []
