"""Writes COCO's images in the raw layouts of the six datasets, each with its own vocabulary (`six_truth.py`).

`RAW` are the folders of the downloads; `PREPARED` those that the preparation scripts of the field make of them:
Mask2Former's for ADE20K, cityscapesScripts' for Cityscapes, FC-CLIP's for A-847 (which also shrinks large images; here
they keep their size) and PC-459. The facts were taken from these scripts. Files that say nothing about masks are left
out. Regions whose class has no counterpart get what the dataset has for "something else"; pixels that COCO leaves
unlabelled are unlabelled everywhere. File names carry COCO's image ids.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from outlines import polygons_of
from PIL import Image
from scipy import io as matlab
from six_truth import SPLITS, CocoImage, Region, counterparts, expected, read_coco

from osm_lightning.record import box_of
from osm_lightning.vocabulary import load_vocabulary

RAW = {
    "coco": "coco",
    "ade20k": "ADEChallengeData2016",
    "cityscapes": "cityscapes",
    "lvis": "lvis",
    "a847": "ADE20K_2021_17_01",
    "pc459": "VOCdevkit/VOC2010",
}
"""From dataset to its folder, below `raw/`."""
PREPARED = {
    "ade20k": "ADEChallengeData2016",
    "cityscapes": "cityscapes",
    "a847": "ADE20K_2021_17_01",
    "pc459": "pascal_ctx_d2",
}
"""From dataset to its folder, below `prepared/`."""
LONG_SPLIT = {"train": "training", "val": "validation"}

OUTSIDE_A847 = 3050
"""Index of "window" in ADE20K's full list, which A-847 leaves out (it has "windowpane")."""
STATIC = 4
"""Cityscapes' label of things that stand around and are not evaluated."""
UNKNOWN_PC459 = 431
"""PASCAL-Context's "unknown", counted from 1 as in its .mat files."""
IGNORED = 65535
"""No class, in prepared 16-bit maps."""
CITIES = {"train": ("aachen", "bochum"), "val": ("frankfurt", "lindau")}
SCENES = ("home_or_hotel/living_room", "urban/street")


def write_six(src: Path, out: Path, limit: int | None = None) -> list[CocoImage]:
    """Writes all images in all layouts, to `out/raw/<RAW>` and `out/prepared/<PREPARED>`.

    Args:
        src: folder in COCO's panoptic layout, PNGs beside the images.
        out: folder to write to.
        limit: at most so many images of each split.

    Returns:
        The images; `six_truth.expected` says what a reader must make of each.
    """
    images = read_coco(src, limit)
    _write_coco(images, src, out / "raw" / RAW["coco"])
    _write_lvis(images, out / "raw" / RAW["lvis"])
    writers = {"ade20k": _write_ade20k, "cityscapes": _write_cityscapes, "a847": _write_a847, "pc459": _write_pc459}
    for dataset, write in writers.items():
        write(images, out / "raw" / RAW[dataset], out / "prepared" / PREPARED[dataset])
    return images


def _write_coco(images: Sequence[CocoImage], src: Path, raw: Path) -> None:
    kept = {image.id for image in images}
    for split in SPLITS:
        name = f"annotations/panoptic_{split}2017.json"
        content = json.loads((src / name).read_text())
        content["images"] = [row for row in content["images"] if row["id"] in kept]
        content["annotations"] = [row for row in content["annotations"] if row["image_id"] in kept]
        _write_json(content, raw / name)
    for image in images:
        for path in (image.jpeg, image.png):
            _copy(path, raw / path.relative_to(src))


def _write_lvis(images: Sequence[CocoImage], raw: Path) -> None:
    """Crowds are not annotated: their class is not exhaustive in that image."""
    known = counterparts("lvis")
    categories = [
        {"id": entry.id, "name": entry.names[0].replace(" ", "_"), "synonyms": list(entry.names)}
        for entry in load_vocabulary("lvis")
    ]
    for split in SPLITS:
        rows: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image in (image for image in images if image.split == split):
            _copy(image.jpeg, raw / f"{split}2017" / image.jpeg.name)
            regions = expected(image, "lvis")
            for region in regions:
                annotation = {
                    "id": len(annotations) + 1,
                    "image_id": image.id,
                    "category_id": region.class_id,
                    "segmentation": polygons_of(region.mask),
                    "area": float(region.mask.sum()),
                    "bbox": [float(value) for value in box_of(region.mask)],
                }
                annotations.append(annotation)
            crowded = {s["category_id"] for s in image.segments if s["iscrowd"]}
            present = {known[s["category_id"]].id for s in image.segments if s["category_id"] in known}
            row = {key: value for key, value in image.row.items() if key != "file_name"}
            row["not_exhaustive_category_ids"] = sorted(known[c].id for c in crowded if c in known)
            row["neg_category_ids"] = sorted({entry.id for entry in known.values()} - present)[:3]
            rows.append(row)
        content = {"info": {}, "licenses": [], "images": rows, "annotations": annotations, "categories": categories}
        _write_json(content, raw / f"lvis_v1_{split}.json")


