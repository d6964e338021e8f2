"""Readings of the files that `six_layouts.py` writes, which know nothing of how they were written.

Each restates what the scripts of the field make of a layout (named there), as literally as it goes and with no code of
the project but its vocabularies. It asserts on the way that files fit each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_rle
from scipy import io as matlab
from six_layouts import IGNORED, LONG_SPLIT, OUTSIDE_A847, UNKNOWN_PC459
from six_truth import Region, image_id_of

from osm_lightning.vocabulary import load_vocabulary

Reading = dict[int, list[Region]]
"""From COCO's image id to what an image holds."""


def pixels(path: Path, mode: str) -> NDArray[np.int64]:
    with Image.open(path) as image:
        assert image.mode == mode, path
        return np.asarray(image).astype(np.int64)


def per_class(labels: NDArray[np.int64], ignored: Iterable[int]) -> list[Region]:
    classes = sorted(set(np.unique(labels).tolist()).difference(ignored))
    return [Region(class_id, False, labels == class_id) for class_id in classes]


def panoptic(json_path: Path, maps: Path, images: Path) -> Reading:
    content, found = json.loads(json_path.read_text()), {}
    rows = {row["id"]: row for row in content["images"]}
    for annotation in content["annotations"]:
        row = rows[annotation["image_id"]]
        ids = pixels(maps / annotation["file_name"], "RGB") @ [1, 256, 256**2]
        (picture,) = images.rglob(row["file_name"].replace("_gtFine_leftImg8bit", "_leftImg8bit"))
        with Image.open(picture) as image:
            assert image.size == ids.shape[::-1] == (row["width"], row["height"])
        assert set(np.unique(ids)) - {0} == {segment["id"] for segment in annotation["segments_info"]}
        found[image_id_of(row["file_name"])] = [
            Region(segment["category_id"], bool(segment["iscrowd"]), ids == segment["id"])
            for segment in annotation["segments_info"]
        ]
    return found


def coco_raw(src: Path, split: str) -> Reading:
    split = f"{split}2017"
    return panoptic(src / f"annotations/panoptic_{split}.json", src / f"panoptic_{split}", src / split)


def ade20k_prepared(src: Path, split: str) -> Reading:
    maps = src / f"ade20k_panoptic_{split}"
    return panoptic(maps.with_suffix(".json"), maps, src / "images" / LONG_SPLIT[split])


def cityscapes_prepared(src: Path, split: str) -> Reading:
    maps = src / f"gtFine/cityscapes_panoptic_{split}"
    return panoptic(maps.with_suffix(".json"), maps, src / "leftImg8bit" / split)


def ade20k_raw(src: Path, split: str) -> Reading:
    """Stuff from the semantic map, things from the instance map, whose categories are the things in their order."""
    vocabulary, found = load_vocabulary("ade20k"), {}
    things = [entry.id for entry in vocabulary if entry.kind == "thing"]
    for path in sorted((src / "annotations" / LONG_SPLIT[split]).iterdir()):
        classes = pixels(path, "L") - 1
        instances = pixels(src / "annotations_instance" / LONG_SPLIT[split] / path.name, "RGB")
        assert (src / "images" / LONG_SPLIT[split] / f"{path.stem}.jpg").is_file()
        regions = per_class(classes, [-1, *things])
        for number in set(np.unique(instances[..., 1]).tolist()) - {0}:
            mask = instances[..., 1] == number
            (category,) = np.unique(instances[mask][:, 0]).tolist()
            assert (classes[mask] == things[category - 1]).all(), "both maps agree"
            regions.append(Region(things[category - 1], False, mask))
        found[image_id_of(path.name)] = regions
    return found


