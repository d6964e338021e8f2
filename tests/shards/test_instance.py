"""COCO's instance format and LVIS: every mask as pycocotools makes it, and what broken tables and masks come to."""

import json
import pickle
import re

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_rle
from pycocotools.coco import COCO

from osm_lightning.record import box_of, decode, encode
from osm_lightning.shards.instance import file_of_url, read_instances, read_lvis
from osm_lightning.shards.own_vocabulary import from_categories
from osm_lightning.shards.source import Findings
from osm_lightning.vocabulary import load_vocabulary

HEIGHT, WIDTH = 24, 31
TRIANGLE = [2.0, 3.0, 20.5, 4.0, 9.0, 21.5]
SQUARE = [12, 2, 28, 2, 28, 15, 12, 15]
EXIF_ORIENTATION = 0x0112


def blob(seed):
    """bool[H, W], an uneven mask that touches the border and has a hole."""
    mask = np.random.default_rng(seed).random((HEIGHT, WIDTH)) > 0.7
    mask[5:20, 0:9] = True
    mask[8:11, 2:5] = False
    return mask


def uncompressed(mask):
    flat = mask.flatten(order="F").astype(np.int8)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}


def compressed(mask):
    rle = coco_rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


class LvisFolder:
    """A small folder in LVIS v1's layout, written by `save` and bent by the tests before."""

    def __init__(self, root):
        self.root = root
        self.content = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 1, "name": "aerosol_can", "synonyms": ["aerosol_can", "spray_can"]}],
            "licenses": [{"id": 4, "name": "Attribution License", "url": "http://licence"}],
        }

    def add(self, image_id, folder, *segmentations):
        path = self.root / folder / f"{image_id:012}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), (image_id % 256, 9, 9)).save(path)
        self.content["images"].append(
            {
                "id": image_id,
                "width": WIDTH,
                "height": HEIGHT,
                "license": 4,
                "coco_url": f"http://images.cocodataset.org/{folder}/{path.name}",
                "neg_category_ids": [7, image_id],
                "not_exhaustive_category_ids": [],
            }
        )
        for segmentation in segmentations:
            number = len(self.content["annotations"]) + 100
            self.content["annotations"].append(
                {
                    "id": number,
                    "image_id": image_id,
                    "category_id": 1 + number % 3,
                    "segmentation": segmentation,
                    "area": 1.5,
                    "bbox": [0, 0, 1, 1],
                }
            )
        return self

    @property
    def annotations(self):
        return self.content["annotations"]

    def save(self, name="lvis_v1_val.json"):
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(json.dumps(self.content))
        return self.root / name

    def read(self):
        self.save()
        return read_lvis(self.root, "val", load_vocabulary("lvis"))


@pytest.fixture
def lvis(tmp_path):
    """Two images of both COCO folders, the later id first; polygons, several in one mask, and both kinds of RLE."""
    folder = LvisFolder(tmp_path / "lvis")
    folder.add(20, "val2017", [TRIANGLE], [TRIANGLE, SQUARE], uncompressed(blob(0)))
    return folder.add(7, "train2017", compressed(blob(1)), [SQUARE], [[1.5, 1.5, 40.0, 2.0, 20.0, 30.0]])


def through_a_shard(records):
    return {record.key: decode(record.key, encode(record)) for record in records}


def assert_same_masks(records, content):
    """Every annotation is a segment whose pixels, area and box are those that pycocotools gives."""
    truth = COCO()
    truth.dataset = content
    truth.createIndex()
    for record in records.values():
        annotations = truth.imgToAnns[record.source["image_id"]]
        assert [segment.id for segment in record.segments] == [str(annotation["id"]) for annotation in annotations]
        for index, (segment, annotation) in enumerate(zip(record.segments, annotations, strict=True)):
            expected = truth.annToMask(annotation).astype(bool)
            np.testing.assert_array_equal(record.mask(index), expected)
            assert (segment.area_px, segment.bbox_xywh_px) == (expected.sum(), box_of(expected))
            assert segment.class_id == annotation["category_id"]
            assert segment.iscrowd == bool(annotation.get("iscrowd", 0))