def _write_ade20k(images: Sequence[CocoImage], raw: Path, prepared: Path) -> None:
    """Crowds of things are in the semantic map only, which the panoptic form leaves out."""
    known = counterparts("ade20k")
    things = [entry.id for entry in load_vocabulary("ade20k") if entry.kind == "thing"]
    tables = _panoptic_tables("ade20k")
    for image in images:
        folder, name = LONG_SPLIT[image.split], f"ADE_{image.split}_{image.id:08}"
        for root in (raw, prepared):
            _copy(image.jpeg, root / "images" / folder / f"{name}.jpg")
        classes = image.paint(lambda s: known[s["category_id"]].id + 1 if s["category_id"] in known else 0)
        _save(classes.astype(np.uint8), raw / "annotations" / folder / f"{name}.png")

        regions = expected(image, "ade20k")
        instances = np.zeros((*classes.shape, 3), np.uint8)
        for number, region in enumerate((r for r in regions if r.class_id in things), start=1):
            instances[region.mask] = (things.index(region.class_id) + 1, number, 0)
        _save(instances, raw / "annotations_instance" / folder / f"{name}.png")

        ids = np.zeros_like(classes)
        by_id = {1000 * (region.class_id + 1) + number: region for number, region in enumerate(regions)}
        for segment_id, region in by_id.items():
            ids[region.mask] = segment_id
        _save(_as_colours(ids), prepared / f"ade20k_panoptic_{image.split}/{name}.png")
        _add(tables, image, name, f"{name}.jpg", f"{name}.png", by_id)
    for split, table in tables.items():
        _write_json(table, prepared / f"ade20k_panoptic_{split}.json")


