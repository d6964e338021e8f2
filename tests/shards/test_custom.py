"""Your own data by YAML: all formats give the same masks, and nothing is read that the YAML should not reach."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from osm_lightning.record import decode, encode
from osm_lightning.rle import encode_rle
from osm_lightning.shards.custom import read_custom
from osm_lightning.shards.own_vocabulary import (
    VOCABULARY_FILE,
    from_categories,
    from_file,
    from_names,
    to_tsv,
    write_vocabulary,
)
from osm_lightning.vocabulary import load_vocabulary

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples/own_data").glob("*.yaml"))
HEIGHT, WIDTH = 24, 31
CLASSES = ("cup", "red cap", "sky")
"""Ids are places in this list."""


def blobs(seed):
    """From class id to bool[H, W]; masks do not overlap, and leave pixels free."""
    ids = np.random.default_rng(seed).integers(0, 5, (HEIGHT, WIDTH))
    return {class_id: ids == class_id for class_id in range(len(CLASSES))}


def write_data(root, truth, classes=CLASSES, pictures=None):
    """Writes images, and their masks in every format that a YAML can speak of.

    Args:
        root: folder; those of the examples come to lie in it.
        truth: from split and image's stem to masks by class id.
        classes: name of each class; None for an id that is none.
        pictures: folder of real images; without it they are blank.
    """
    root.mkdir(exist_ok=True)
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    rows = "".join(f"{number}\tany\t{name}|the {name}\n" for number, name in enumerate(classes))
    (root / "classes.tsv").write_text(f"id\tkind\tnames\n{rows}")
    categories = [{"id": number, "name": name.replace(" ", "_")} for number, name in enumerate(classes)]
    for split, images in truth.items():
        for folder in ("images", "segments", "labels"):
            (root / folder / split).mkdir(parents=True)
        instances, panoptic, rows = [], [], []
        for image_id, (stem, masks) in enumerate(images.items()):
            height, width = next(iter(masks.values())).shape
            if pictures:
                (root / f"images/{split}/{stem}.jpg").write_bytes((pictures / f"{stem}.jpg").read_bytes())
            else:
                Image.new("RGB", (width, height), (9, 9, 9)).save(root / f"images/{split}/{stem}.jpg")
            rows.append({"id": image_id, "file_name": f"{stem}.jpg", "height": height, "width": width})
            labels, colours = np.full((height, width), 255, np.uint8), np.zeros((height, width, 3), np.uint8)
            segments = []
            for class_id, mask in masks.items():
                labels[mask], colours[mask] = class_id, (class_id + 1, 1, 0)
                instances.append(
                    {
                        "id": len(instances),
                        "image_id": image_id,
                        "category_id": class_id,
                        "segmentation": {"size": [height, width], "counts": encode_rle(mask)},
                    }
                )
                segments.append({"id": class_id + 257, "category_id": class_id, "bbox": [0, 0, 1, 1], "area": 1})
                path = root / f"masks/{split}/{classes[class_id].replace(' ', '_')}/{stem}__1.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(path)
            panoptic.append({"image_id": image_id, "file_name": f"{stem}.png", "segments_info": segments})
            Image.fromarray(labels).save(root / f"labels/{split}/{stem}.png")
            Image.fromarray(colours).save(root / f"segments/{split}/{stem}.png")
        for name, annotations in (("", instances), ("panoptic_", panoptic)):
            content = {"images": rows, "annotations": annotations, "categories": categories}
            (root / f"{name}{split}.json").write_text(json.dumps(content))
    return root


TRUTH = {"train": {"a": blobs(0), "b": blobs(1)}, "val": {"c": blobs(2)}}


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data", TRUTH)


def describe(root, **changes):
    """Writes a YAML into the folder: instances of one split, but for the changes; None removes a key."""
    content = {
        "dataset": "mine",
        "format": "coco_instance",
        "vocabulary": "annotations",
        "splits": {"train": {"images": "images/train", "annotations": "train.json"}},
    }
    content = {key: value for key, value in {**content, **changes}.items() if value is not None}
    (root / "mine.yaml").write_text(yaml.safe_dump(content))
    return root / "mine.yaml"


def use_panoptic_json(root):
    for split in TRUTH:
        (root / f"panoptic_{split}.json").replace(root / f"{split}.json")


def masks_of(custom, classes):
    """From image and class id to pixels, as they come out of a shard."""
    found = {}
    for record in custom.split.records():
        record = decode(record.key, encode(record))
        for index, segment in enumerate(record.segments):
            assert (segment.class_id is None) == (custom.vocabulary is None)
            class_id = classes.index(segment.name) if segment.class_id is None else segment.class_id
            found[record.key, class_id] = record.mask(index)
    return found


def assert_same_masks(custom, images, classes=CLASSES):
    found = masks_of(custom, classes)
    assert found.keys() == {(stem, class_id) for stem, masks in images.items() for class_id in masks}
    for (stem, class_id), mask in found.items():
        np.testing.assert_array_equal(mask, images[stem][class_id])


@pytest.mark.parametrize("split", TRUTH)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_reads_the_folders_that_it_speaks_of(data, example, split):
    if example.stem == "panoptic":
        use_panoptic_json(data)
    custom = read_custom(example, data, split)
    assert custom.dataset == "mine"
    assert_same_masks(custom, TRUTH[split])


def test_the_examples_are_those_of_the_documentation():
    page = (ROOT / "docs/own_data.md").read_text(encoding="utf-8")
    assert len(EXAMPLES) == 4
    for path in EXAMPLES:
        settings = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        assert "\n".join(settings) in page, path.name


@pytest.mark.parametrize("vocabulary", ["annotations", "none", "classes.tsv", "classes.txt"])
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_vocabulary_numbers_the_same_classes(data, example, vocabulary):
    if example.stem == "panoptic":
        use_panoptic_json(data)
    content = yaml.safe_load(example.read_text()) | {"vocabulary": vocabulary}
    (data / "mine.yaml").write_text(yaml.safe_dump(content))
    if example.stem == "label_maps" and vocabulary in {"annotations", "none"}:
        with pytest.raises(ValueError, match=f"vocabulary is '{vocabulary}', but pixels of label maps are bare ids"):
            read_custom(data / "mine.yaml", None, "train")
        return
    custom = read_custom(data / "mine.yaml", None, "train")
    assert_same_masks(custom, TRUTH["train"])
    if vocabulary == "none":
        assert (custom.vocabulary, custom.index_vocabulary) == (None, None)
    else:
        assert custom.index_vocabulary == VOCABULARY_FILE
        assert {entry.id: entry.names[0] for entry in custom.vocabulary} == dict(enumerate(CLASSES))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_real_images_in_every_format(shared_data, tmp_path, example):
    """A few real photographs with COCO's masks, merged by class so that every format can hold them."""
    source = shared_data / "coco_mini"
    annotations = json.loads((source / "annotations/panoptic_val2017.json").read_text())["annotations"][:3]
    truth = {}
    for annotation in annotations:
        rgb = np.asarray(Image.open(source / "panoptic_val2017" / annotation["file_name"])).astype(int)
        ids = rgb @ [1, 256, 65536]
        by_class = {}
        for segment in annotation["segments_info"]:
            mask = by_class.get(segment["category_id"], np.zeros(ids.shape, bool))
            by_class[segment["category_id"]] = mask | (ids == segment["id"])
        truth[Path(annotation["file_name"]).stem] = by_class
    names = {entry.id: entry.names[0] for entry in load_vocabulary("coco")}
    classes = [names.get(number, f"no {number}") for number in range(max(names) + 1)]
    root = write_data(tmp_path, {"train": truth}, classes, source / "val2017")
    if example.stem == "panoptic":
        (root / "panoptic_train.json").replace(root / "train.json")
    custom = read_custom(example, root, "train")
    assert_same_masks(custom, truth, classes)
    for record in custom.split.records():
        assert record.image_bytes == (source / f"val2017/{record.key}.jpg").read_bytes()
        assert record.image().size == (record.width_px, record.height_px)


