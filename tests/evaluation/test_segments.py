"""Masks in every layout come out as the pixels that went in; what is broken is refused with a word of what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_rle

from osm_lightning.evaluation.segments import SegmentSource, read_segments
from osm_lightning.record import Record, box_of
from osm_lightning.rle import area_and_box, decode_runs, encode_rle, to_rle

HEIGHT, WIDTH = 12, 20
SQUARE = np.zeros((HEIGHT, WIDTH), dtype=bool)
SQUARE[2:7, 3:9] = True
TALL = np.zeros((HEIGHT, WIDTH), dtype=bool)
TALL[:, 10:13] = True
POLYGON = [3, 2, 9, 2, 9, 7, 3, 7]
"""SQUARE's corners."""


def save_image(path: Path, width: int = WIDTH, height: int = HEIGHT, **options: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 90, dtype=np.uint8)).save(path, **options)
    return path


def save_json(path: Path, data: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def compressed(mask: np.ndarray) -> dict[str, Any]:
    return {"size": list(mask.shape), "counts": encode_rle(mask)}


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    return {"size": list(mask.shape), "counts": decode_runs(encode_rle(mask)).tolist()}


def instance_json(path: Path, name: str = "a.jpg", size: tuple[int, int] = (HEIGHT, WIDTH), **annotation: Any) -> Path:
    row = {"id": 41, "image_id": 7, "segmentation": compressed(SQUARE)} | annotation
    image = {"id": 7, "file_name": name, "height": size[0], "width": size[1]}
    return save_json(path, {"images": [image], "annotations": [row], "categories": []})


def masks_of(record: Record) -> dict[str, np.ndarray]:
    return {segment.id: record.mask(index) for index, segment in enumerate(record.segments)}


def assert_facts(record: Record) -> None:
    for index, segment in enumerate(record.segments):
        mask = record.mask(index)
        assert (segment.area_px, segment.bbox_xywh_px) == (mask.sum(), box_of(mask))
        assert (segment.class_id, segment.name, segment.iscrowd) == (None, None, False)


def assert_masks(source: SegmentSource, expected: dict[str, dict[str, np.ndarray]]) -> None:
    source.refuse(source.problems(range(len(source))))
    records = [source[index] for index in range(len(source))]
    assert [record.key for record in records] == list(expected)
    for record in records:
        assert_facts(record)
        found = masks_of(record)
        assert list(found) == list(expected[record.key])
        for mask_id, mask in expected[record.key].items():
            np.testing.assert_array_equal(found[mask_id], mask)


# Layouts


@pytest.mark.parametrize("folder", ["annotations/panoptic", "panoptic"], ids=["of the same stem", "beside annotations"])
def test_coco_panoptic(tmp_path: Path, folder: str) -> None:
    save_image(tmp_path / "images/a.jpg")
    ids = np.where(SQUARE, 3 + 256 * 5 + 65536 * 2, 0) + np.where(TALL, 9, 0)
    png = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    (tmp_path / folder).mkdir(parents=True)
    Image.fromarray(png).save(tmp_path / folder / "a.png")
    infos = [
        {"id": 9, "category_id": 1, "iscrowd": 1},
        {"id": 132355, "category_id": 2, "area": 1, "bbox": [0, 0, 1, 1]},
    ]
    data = {
        "images": [{"id": 7, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": [{"image_id": 7, "file_name": "a.png", "segments_info": infos}],
    }
    masks = save_json(tmp_path / "annotations/panoptic.json", data)
    assert_masks(read_segments(tmp_path / "images", masks), {"a": {"9": TALL, "132355": SQUARE}})


@pytest.mark.parametrize("segmentation", [compressed(SQUARE), uncompressed(SQUARE), [POLYGON]])
def test_coco_instances(tmp_path: Path, segmentation: object) -> None:
    image = save_image(tmp_path / "a.PNG")
    masks = instance_json(tmp_path / "masks.json", name="val/a.jpg", segmentation=segmentation, iscrowd=1)
    assert_masks(read_segments(image, masks), {"a": {"41": SQUARE}})


def test_polygons_of_one_annotation_are_one_mask(tmp_path: Path) -> None:
    image = save_image(tmp_path / "a.webp")
    masks = instance_json(tmp_path / "masks.json", segmentation=[POLYGON, [10, 0, 13, 0, 13, 12, 10, 12]])
    assert_masks(read_segments(image, masks), {"a": {"41": SQUARE | TALL}})


def test_coco_results_match_image_ids_and_count_positions(tmp_path: Path) -> None:
    for name in ("000000000012.jpg", "000000000007.jpeg", "000000000099.jpg"):
        save_image(tmp_path / "images" / name)
    rows = [
        {"image_id": 12, "segmentation": compressed(TALL), "score": 0.5},
        {"image_id": 7, "segmentation": compressed(SQUARE)},
        {"image_id": 12, "segmentation": compressed(SQUARE)},
        {"image_id": 500, "segmentation": compressed(SQUARE)},
    ]
    source = read_segments(tmp_path / "images", save_json(tmp_path / "results.json", rows))
    assert_masks(source, {"000000000007": {"0": SQUARE}, "000000000012": {"0": TALL, "1": SQUARE}})
    assert source.num_images_without_masks == 1


def test_sam_list_of_the_only_image(tmp_path: Path) -> None:
    image = save_image(tmp_path / "photo.jpg")
    rows = [{"segmentation": compressed(TALL), "area": 1, "bbox": [0, 0, 1, 1]}, {"segmentation": uncompressed(SQUARE)}]
    expected = {"photo": {"0": TALL, "1": SQUARE}}
    assert_masks(read_segments(image, save_json(tmp_path / "sam.json", rows)), expected)
    wrapped = save_json(tmp_path / "sa1b.json", {"image": {"file_name": "photo.jpg"}, "annotations": rows})
    assert_masks(read_segments(image, wrapped), expected)


def test_folder_of_sam_lists_and_of_binary_pngs(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.jpg", "c.jpg"):
        save_image(tmp_path / "images" / name)
    for name in ("._b.jpg", "notes.txt"):
        (tmp_path / "images" / name).touch()
    save_json(tmp_path / "masks/a.json", [{"segmentation": compressed(TALL)}])
    (tmp_path / "masks/b").mkdir()
    for mask_id, mask in (("10", TALL), ("9", SQUARE)):
        Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / f"masks/b/{mask_id}.png")
    (tmp_path / "masks/b/metadata.csv").touch()
    source = read_segments(tmp_path / "images", tmp_path / "masks")
    assert_masks(source, {"a": {"0": TALL}, "b": {"9": SQUARE, "10": TALL}})
    assert source.num_images_without_masks == 1


def binary_pngs() -> dict[str, Image.Image]:
    grey = Image.fromarray(SQUARE.astype(np.uint8))
    palette = grey.convert("P")
    palette.putpalette([255, 255, 255, 0, 0, 0])
    white = np.where(SQUARE[..., None], 255, 0).astype(np.uint8)
    cut_out = np.concatenate([np.zeros((HEIGHT, WIDTH, 3), np.uint8), white], axis=-1)
    opaque = np.concatenate([white.repeat(3, axis=-1), np.full((HEIGHT, WIDTH, 1), 255, np.uint8)], axis=-1)
    return {
        "1": Image.fromarray(SQUARE),
        "L": grey,
        "I;16": Image.fromarray(SQUARE.astype(np.uint16) * 256),
        "P": palette,
        "RGB": Image.fromarray(white.repeat(3, axis=-1)),
        "black cut-out": Image.fromarray(cut_out),
        "opaque RGBA": Image.fromarray(opaque),
    }


@pytest.mark.parametrize("kind", list(binary_pngs()))
def test_binary_png_of_any_mode(tmp_path: Path, kind: str) -> None:
    image = save_image(tmp_path / "a.jpg")
    (tmp_path / "masks/a").mkdir(parents=True)
    binary_pngs()[kind].save(tmp_path / "masks/a/m.png")
    assert_masks(read_segments(image, tmp_path / "masks"), {"a": {"m": SQUARE}})


def test_order_is_that_of_keys_not_of_file_names(tmp_path: Path) -> None:
    for stem in ("a", "a-b"):
        save_image(tmp_path / f"images/{stem}.jpg")
        save_json(tmp_path / f"masks/{stem}.json", [{"segmentation": compressed(SQUARE)}])
    assert_masks(read_segments(tmp_path / "images", tmp_path / "masks"), {"a": {"0": SQUARE}, "a-b": {"0": SQUARE}})


def test_image_is_upright_and_its_bytes_are_kept(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = save_image(tmp_path / "a.jpg", width=HEIGHT, height=WIDTH, exif=exif)
    record = read_segments(image, instance_json(tmp_path / "masks.json"))[0]
    assert (record.width_px, record.height_px) == (WIDTH, HEIGHT) == record.image().size
    assert record.image_bytes == image.read_bytes()
    assert record.source == {"file_name": "a.jpg"}


def test_coco_mini_panoptic() -> None:
    if "OSM_SHARED_DATA" not in os.environ:
        pytest.skip("OSM_SHARED_DATA is not set")
    root = Path(os.environ["OSM_SHARED_DATA"]) / "coco_mini"
    masks = root / "annotations/panoptic_val2017.json"
    source = read_segments(root / "val2017", masks)
    infos = {
        Path(row["file_name"]).stem: {str(info["id"]): info for info in row["segments_info"]}
        for row in json.loads(masks.read_text())["annotations"]
    }
    assert len(source) == len(infos) == 50
    for index in range(5):
        record = source[index]
        assert {segment.id for segment in record.segments} == set(infos[record.key])
        for segment in record.segments:
            info = infos[record.key][segment.id]
            assert (segment.area_px, list(segment.bbox_xywh_px)) == (info["area"], info["bbox"])


# RLE


def test_runs_and_facts_equal_pixels() -> None:
    draw = np.random.default_rng(0)
    for _ in range(200):
        height, width = draw.integers(1, 40, size=2)
        mask = draw.random((height, width)) < draw.choice([0.02, 0.5, 0.98, 1.0])
        counts = encode_rle(mask)
        pixels = np.repeat(np.arange(len(decode_runs(counts))) % 2, decode_runs(counts)).astype(bool)
        np.testing.assert_array_equal(pixels.reshape((height, width), order="F"), mask)
        assert area_and_box(counts, int(height)) == (mask.sum(), box_of(mask))


def test_broken_counts_are_refused_or_decode_to_what_they_say() -> None:
    draw = np.random.default_rng(0)
    whole = encode_rle(SQUARE)
    num_accepted = 0
    for _ in range(3000):
        text = list(whole)
        for place in draw.integers(0, len(text), size=2):
            text[place] = chr(draw.integers(40, 120))
        counts = "".join(text)[: draw.integers(1, len(text) + 1)]
        try:
            accepted = to_rle({"size": [HEIGHT, WIDTH], "counts": counts}, HEIGHT, WIDTH)
        except ValueError:
            continue
        num_accepted += 1
        pixels = coco_rle.decode({"size": [HEIGHT, WIDTH], "counts": accepted.encode()})
        assert pixels.sum() == area_and_box(accepted, HEIGHT)[0]
    assert num_accepted > 0
