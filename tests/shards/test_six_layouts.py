"""The fixture `write_six`, and the project's readers on it: real images in the layouts of all six datasets.

Every mask of every layout, raw or prepared, is pixel by pixel the one of COCO's PNG, under the dataset's own class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from outlines import polygons_of
from PIL import Image
from pycocotools import mask as coco_rle
from scipy import io as matlab
from six_layouts import OUTSIDE_A847, PREPARED, RAW, STATIC, UNKNOWN_PC459, write_six
from six_readings import READINGS, Reading
from six_truth import DATASETS, SPLITS, CocoImage, Region, counterparts, expected, image_id_of, read_coco

from osm_lightning.record import Record, box_of
from osm_lightning.shard_index import read_index
from osm_lightning.shard_tar import read_record, read_table
from osm_lightning.shards.build import build_split
from osm_lightning.shards.layouts import find_layout
from osm_lightning.shards.write import ShardWriter
from osm_lightning.vocabulary import load_vocabulary

Six = tuple[Path, list[CocoImage]]
"""Where `write_six` wrote, and which images."""


@pytest.fixture(scope="module")
def six(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Six:
    """Two images of each split in all layouts; the first of each split has a crowd."""
    out = tmp_path_factory.mktemp("six")
    return out, write_six(shared_data / "coco_mini", out, limit=2)


@pytest.fixture(scope="module")
def all_images(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Six:
    """All images in all layouts."""
    out = tmp_path_factory.mktemp("all")
    return out, write_six(shared_data / "coco_mini", out)


def folder_of(out: Path, form: str, dataset: str) -> Path:
    return out / form / (RAW if form == "raw" else PREPARED)[dataset]


def comparable(regions: Iterable[Region]) -> list[tuple[int, bool, bytes]]:
    return sorted((region.class_id, region.iscrowd, region.mask.tobytes()) for region in regions)


def assert_same(found: Reading, images: list[CocoImage], dataset: str) -> None:
    """Every image has exactly the masks that it must have. One that must have none may be left out."""
    assert set(found) <= {image.id for image in images}
    for image in images:
        assert comparable(found.get(image.id, [])) == comparable(expected(image, dataset)), (dataset, image.id)


def assert_files_hold(out: Path, images: list[CocoImage], form: str, dataset: str) -> None:
    found: Reading = {}
    for split in SPLITS:
        found |= READINGS[form, dataset](folder_of(out, form, dataset), split)
    assert_same(found, images, dataset)


@pytest.mark.parametrize(("form", "dataset"), READINGS)
def test_files_hold_the_masks_that_they_must(six: Six, form: str, dataset: str) -> None:
    assert_files_hold(*six, form, dataset)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "dataset"), READINGS)
def test_all_files_hold_the_masks_that_they_must(all_images: Six, form: str, dataset: str) -> None:
    assert len(all_images[1]) == 150
    assert_files_hold(*all_images, form, dataset)


# What makes the fixture worth its name: conflicts, crowds, regions of no class


def test_the_same_region_has_other_first_names() -> None:
    names = {class_.names[0]: class_.id for class_ in load_vocabulary("coco")}
    tv = {dataset: counterparts(dataset).get(names["tv"]) for dataset in DATASETS}
    assert {dataset: entry and entry.names[0] for dataset, entry in tv.items()} == {
        "coco": "tv",
        "ade20k": "television receiver",
        "cityscapes": None,
        "lvis": "television set",
        "a847": "television receiver",
        "pc459": "tvmonitor",
    }
    for dataset in DATASETS:
        for coco_id, entry in counterparts(dataset).items():
            assert set(entry.names).intersection(load_vocabulary("coco").by_id[coco_id].names)


@pytest.mark.parametrize("dataset", DATASETS[1:])
def test_every_dataset_contradicts_coco_on_real_masks(shared_data: Path, dataset: str) -> None:
    conflicts = conflicts_with_coco(read_coco(shared_data / "coco_mini"), dataset)
    assert sum(conflicts.values()) >= 50, conflicts
    assert len(conflicts) >= 5, conflicts


def conflicts_with_coco(images: Iterable[CocoImage], dataset: str) -> Counter[tuple[str, str]]:
    """How many segments that are no crowds have this first name in COCO and that one in the dataset."""
    coco, known = load_vocabulary("coco").by_id, counterparts(dataset)
    pairs: Counter[tuple[str, str]] = Counter()
    for image in images:
        for segment in image.segments:
            entry = known.get(segment["category_id"])
            if entry is not None and not segment["iscrowd"]:
                pairs[coco[segment["category_id"]].names[0], entry.names[0]] += 1
    return Counter({pair: num for pair, num in pairs.items() if pair[0] != pair[1]})


def test_masks_never_overlap_and_cover_what_has_a_class(six: Six) -> None:
    for dataset in DATASETS:
        known = counterparts(dataset)
        for image in six[1]:
            times = sum(region.mask.astype(int) for region in expected(image, dataset))
            kept = [
                segment["id"]
                for segment in image.segments
                if segment["category_id"] in known and not (segment["iscrowd"] and dataset in ("ade20k", "lvis"))
            ]
            np.testing.assert_array_equal(times, np.isin(image.segment_ids(), kept))


def test_crowds_are_what_each_dataset_has_for_them(six: Six) -> None:
    crowds = {
        dataset: sum(region.iscrowd for image in six[1] for region in expected(image, dataset)) for dataset in DATASETS
    }
    # Three of COCO's four are people; the fourth, of books, has no class in Cityscapes.
    assert crowds == {"coco": 4, "cityscapes": 3, "ade20k": 0, "lvis": 0, "a847": 0, "pc459": 0}


def test_regions_without_counterpart_have_the_code_for_something_else(six: Six) -> None:
    raw = six[0] / "raw"
    labels = [np.asarray(Image.open(path)) for path in (raw / RAW["cityscapes"]).rglob("*_labelIds.png")]
    assert all((values == STATIC).any() for values in labels)
    codes = [np.asarray(Image.open(path)).astype(int) for path in (raw / RAW["a847"]).rglob("*_seg.png")]
    assert any((code[..., 0] // 10 * 256 + code[..., 1] == OUTSIDE_A847).any() for code in codes)
    maps = [matlab.loadmat(path)["LabelMap"] for path in (raw / RAW["pc459"]).rglob("*.mat")]
    assert any((values == UNKNOWN_PC459).any() for values in maps)
    assert len(labels) == len(codes) == len(maps) == len(six[1])


def test_polygons_cover_exactly_their_mask() -> None:
    rng = np.random.default_rng(0)
    for density in (0.02, 0.3, 0.5, 0.7, 0.98):
        mask = rng.random((37, 53)) < density
        polygons = polygons_of(mask)
        rle = coco_rle.merge(coco_rle.frPyObjects(polygons, *mask.shape))
        np.testing.assert_array_equal(coco_rle.decode(rle), mask)
        ends = [set(zip(polygon[::2], polygon[1::2], strict=True)) for polygon in polygons]
        assert all(2 * len(points) == len(polygon) for points, polygon in zip(ends, polygons, strict=True)), "simple"


# The project's readers: what `osm shards build` makes of each folder


@pytest.mark.parametrize(("form", "dataset"), READINGS)
def test_shards_hold_the_masks_that_they_must(six: Six, tmp_path: Path, form: str, dataset: str) -> None:
    assert_builds(*six, form, dataset, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "dataset"), READINGS)
def test_all_images_become_shards(all_images: Six, tmp_path: Path, form: str, dataset: str) -> None:
    assert_builds(*all_images, form, dataset, tmp_path)


def assert_builds(out: Path, images: list[CocoImage], form: str, dataset: str, shards: Path) -> None:
    """Builds both splits as the command does: the layout is found by its files, and no image may be skipped."""
    vocabulary = load_vocabulary(dataset)
    src = folder_of(out, form, dataset)
    found: Reading = {}
    for split in (f"{split}2017" if dataset == "coco" else split for split in SPLITS):
        raw = find_layout(dataset, src, split).read(src, split, vocabulary)
        build_split(raw, ShardWriter(shards, dataset=dataset, split=split, vocabulary=vocabulary.key))
        for shard in read_index(shards).splits[split].shards:
            for entry in read_table(shards / shard.file):
                record = read_record(shards / shard.file, entry)
                found[image_id_of(record.key)] = regions_of(record)
                if dataset != "cityscapes":  # whose images are PNGs
                    (jpeg,) = (image.jpeg for image in images if image.id == image_id_of(record.key))
                    assert record.image_bytes == jpeg.read_bytes()
    assert_same(found, images, dataset)


def regions_of(record: Record) -> list[Region]:
    """A record's masks, of which the sizes and boxes must be true."""
    segment_map, regions = record.segment_map(), []
    for index, segment in enumerate(record.segments):
        mask = record.mask(index, segment_map)
        assert (segment.area_px, segment.bbox_xywh_px) == (mask.sum(), box_of(mask))
        assert segment.class_id is not None
        regions.append(Region(segment.class_id, segment.iscrowd, mask))
    return regions