def test_every_mask_is_that_of_pycocotools(lvis):
    lvis.annotations[2]["iscrowd"] = 1
    split = lvis.read()
    assert [image.key for image in split.images] == ["000000000007", "000000000020"]
    records = through_a_shard(split.records())
    assert_same_masks(records, lvis.content)
    assert sum(len(record.segments) for record in records.values()) == 6
    assert split.notes.counts == {"crowd segments, kept but not counted as masks": 1}
    record = records["000000000007"]
    assert record.image_bytes == (lvis.root / "train2017/000000000007.jpg").read_bytes()
    assert record.source == {
        "file_name": "train2017/000000000007.jpg",
        "image_id": 7,
        "licence": "Attribution License",
        "licence_url": "http://licence",
        "coco_url": "http://images.cocodataset.org/train2017/000000000007.jpg",
        "neg_category_ids": [7, 7],
        "not_exhaustive_category_ids": [],
    }


@pytest.mark.parametrize("json_name", ["lvis_v1_val.json", "annotations/lvis_v1_val.json", "lvis/lvis_v1_val.json"])
@pytest.mark.parametrize("images", [".", "coco"])
def test_where_lvis_may_lie(lvis, json_name, images):
    lvis.save(json_name)
    for folder in ("train2017", "val2017"):
        (lvis.root / images).mkdir(exist_ok=True)
        (lvis.root / folder).rename(lvis.root / images / folder)
    assert len(read_lvis(lvis.root, "val", load_vocabulary("lvis"))) == 2
    with pytest.raises(ValueError, match=r"lacks lvis_v1_train\.json"):
        read_lvis(lvis.root, "train", load_vocabulary("lvis"))


def test_images_convert_in_another_process(lvis):
    for image in lvis.read().images:
        thawed = pickle.loads(pickle.dumps(image))
        assert thawed.convert(Findings(), Findings()) == image.convert(Findings(), Findings()) is not None


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 1, 9, 9]], "has a polygon [1.0, 1.0, 9.0, 9.0]; a polygon is a flat list"),
        ([[1, 1, 9, 9, 3]], "a polygon is a flat list"),
        ([[1, 1, 9, 9, 3, 900]], "far outside its image of 31 x 24 px"),
        ([[1, 1, 9, 9, 3, float("nan")]], "has a polygon with a coordinate that is no number of pixels"),
        ([[1, 1, 9, 9, 3, "3"]], "has a polygon with a coordinate that is no number of pixels"),
        ([[[1, 1], [9, 9], [3, 8]]], "a polygon is a flat list"),
        ([], "has an empty segmentation"),
        (None, "has a segmentation of an unknown form"),
        ({"size": [9, 9], "counts": [81]}, "is 9 x 9 px, but the image is 31 x 24 px"),
        ({"size": [HEIGHT, WIDTH], "counts": [9, 9]}, "runs that add up to 18"),
        ({"size": [HEIGHT, WIDTH], "counts": "~~"}, "counts that no encoder writes"),
    ],
)
def test_a_broken_segmentation_makes_its_image_unusable(lvis, segmentation, message):
    lvis.annotations[1]["segmentation"] = segmentation
    split = lvis.read()
    errors = Findings()
    converted = {image.key: image.convert(errors, Findings()) for image in split.images}
    assert converted["000000000020"] is None
    assert converted["000000000007"] is not None
    (line,) = errors.lines()
    assert line.startswith("annotations whose segmentation can't be read: 1 (annotation 101 of 000000000020.jpg ")
    assert message in line
    with pytest.raises(ValueError, match=re.escape(message)):
        list(split.records())


def test_all_broken_segmentations_of_an_image_are_named(lvis):
    lvis.annotations[0]["segmentation"] = lvis.annotations[2]["segmentation"] = []
    errors = Findings()
    assert lvis.read().images[1].convert(errors, Findings()) is None
    assert sum(errors.counts.values()) == 2