def test_a_shipped_vocabulary_is_named_by_its_key(data):
    categories = json.loads((data / "train.json").read_text())
    for annotation in categories["annotations"]:
        annotation["category_id"] += 1
    (data / "train.json").write_text(json.dumps(categories))
    custom = read_custom(describe(data, vocabulary="coco"), None, "train")
    assert (custom.index_vocabulary, custom.is_shipped) == ("coco", True)
    assert custom.vocabulary == load_vocabulary("coco")


def test_class_folders_of_all_splits_number_the_classes(data):
    (data / "masks/val/cup").rename(data / "masks/val/an_apple")
    splits = {split: {"images": f"images/{split}", "masks": f"masks/{split}"} for split in TRUTH}
    path = describe(data, format="class_folders", splits=splits)
    train, val = (read_custom(path, None, split).vocabulary for split in TRUTH)
    assert train.classes == val.classes
    assert [entry.names for entry in train] == [("an apple",), ("cup",), ("red cap",), ("sky",)]


SPLIT = {"images": "images/train", "annotations": "train.json"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"formt": "x"}, "the file has the key 'formt'; format is meant?"),
        ({"ignored_ids": [255]}, "the file has the key 'ignored_ids'; it must be one of dataset, format"),
        ({"dataset": None}, "the file lacks dataset"),
        ({"dataset": "lvis"}, "dataset is 'lvis', the key of a dataset with rules of its own; choose another"),
        ({"dataset": False}, "dataset is False; it must be a text (put it in quotes)"),
        ({"format": "coco_instances"}, "format is 'coco_instances'; coco_instance is meant?"),
        ({"format": "yolo"}, "format is 'yolo'; it must be one of coco_instance, coco_panoptic, label_maps, class_f"),
        ({"vocabulary": "annotation"}, "vocabulary is 'annotation'; it must be annotations, none, a file that ends in"),
        ({"vocabulary": "gone.tsv"}, "vocabulary is 'gone.tsv', but "),
        ({"vocabulary": "../classes.tsv"}, "vocabulary is '../classes.tsv', which leads out of"),
        ({"splits": {}}, "splits is {}; it must be keys with values"),
        ({"splits": {"val": SPLIT}}, "there is no split train; there is val"),
        ({"splits": {"train": SPLIT, "val": 3}}, "splits.val is 3; it must be keys with values"),
        ({"splits": {"train": SPLIT, 2017: SPLIT}}, "name of a split is 2017; it must be a text (put it in quotes)"),
        ({"splits": {"train": {**SPLIT, "image": "x"}}}, "splits.train has the key 'image'; images is meant?"),
        ({"splits": {"train": {"images": "images/train"}}}, "splits.train lacks annotations"),
        ({"splits": {"train": {**SPLIT, "images": 5}}}, "splits.train.images is 5; it must be a text"),
        ({"splits": {"train": {**SPLIT, "images": "train.json"}}}, "train.json is no folder"),
        ({"splits": {"train": {**SPLIT, "annotations": "images"}}}, "images is no file"),
        ({"splits": {"train": {**SPLIT, "images": "images/../../x"}}}, "which leads out of"),
        ({"splits": {"train": {**SPLIT, "annotations": "/etc/passwd"}}}, "is '/etc/passwd', which leads out of"),
    ],
)
def test_what_the_yaml_may_not_say(data, changes, message):
    path = describe(data, **changes)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_custom(path, None, "train")
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "- a",
        "a: [",
        "a: 1\na: 2",
        "splits:\n  train: {}\n  train: {}",
        "!!python/object/apply:os.system ['true']",
        "a: " + "[" * 100_000,
        "a" * 1_000_001,
        "\x00",
    ],
)
def test_what_is_no_such_yaml_is_refused(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=str(tmp_path / "mine.yaml")):
        read_custom(tmp_path / "mine.yaml", None, "train")