def _write_cityscapes(images: Sequence[CocoImage], raw: Path, prepared: Path) -> None:
    classes = load_vocabulary("cityscapes").by_id
    tables = _panoptic_tables("cityscapes")
    for image in images:
        city = CITIES[image.split][image.id % 2]
        name, below = f"{city}_{image.id:06}_000019", Path(image.split, city)
        picture = Path("leftImg8bit") / below / f"{name}_leftImg8bit.png"
        with Image.open(image.jpeg) as jpeg:
            _save(np.asarray(jpeg.convert("RGB")), raw / picture)
        _copy(raw / picture, prepared / picture)

        ids = _cityscapes_ids(image)
        labels = np.where(ids < 1000, ids, ids // 1000)
        _save(ids.astype(np.uint16), raw / "gtFine" / below / f"{name}_gtFine_instanceIds.png")
        _save(labels.astype(np.uint8), raw / "gtFine" / below / f"{name}_gtFine_labelIds.png")

        evaluated = np.isin(labels, list(classes))
        by_id = {}
        for segment_id in np.unique(ids[evaluated]).tolist():
            label = segment_id if segment_id < 1000 else segment_id // 1000
            iscrowd = segment_id < 1000 and classes[label].kind == "thing"
            by_id[segment_id] = Region(label, iscrowd, ids == segment_id)
        map_name = f"{name}_gtFine_panoptic.png"
        colours = _as_colours(np.where(evaluated, ids, 0))
        _save(colours, prepared / f"gtFine/cityscapes_panoptic_{image.split}" / map_name)
        _add(tables, image, name, f"{name}_gtFine_leftImg8bit.png", map_name, by_id)
    for split, table in tables.items():
        _write_json(table, prepared / f"gtFine/cityscapes_panoptic_{split}.json")


def _cityscapes_ids(image: CocoImage) -> NDArray[np.int64]:
    """int64[H, W]: label of stuff and of groups of things, 1000 * label + number of single things."""
    known = counterparts("cityscapes")
    num_things: Counter[int] = Counter()

    def value_of(segment: Mapping[str, Any]) -> int:
        entry = known.get(segment["category_id"])
        if entry is None:
            return STATIC
        if entry.kind != "thing" or segment["iscrowd"]:
            return entry.id
        num_things[entry.id] += 1
        return 1000 * entry.id + num_things[entry.id] - 1

    return image.paint(value_of)


def _write_a847(images: Sequence[CocoImage], raw: Path, prepared: Path) -> None:
    known = counterparts("a847")
    table = files("osm_lightning") / "vocabularies" / "a847.tsv"
    rows = csv.DictReader(table.read_text(encoding="utf-8").splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    index_of_class = {int(row["id"]): int(row["other_id"]) for row in rows}
    for image in images:
        folder, name = LONG_SPLIT[image.split], f"ADE_{image.split}_{image.id:08}"
        scene = raw / "images/ADE" / folder / SCENES[image.id % 2]
        _copy(image.jpeg, scene / f"{name}.jpg")
        ids = image.segment_ids()
        code, labels = np.zeros((*ids.shape, 3), np.uint8), np.full(ids.shape, IGNORED, np.uint16)
        for number, segment in enumerate(image.segments, start=1):
            mask, entry = ids == segment["id"], known.get(segment["category_id"])
            index = OUTSIDE_A847 if entry is None else index_of_class[entry.id]
            code[mask] = (index // 256 * 10, index % 256, 5 * number)  # blue tells objects apart, in steps of 5
            labels[mask] = IGNORED if entry is None else entry.id
        _save(code, scene / f"{name}_seg.png")

        _copy(image.jpeg, prepared / "images_detectron2" / folder / f"{name}.jpg")
        _save(labels, prepared / "annotations_detectron2" / folder / f"{name}.tif")


def _write_pc459(images: Sequence[CocoImage], raw: Path, prepared: Path) -> None:
    """The .mat files count classes from 1. Split lists are written under the names of mmsegmentation and of OVSeg."""
    known = counterparts("pc459")
    stems: dict[str, list[str]] = {split: [] for split in SPLITS}
    for image in images:
        folder, name = LONG_SPLIT[image.split], f"2008_{image.id:06}"
        stems[image.split].append(name)
        _copy(image.jpeg, raw / "JPEGImages" / f"{name}.jpg")
        labels = image.paint(lambda s: known[s["category_id"]].id + 1 if s["category_id"] in known else UNKNOWN_PC459)
        path = _made(raw / "trainval" / f"{name}.mat")
        matlab.savemat(path, {"LabelMap": labels.astype(np.uint16)}, do_compression=True)

        _copy(image.jpeg, prepared / "images" / folder / f"{name}.jpg")
        shifted = np.where(labels > 0, labels - 1, IGNORED).astype(np.uint16)
        _save(shifted, prepared / "annotations_ctx459" / folder / f"{name}.tif")
    for split, names in stems.items():
        for path in (raw / f"ImageSets/SegmentationContext/{split}.txt", raw / f"pascalcontext_{split}.txt"):
            _made(path).write_text("".join(f"{name}\n" for name in names))
    listed = [f"{entry.id + 1}: {entry.names[0]}\n" for entry in load_vocabulary("pc459")]
    (raw / "labels.txt").write_text("".join(listed))


def _panoptic_tables(dataset: str) -> dict[str, dict[str, Any]]:
    """For each split an empty table in COCO's panoptic format."""
    categories = [
        {"id": entry.id, "name": entry.names[0], "isthing": int(entry.kind == "thing")}
        for entry in load_vocabulary(dataset)
    ]
    return {split: {"images": [], "annotations": [], "categories": categories} for split in SPLITS}


def _add(
    tables: dict[str, dict[str, Any]],
    image: CocoImage,
    image_id: str,
    file_name: str,
    map_name: str,
    by_id: Mapping[int, Region],
) -> None:
    """Adds an image and its segments to its split's table."""
    size = {side: image.row[side] for side in ("width", "height")}
    segments = [
        {
            "id": segment_id,
            "category_id": region.class_id,
            "area": int(region.mask.sum()),
            "bbox": list(box_of(region.mask)),
            "iscrowd": int(region.iscrowd),
        }
        for segment_id, region in by_id.items()
    ]
    table = tables[image.split]
    table["images"].append({"id": image_id, "file_name": file_name, **size})
    table["annotations"].append({"image_id": image_id, "file_name": map_name, "segments_info": segments})


def _as_colours(ids: NDArray[np.int64]) -> NDArray[np.uint8]:
    """uint8[H, W, 3], segment ids as COCO writes them: red + 256 green + 256^2 blue."""
    return np.stack([ids % 256, ids // 256 % 256, ids // 256**2], axis=-1).astype(np.uint8)


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _copy(src: Path, path: Path) -> None:
    shutil.copyfile(src, _made(path))


def _save(array: NDArray[Any], path: Path) -> None:
    Image.fromarray(array).save(_made(path), compress_level=1)  # PNG's fastest; TIFF takes no notice


def _write_json(content: Mapping[str, Any], path: Path) -> None:
    _made(path).write_text(json.dumps(content))