def test_masks_without_pixels_are_left_out_and_noted(lvis):
    lvis.annotations[3]["segmentation"] = [[40, 5, 50, 5, 50, 9]]  # beyond the right border, as annotators slip
    for annotation in lvis.annotations[:3]:
        annotation["segmentation"] = uncompressed(np.zeros((HEIGHT, WIDTH), bool))
    split = lvis.read()
    (record,) = split.records()
    assert [segment.id for segment in record.segments] == ["104", "105"]
    assert split.notes.counts == {
        "segments without pixels, left out": 4,
        "images without any segment, left out": 1,
    }


@pytest.mark.parametrize(
    ("bend", "message"),
    [
        (lambda f: (f.root / "val2017/000000000020.jpg").unlink(), "missing files: 1 ("),
        (
            lambda f: f.content["images"][0].update(coco_url="http://x/../a.jpg"),
            "lead out of their folder: 1 ('../a.jpg')",
        ),
        (
            lambda f: f.annotations[0].update(category_id=1204),
            "vocabulary lvis lacks: 1 (1204 (annotation 100 of image 20)",
        ),
        (
            lambda f: f.annotations[0].update(category_id="1"),
            "vocabulary lvis lacks: 1 (1 (annotation 100 of image 20)",
        ),
        (
            lambda f: f.annotations[0].update(id=101),
            "annotation ids that stand twice in an image: 1 (annotation 101 of",
        ),
        (
            lambda f: f.annotations[0].pop("segmentation"),
            "annotations without segmentation: 1 (annotation 100 of image",
        ),
    ],
)
def test_a_problem_of_the_table_makes_its_image_unusable(lvis, bend, message):
    bend(lvis)
    split = lvis.read()
    assert [image.key for image in split.images] == ["000000000007"]
    assert split.num_unusable == 1
    assert message in split.errors.lines()[0]


@pytest.mark.parametrize(
    ("bend", "message"),
    [
        (lambda f: f.content["images"].append(f.content["images"][0]), "image ids that stand twice: 1 (20)"),
        (lambda f: f.annotations[0].update(image_id=8), "the JSON does not list: 1 (100 of image 8)"),
        (
            lambda f: f.content["images"][0].update(coco_url=f.content["images"][1]["coco_url"]),
            "files of several images: 1 (train2017/000000000007.jpg)",
        ),
        (
            lambda f: f.content["images"][0].update(width="31"),
            "not in COCO's instance format (TypeError: size '31' x 24",
        ),
        (lambda f: f.content["images"][0].pop("coco_url"), "not in COCO's instance format (KeyError: 'coco_url')"),
        (lambda f: f.content["images"][0].update(id=1.5), "image id 1.5 is neither a whole number nor a text"),
        (lambda f: f.annotations.append(5), "not in COCO's instance format (TypeError"),
        (lambda f: f.content.update(images=5), "not in COCO's instance format (TypeError"),
    ],
)
def test_a_broken_table_is_refused(lvis, bend, message):
    bend(lvis)
    with pytest.raises(ValueError, match=re.escape(message)):
        lvis.read()


@pytest.mark.parametrize("content", [b"[]", b"{}", b"{", b"\xff", b"[" * 10_000_000])
def test_what_is_no_such_json_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match="not in COCO's instance format"):
        read_instances(tmp_path / "a.json", [tmp_path], None)
    with pytest.raises(ValueError, match="there is no file"):
        read_instances(tmp_path / "b.json", [tmp_path], None)


def test_images_without_annotation_are_left_out_and_noted(lvis):
    lvis.add(30, "val2017")
    split = lvis.read()
    assert len(split) == 2
    assert split.notes.lines() == ["images without annotation, left out: 1 (30)"]