def test_a_missing_yaml_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.yaml can't be read as YAML \(.*No such file"):
        read_custom(tmp_path / "gone.yaml", None, "train")


@pytest.mark.parametrize("link", ["images/train", "train.json", "images/train/a.jpg", "images/train/more"])
def test_links_out_of_the_folder_are_refused_and_links_within_are_not(data, tmp_path, link):
    path = describe(data, vocabulary="classes.tsv")
    target = data / "moved"
    if (data / link).exists():
        (data / link).rename(target)
    else:
        target.mkdir()
    (data / link).symlink_to(target)
    assert len(read_custom(path, None, "train").split) == 2
    target.rename(tmp_path / "outside")
    (data / link).unlink()
    (data / link).symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=r"(leads|is a link) out of .*Put all data below one folder, and give that as"):
        read_custom(path, None, "train")


# Vocabularies


def test_categories_become_classes(tmp_path):
    rows = [
        {"id": 3, "name": "Traffic_Light", "synonyms": ["traffic_light", "stoplight"], "isthing": 1},
        {"id": 1, "name": "sky", "isthing": 0},
        {"id": 2, "name": "cup"},
    ]
    (tmp_path / "a.json").write_text(json.dumps({"categories": rows}))
    vocabulary = from_categories(tmp_path / "a.json")
    assert [(entry.id, entry.kind, entry.names) for entry in vocabulary] == [
        (3, "thing", ("traffic light", "stoplight")),
        (1, "stuff", ("sky",)),
        (2, "any", ("cup",)),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "(there is none)"),
        (5, "its categories can't be read (TypeError"),
        ([{"id": 1}], "its categories can't be read (KeyError: 'name')"),
        ([{"id": "1", "name": "x"}], "ids that are not whole numbers from 0: 1 ('1')"),
        ([{"id": True, "name": "x"}], "ids that are not whole numbers from 0: 1 (True)"),
        ([{"id": -1, "name": "x"}], "ids that are not whole numbers from 0: 1 (-1)"),
        ([{"id": 1, "name": "x"}, {"id": 1, "name": "y"}], "ids that stand twice: 1 (1)"),
        ([{"id": 1, "name": "x_y"}, {"id": 2, "name": "X y"}], "names of two classes: 1 (x y of 1 and 2)"),
        ([{"id": 1, "name": "a|b"}], "hold | or a control character: 1 ('a|b' of 1)"),
        ([{"id": 1, "name": "a\x1bb"}], "hold | or a control character: 1 ('a\\x1bb' of 1)"),
        ([{"id": 1, "name": " "}], "names that are empty"),
    ],
)
def test_categories_that_are_no_vocabulary_are_refused(tmp_path, rows, message):
    (tmp_path / "a.json").write_text(json.dumps({"categories": rows}))
    with pytest.raises(ValueError, match=re.escape(message)):
        from_categories(tmp_path / "a.json")


def test_a_list_of_names_counts_from_0(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffCup\nred_cap\n", encoding="utf-8")
    assert [(entry.id, entry.names) for entry in from_file(tmp_path / "a.txt")] == [(0, ("cup",)), (1, ("red cap",))]
    (tmp_path / "a.txt").write_text("cup\n\nsky\n")
    with pytest.raises(ValueError, match="names that are empty"):  # a gap would renumber what follows
        from_file(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="It must be a text in UTF-8"):
        from_file(tmp_path / "a.txt")


def test_a_vocabulary_is_written_once_and_never_changed_under_shards(tmp_path):
    ours, theirs = from_names(["cup", "sky"], Path("a")), from_names(["sky", "cup"], Path("b"))
    out = tmp_path / "shards"
    write_vocabulary(theirs, out)
    write_vocabulary(ours, out)  # what a build left that failed
    (out / "index.json").touch()
    write_vocabulary(ours, out)
    with pytest.raises(ValueError, match=r"vocabulary\.tsv holds other classes than b, and the shards beside it"):
        write_vocabulary(theirs, out)
    assert load_vocabulary(str(out / VOCABULARY_FILE)).classes == ours.classes
    assert (out / VOCABULARY_FILE).read_text() == to_tsv(ours)
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