def cityscapes_raw(src: Path, split: str) -> Reading:
    classes, found = load_vocabulary("cityscapes").by_id, {}
    for path in sorted((src / "gtFine" / split).rglob("*_gtFine_instanceIds.png")):
        ids = pixels(path, "I;16")
        labels = np.where(ids < 1000, ids, ids // 1000)
        np.testing.assert_array_equal(pixels(Path(str(path).replace("instanceIds", "labelIds")), "L"), labels)
        picture = Path(str(path).replace("gtFine/", "leftImg8bit/").replace("gtFine_instanceIds", "leftImg8bit"))
        assert pixels(picture, "RGB").shape[:2] == ids.shape
        regions = []
        for value in np.unique(ids).tolist():
            label = value if value < 1000 else value // 1000
            if label in classes:
                regions.append(Region(label, value < 1000 and classes[label].kind == "thing", ids == value))
        found[image_id_of(path.name)] = regions
    return found


def lvis_raw(src: Path, split: str) -> Reading:
    content = json.loads((src / f"lvis_v1_{split}.json").read_text())
    rows = {row["id"]: row for row in content["images"]}
    found: Reading = {image_id: [] for image_id in rows}
    for annotation in content["annotations"]:
        row = rows[annotation["image_id"]]
        with Image.open(src / "/".join(row["coco_url"].split("/")[-2:])) as image:
            assert image.size == (row["width"], row["height"])
        assert annotation["category_id"] not in row["neg_category_ids"]
        polygons = coco_rle.frPyObjects(annotation["segmentation"], row["height"], row["width"])
        mask = coco_rle.decode(coco_rle.merge(polygons)).astype(bool)
        assert annotation["area"] == mask.sum()
        found[row["id"]].append(Region(annotation["category_id"], False, mask))
    return found


def a847_raw(src: Path, split: str) -> Reading:
    table = (files("osm_lightning") / "vocabularies/a847.tsv").read_text(encoding="utf-8")
    rows = [line.split("\t") for line in table.splitlines()[1:]]
    class_of_index = {int(row[3]): int(row[0]) for row in rows}
    found = {}
    for path in sorted((src / "images/ADE" / LONG_SPLIT[split]).rglob("*_seg.png")):
        code = pixels(path, "RGB")
        index = code[..., 0] // 10 * 256 + code[..., 1]
        assert set(np.unique(index).tolist()) <= {0, OUTSIDE_A847, *class_of_index}
        assert path.with_name(path.name.replace("_seg.png", ".jpg")).is_file()
        labels = np.vectorize(lambda value: class_of_index.get(value, IGNORED), otypes=[np.int64])(index)
        found[image_id_of(path.name)] = per_class(labels, [IGNORED])
    return found


def a847_prepared(src: Path, split: str) -> Reading:
    maps, images = (src / f"{kind}_detectron2" / LONG_SPLIT[split] for kind in ("annotations", "images"))
    return tiffs(maps, images, [IGNORED])


def pc459_prepared(src: Path, split: str) -> Reading:
    maps, images = (src / kind / LONG_SPLIT[split] for kind in ("annotations_ctx459", "images"))
    return tiffs(maps, images, [IGNORED, UNKNOWN_PC459 - 1])


def tiffs(maps: Path, images: Path, ignored: Iterable[int]) -> Reading:
    found = {}
    for path in sorted(maps.iterdir()):
        labels = pixels(path, "I;16")
        with Image.open(images / f"{path.stem}.jpg") as image:
            assert image.size == labels.shape[::-1]
        found[image_id_of(path.name)] = per_class(labels, ignored)
    return found


def pc459_raw(src: Path, split: str) -> Reading:
    found = {}
    lists = (src / f"ImageSets/SegmentationContext/{split}.txt", src / f"pascalcontext_{split}.txt")
    names, other = (path.read_text().split() for path in lists)
    assert names == other
    for name in names:
        labels = matlab.loadmat(src / "trainval" / f"{name}.mat")["LabelMap"]
        assert labels.dtype == np.uint16
        assert (src / "JPEGImages" / f"{name}.jpg").is_file()
        found[image_id_of(name)] = per_class(labels.astype(np.int64) - 1, [-1, UNKNOWN_PC459 - 1])
    return found


READINGS: dict[tuple[str, str], Callable[[Path, str], Reading]] = {
    ("raw", "coco"): coco_raw,
    ("raw", "ade20k"): ade20k_raw,
    ("raw", "cityscapes"): cityscapes_raw,
    ("raw", "lvis"): lvis_raw,
    ("raw", "a847"): a847_raw,
    ("raw", "pc459"): pc459_raw,
    ("prepared", "ade20k"): ade20k_prepared,
    ("prepared", "cityscapes"): cityscapes_prepared,
    ("prepared", "a847"): a847_prepared,
    ("prepared", "pc459"): pc459_prepared,
}