def test_an_image_of_another_size_is_an_error(lvis):
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(lvis.root / "val2017/000000000020.jpg")
    with pytest.raises(ValueError, match=r"1 \(000000000020\.jpg: 32 x 24 px, not 31 x 24 px\)"):
        list(lvis.read().records())


def test_a_broken_image_is_an_error(lvis):
    (lvis.root / "val2017/000000000020.jpg").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"pictures that can't be read: 1 \(.*000000000020\.jpg"):
        list(lvis.read().records())


@pytest.mark.parametrize("annotated", ["upright", "as stored"])
@pytest.mark.parametrize("orientation", range(5, 9))
def test_masks_lie_on_the_upright_image(lvis, annotated, orientation):
    stored = np.zeros((HEIGHT, WIDTH), bool)
    stored[0:8, 9:30] = stored[8:20, 9:15] = True  # an L, so that no flip or turn maps it to itself
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    path = lvis.root / "val2017/000000000020.jpg"
    Image.fromarray(stored.astype(np.uint8) * 255).save(path, exif=exif, quality=95)
    (picture,) = [image for image in lvis.read().images if image.key == "000000000020"]
    upright = np.asarray(picture.convert(Findings(), Findings()).image().convert("L")) > 127
    mask = stored if annotated == "as stored" else upright
    lvis.content["images"][0].update(height=mask.shape[0], width=mask.shape[1])
    for annotation in lvis.annotations[:3]:
        annotation["segmentation"] = compressed(mask)
    split = lvis.read()
    record = through_a_shard(split.records())["000000000020"]
    for index, segment in enumerate(record.segments):
        np.testing.assert_array_equal(record.mask(index), upright)
        assert (segment.area_px, segment.bbox_xywh_px) == (upright.sum(), box_of(upright))
    assert sum(split.notes.counts.values()) == (annotated == "as stored")  # once for an image, not for each mask


def test_free_text_is_the_annotations_own_name_or_its_categories(lvis):
    for annotation, name in zip(lvis.annotations, ["  a Red cap ", "", None, 5], strict=False):
        annotation.update(category_id=1, name=name)
    for annotation in lvis.annotations[4:]:
        annotation["category_id"] = 2
    split = read_instances(lvis.save(), [lvis.root], None, file_of=file_of_url)
    (record,) = [image.convert(Findings(), Findings()) for image in split.images]
    assert [segment.name for segment in record.segments] == ["a Red cap", "aerosol can", "aerosol can"]
    assert {segment.class_id for segment in record.segments} == {None}
    assert split.errors.lines() == [
        "annotations with neither a name of their own nor a category that has one: 2 "
        "(annotation 104 of image 7, annotation 105 of image 7)"
    ]


def test_files_of_one_name_in_two_folders_get_keys_of_their_own(tmp_path):
    lvis = LvisFolder(tmp_path)
    for number, file in enumerate(["cam1/frame 1.jpg", "cam2/frame 1.jpg", "cam2/café.jpg"]):
        lvis.add(number, "x", [SQUARE])
        lvis.content["images"][-1].update(file_name=file)
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / f"x/{number:012}.jpg").rename(tmp_path / file)
    keys = [image.key for image in read_instances(lvis.save(), [tmp_path], load_vocabulary("lvis")).images]
    assert len(set(keys)) == 3
    assert keys[2] == "caf-"
    assert all(re.fullmatch(r"frame-1-[0-9a-f]{12}", key) for key in keys[:2])


def test_every_polygon_of_real_lvis(shared_data, tmp_path):
    json_path = shared_data / "lvis_samples/lvis_v0.5_val_100.json"
    content = json.loads(json_path.read_text())
    for image in content["images"]:  # the sample has no pictures
        path = tmp_path / file_of_url(image)
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (image["width"], image["height"])).save(path)
    split = read_instances(json_path, [tmp_path], from_categories(json_path), file_of=file_of_url)
    records = through_a_shard(split.records())
    assert_same_masks(records, content)
    assert sum(len(record.segments) for record in records.values()) == 977
