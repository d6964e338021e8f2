"""What is wrong with masks is said by name: where it stands, what it is, what it must be."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from osm_lightning.evaluation.segments import read_segments
from osm_lightning.rle import encode_rle, to_rle

HEIGHT, WIDTH = 12, 20
SQUARE = np.zeros((HEIGHT, WIDTH), dtype=bool)
SQUARE[2:7, 3:9] = True
RLE = {"size": [HEIGHT, WIDTH], "counts": encode_rle(SQUARE)}
EMPTY_RLE = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "a.jpg")
    return folder


def save(path: Path, data: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def instances(*annotations: dict[str, Any], **image: Any) -> dict[str, Any]:
    return {"images": [{"id": 1, "file_name": "a.jpg"} | image], "annotations": list(annotations)}


def panoptic(
    folder: Path, ids: list[Any], pixels: list[int], size: tuple[int, int] = (WIDTH, HEIGHT), **row: Any
) -> Path:
    """A panoptic JSON and PNG whose rows of pixels have the given ids in turn."""
    (folder / "p").mkdir()
    rows = np.resize(np.array(pixels, dtype=np.uint8), (size[1], 1))
    Image.fromarray(np.stack([np.tile(rows, (1, size[0]))] + [np.zeros(size[::-1], np.uint8)] * 2, axis=-1)).save(
        folder / "p/a.png"
    )
    annotation = {"image_id": 1, "file_name": "a.png", "segments_info": [{"id": i} for i in ids]} | row
    return save(folder / "p.json", instances(annotation))


# Paths and matching: before any pixel is read


def test_images_that_are_not_there(tmp_path: Path, images: Path) -> None:
    masks = save(tmp_path / "m.json", [{"segmentation": RLE}])
    with pytest.raises(ValueError, match=r"images: there is no file or folder .*/nowhere"):
        read_segments(tmp_path / "nowhere", masks)
    with pytest.raises(ValueError, match=r"m\.json is no image by its ending.*\.webp"):
        read_segments(masks, masks)
    (images / "a.jpg").unlink()
    with pytest.raises(ValueError, match=r"the folder .*images holds no image \(\.jpg, \.jpeg, \.png, \.webp\)"):
        read_segments(images, masks)
    Image.new("RGB", (WIDTH, HEIGHT)).save(images / "a.jpg")
    (images / "a-b.jpg").touch()
    (images / "a.png").touch()
    with pytest.raises(ValueError, match=r"a\.jpg and a\.png have the same stem"):
        read_segments(images, masks)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", r"m\.json is not JSON .*cut off"),
        ("[" * 100_000, r"m\.json is not JSON"),
        ({"shapes": [], "version": 5}, r"of no known layout: it holds an object with the keys shapes, version"),
        (3, r"of no known layout: it holds int 3"),
        ([3], r"entry 0 of a list is 3, not an object"),
        ([], r"m\.json holds no mask"),
        ({"images": [], "annotations": []}, r"none of the 1 images: looked for a, and it lists nothing"),
        ({"images": [{"id": 1}], "annotations": []}, r"no file_name or no id"),
        (instances(file_name="b.jpg"), r"none of the 1 images: looked for a, and it lists b"),
        (instances(), r"lists a, but has no annotation of these images"),
        (instances({"segmentation": RLE}), r"an annotation has no image_id"),
        (instances({"image_id": 1, "id": 5, "bbox": [0, 0, 2, 2]}), r"annotation 5 has no segmentation, only image_id"),
        (instances({"image_id": 1, "id": [5], "segmentation": RLE}), r"annotation 0 has the id \[5\]"),
        (instances(*[{"image_id": 1, "id": 5, "segmentation": RLE}] * 2), r"mask of one image 5 stands twice"),
        ([{"image_id": 4, "segmentation": RLE}], r"none of the 1 images: looked for the image ids a .* and it has 4"),
        ([{"image_id": 4, "segmentation": RLE}, {"segmentation": RLE}], r"an annotation has no image_id"),
    ],
)
def test_json_that_does_not_fit(tmp_path: Path, images: Path, data: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_segments(images, save(tmp_path / "m.json", data))


def test_two_rows_of_one_image(tmp_path: Path, images: Path) -> None:
    data = instances() | {"images": [{"id": 1, "file_name": "x/a.jpg"}, {"id": 2, "file_name": "y/a.jpg"}]}
    with pytest.raises(ValueError, match=r"two images of the name a: x/a\.jpg and y/a\.jpg"):
        read_segments(images, save(tmp_path / "m.json", data))


def test_two_images_of_one_id(tmp_path: Path, images: Path) -> None:
    for name in ("1.jpg", "01.jpg"):
        (images / name).touch()
    with pytest.raises(ValueError, match=r"image id that file names stand for: 1 stands twice"):
        read_segments(images, save(tmp_path / "m.json", [{"image_id": 1, "segmentation": RLE}]))


def test_masks_of_one_image_for_many(tmp_path: Path, images: Path) -> None:
    (images / "b.jpg").touch()
    with pytest.raises(ValueError, match=r"1 masks without image_id.* there are 2"):
        read_segments(images, save(tmp_path / "m.json", [{"segmentation": RLE}]))


def test_mask_folders_that_do_not_fit(tmp_path: Path, images: Path) -> None:
    with pytest.raises(ValueError, match=r"masks: there is no file or folder .*nowhere.*COCO panoptic"):
        read_segments(images, tmp_path / "nowhere")
    (tmp_path / "masks/z").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"none of the 1 images.*with the stems a\. It holds z\."):
        read_segments(images, tmp_path / "masks")
    for index in range(6):
        (images / f"b{index}.jpg").touch()
    with pytest.raises(ValueError, match=r"with the stems a, b0, b1, b2, b3, \.\.\. \(7 in all\)"):
        read_segments(images, tmp_path / "masks")
    save(tmp_path / "masks/a.json", 3)
    with pytest.raises(ValueError, match=r"a\.json is int, not a list"):
        read_segments(images, tmp_path / "masks")
    (tmp_path / "masks/a").mkdir()
    with pytest.raises(ValueError, match=r"holds both a/ and a\.json"):
        read_segments(images, tmp_path / "masks")
    (tmp_path / "masks/a.json").unlink()
    for name in ("1.png", "1.PNG"):
        (tmp_path / "masks/a" / name).touch()
    with pytest.raises(ValueError, match=r"mask 1 stands twice"):
        read_segments(images, tmp_path / "masks")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "../p/a.png"}, r"'\.\./p/a\.png' is not a path within"),
        ({"file_name": "/etc/a.png"}, r"is not a path within"),
        ({"file_name": None}, r"the file_name None is not a path within"),
        ({"file_name": "b.png"}, r"there is no .*/p/b\.png"),
        ({"segments_info": {"id": 1}}, r"segments_info of a\.png is not a list"),
        ({"segments_info": []}, r"has no segment of these images"),
        ({"segments_info": [{"id": -1}]}, r"segment id -1"),
        ({"segments_info": [{"id": 1}, {"id": 1}]}, r"segment of a\.png 1 stands twice"),
    ],
)
def test_panoptic_json_that_does_not_fit(tmp_path: Path, images: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_segments(images, panoptic(tmp_path, [1], [1], **row))


def test_panoptic_without_its_folder(tmp_path: Path, images: Path) -> None:
    masks = panoptic(tmp_path, [1], [1])
    masks = masks.rename(tmp_path / "q.json")
    with pytest.raises(ValueError, match=r"its PNG folder is neither .*/q nor .*/q\."):
        read_segments(images, masks)
    masks.rename(tmp_path / "p.json")
    data = json.loads((tmp_path / "p.json").read_text())
    with pytest.raises(ValueError, match=r"image 1 has 2 annotations"):
        read_segments(images, save(tmp_path / "p.json", data | {"annotations": data["annotations"] * 2}))


# Pixels: `problems` says it of all images, reading one says it of that one


def assert_unusable(images: Path, masks: Path, message: str) -> None:
    source = read_segments(images, masks)
    with pytest.raises(ValueError, match=message):
        source[0]
    with pytest.raises(ValueError, match="1 of 1 images and their masks cannot be used:\n" + message):
        source.refuse(source.problems(range(len(source))))


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [WIDTH, HEIGHT], "counts": RLE["counts"]}, r"is 12 x 20 px, but the image is 20 x 12 px"),
        (EMPTY_RLE, r"is empty"),
        ([], r"has an empty segmentation"),
        ([[1, 1, 5, 5]], r"polygon \[1, 1, 5, 5\].*at least three points"),
        ([[1, 1, 5, 5, 1, 5, 3]], r"at least three points"),
        ([[[1, 1], [5, 5], [1, 5]]], r"a polygon is a flat list"),
        ([[1, 1, 5, "5", 1, 5]], r"no number of pixels"),
        ([[1, 1, 5, float("nan"), 1, 5]], r"no number of pixels"),
        ([[1, 1, 5, 10**400, 1, 5]], r"no number of pixels"),
        ([[0, 0, 900000, 0, 0, 5]], r"far outside its image of 20 x 12 px"),
        ([[-9, -9, -2, -9, -2, -2]], r"is empty"),
        ({"size": [HEIGHT, WIDTH], "counts": [1, 2]}, r"add up to 3, but a picture .* 240"),
        ({"size": [HEIGHT, WIDTH], "counts": [250, -10]}, r"not whole numbers from 0 to 240"),
        ({"size": [HEIGHT, WIDTH], "counts": [1.5, 238.5]}, r"not whole numbers"),
        ({"size": [HEIGHT, WIDTH], "counts": ""}, r"counts that no encoder writes"),
        ({"size": [HEIGHT, WIDTH], "counts": "é\n"}, r"counts that no encoder writes"),
        ({"size": [HEIGHT, WIDTH], "counts": RLE["counts"] + "o"}, r"break off within a number"),
        ({"size": [HEIGHT, WIDTH], "counts": "o" * 9 + "0"}, r"over 35 bits"),
        ({"size": [HEIGHT, WIDTH], "counts": "5"}, r"add up to 5"),
        ({"size": [HEIGHT], "counts": "5"}, r"segmentation of an unknown form"),
        ("0110", r"segmentation of an unknown form \('0110'\)"),
    ],
)
def test_segmentation_that_is_broken(tmp_path: Path, images: Path, segmentation: object, message: str) -> None:
    masks = save(tmp_path / "m.json", [{"id": 41, "segmentation": segmentation}])
    assert_unusable(images, masks, rf"a\.jpg: mask 41 of .*/m\.json .*{message}")


def test_runs_that_end_early_are_never_decoded() -> None:
    # pycocotools would return whatever was in memory.
    with pytest.raises(ValueError, match="add up to 3"):
        to_rle({"size": [4, 4], "counts": "12"}, 4, 4)


def test_stated_size_of_a_turned_image(tmp_path: Path, images: Path) -> None:
    polygon = {"image_id": 1, "segmentation": [[0, 0, 5, 0, 5, 5]]}
    masks = save(tmp_path / "m.json", instances(polygon, width=HEIGHT, height=WIDTH))
    assert_unusable(images, masks, r"a\.jpg: .*m\.json states 12 x 20 px .* is 20 x 12 px \(upright")


@pytest.mark.parametrize(
    ("ids", "pixels", "size", "message"),
    [
        ([1, 2], [1], (WIDTH, HEIGHT), r"mask 2 of .*/p/a\.png is empty"),
        ([1], [1, 3], (WIDTH, HEIGHT), r"a\.png holds segment 3 \(1 such\), which its JSON does not list"),
        ([1], [1], (HEIGHT, WIDTH), r"a\.png is 12 x 20 px, but the image is 20 x 12 px"),
    ],
)
def test_panoptic_png_that_does_not_fit(
    tmp_path: Path, images: Path, ids: list[int], pixels: list[int], size: tuple[int, int], message: str
) -> None:
    assert_unusable(images, panoptic(tmp_path, ids, pixels, size), r"a\.jpg: .*" + message)


def test_grey_panoptic_png(tmp_path: Path, images: Path) -> None:
    masks = panoptic(tmp_path, [1], [1])
    Image.new("L", (WIDTH, HEIGHT), 1).save(tmp_path / "p/a.png")
    assert_unusable(images, masks, r"a\.jpg: .*mode L, but panoptic ids need RGB")


def test_binary_png_that_does_not_fit(tmp_path: Path, images: Path) -> None:
    (tmp_path / "masks/a").mkdir(parents=True)
    path = tmp_path / "masks/a/m.png"
    Image.new("L", (WIDTH, HEIGHT)).save(path)
    assert_unusable(images, tmp_path / "masks", r"a\.jpg: mask .*/a/m\.png is empty")
    Image.new("L", (WIDTH - 1, HEIGHT), 1).save(path)
    assert_unusable(images, tmp_path / "masks", r"a\.jpg: .*/a/m\.png is 19 x 12 px, but the image is 20 x 12 px")
    whole = (np.random.default_rng(0).random((HEIGHT, WIDTH)) * 255).astype(np.uint8)
    Image.fromarray(whole).save(path)
    path.write_bytes(path.read_bytes()[:150])
    assert_unusable(images, tmp_path / "masks", r"a\.jpg: .*/a/m\.png cannot be decoded as a PNG")


def test_refusal_counts_all_and_shows_five(tmp_path: Path, images: Path) -> None:
    for index in range(7):
        save(tmp_path / f"masks/b{index}.json", [{"segmentation": EMPTY_RLE}])
        Image.new("RGB", (WIDTH, HEIGHT)).save(images / f"b{index}.jpg")
    save(tmp_path / "masks/a.json", [{"segmentation": RLE}])
    (images / "b6.jpg").write_bytes(b"no image")
    source = read_segments(images, tmp_path / "masks")
    problems = [*source.problems([0, 1]), *source.problems(range(2, len(source)))]
    with pytest.raises(ValueError, match="7 of 8 images") as caught:
        source.refuse(problems)
    assert re.findall(r"^b\d\.jpg", str(caught.value), flags=re.MULTILINE) == [f"b{index}.jpg" for index in range(5)]


def test_broken_image(tmp_path: Path, images: Path) -> None:
    path = images / "a.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    assert_unusable(
        images, save(tmp_path / "m.json", [{"segmentation": RLE}]), r"a\.jpg: image a\.jpg cannot be decoded"
    )
