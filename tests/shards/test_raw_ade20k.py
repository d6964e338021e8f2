import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from osm_lightning.record import box_of
from osm_lightning.shards.ade20k_challenge import read
from osm_lightning.shards.source import Findings
from osm_lightning.vocabulary import load_vocabulary

VOCABULARY = load_vocabulary("ade20k")
CLASS_OF_CATEGORY = (
    "8 9 11 13 15 16 19 20 21 23 24 25 28 31 32 33 34 36 37 38 39 40 42 43 44 45 46 48 50 51 54 56 57 58 59 63 65 66 "
    "67 68 70 71 72 73 74 75 76 77 79 81 82 83 84 86 87 88 89 90 91 93 94 96 98 99 103 104 105 108 109 111 112 113 116 "
    "117 119 120 121 122 124 125 126 127 128 130 131 133 134 135 136 137 138 139 140 143 144 145 147 148 149 150"
)
"""SceneParse150's number of each of the 100 instance categories (ade20k_instance_catid_mapping.txt of Mask2Former)."""
CATEGORIES = [int(number) for number in CLASS_OF_CATEGORY.split()]
WALL, BED, TREE, TABLE = 1, 8, 5, 16


def save(array, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


class Challenge:
    """A small ADEChallengeData2016."""

    def __init__(self, root):
        self.root = root

    def paths(self, name, folder="validation"):
        endings = {"images": "jpg", "annotations": "png", "annotations_instance": "png"}
        return [self.root / kind / folder / f"{name}.{ending}" for kind, ending in endings.items()]

    def add(self, name, classes, instances, folder="validation"):
        for path, array in zip(
            self.paths(name, folder), (np.stack([classes] * 3, -1), classes, instances), strict=True
        ):
            save(array, path)

    def read(self, split="val"):
        return read(self.root, split, VOCABULARY)

    def complaint(self):
        """What stands against the only image."""
        errors = Findings()
        (image,) = self.read().images
        assert image.convert(errors, Findings()) is None
        (line,) = errors.lines()
        return line


def naive(classes, instances):
    """What prepare_ade20k_pan_seg.py makes, pixel by pixel: class id and number of the instance, or nothing."""
    owners = np.full(classes.shape, None, dtype=object)
    for y, x in np.ndindex(classes.shape):
        category, number, _ = (int(value) for value in instances[y, x])
        if number > 0:
            owners[y, x] = (CATEGORIES[category - 1] - 1, number)
        elif classes[y, x] > 0 and classes[y, x] not in CATEGORIES:
            owners[y, x] = (int(classes[y, x]) - 1, None)
    return owners


def assert_equal(record, owners):
    """Every pixel belongs to the segment of its owner, and each owner has one segment."""
    segment_map = record.segment_map()
    owner_of = {}
    for index, segment in enumerate(record.segments):
        mask = record.mask(index, segment_map)
        (owner,) = set(owners[mask])
        assert owner not in owner_of.values()
        owner_of[index] = owner
        assert segment.class_id == owner[0]
        assert (segment.area_px, segment.bbox_xywh_px) == (mask.sum(), box_of(mask))
    assert set(owner_of.values()) == set(owners[owners != None])  # noqa: E711 - elementwise
    assert ((segment_map > 0) == (owners != None)).all()  # noqa: E711


def random_maps(seed, height=23, width=31):
    """Blocks of all classes and instances, which follow the classes here and cut across them there."""
    rng = np.random.default_rng(seed)
    classes = np.repeat(np.repeat(rng.integers(0, 151, (8, 8)), 3, 0), 4, 1)[:height, :width].astype(np.uint8)
    instances = np.zeros((height, width, 3), np.uint8)
    for number in rng.permutation(255)[:12] + 1:
        y, x = rng.integers(0, height), rng.integers(0, width)
        instances[y : y + 6, x : x + 9] = (rng.integers(1, 101), number, rng.integers(256))
    instances[-1, -1] = (5, 0, 0)  # a category, but no instance
    return classes, instances


@pytest.fixture
def challenge(tmp_path):
    return Challenge(tmp_path / "ADEChallengeData2016")


def test_categories_are_the_things_of_the_vocabulary_in_order():
    assert [entry.id + 1 for entry in VOCABULARY if entry.kind == "thing"] == CATEGORIES


@pytest.mark.parametrize("split", ["train", "training"])
def test_same_pixels_and_classes_as_the_restatement(challenge, split):
    maps = {f"ADE_train_{seed:08}": random_maps(seed) for seed in (2, 1)}
    for name, (classes, instances) in maps.items():
        challenge.add(name, classes, instances, "training")
    records = list(challenge.read(split).records())
    assert [record.key for record in records] == sorted(maps)
    for record in records:
        assert_equal(record, naive(*maps[record.key]))
        assert record.image_bytes == challenge.paths(record.key, "training")[0].read_bytes()


def test_instances_lie_above_and_things_without_instance_are_nothing(challenge):
    classes = np.array([[WALL, WALL, BED, BED, TREE, 0]], np.uint8)
    instances = np.zeros((1, 6, 3), np.uint8)
    instances[0, 1:3] = (CATEGORIES.index(BED) + 1, 7, 0)  # over wall and bed
    instances[0, 4] = (CATEGORIES.index(TABLE) + 1, 9, 0)  # over all of the tree
    challenge.add("ADE_val_00000001", classes, instances)
    (record,) = challenge.read().records()
    assert [(s.id, s.class_id, s.area_px) for s in record.segments] == [
        ("1", WALL - 1, 1),
        ("263", BED - 1, 2),
        ("265", TABLE - 1, 1),
    ]
    assert record.segment_map().tolist() == [[1, 2, 2, 0, 3, 0]]


def test_real_maps(challenge, shared_data):
    """Instance maps are not among the samples: every thing of the semantic map becomes one instance."""
    sample = shared_data / "ade_samples/challenge"
    truth = {}
    for map_path in sorted((sample / "annotations").glob("*.png")):
        classes = np.asarray(Image.open(map_path))
        instances = np.zeros((*classes.shape, 3), np.uint8)
        for number, value in enumerate(sorted(set(np.unique(classes).tolist()) & set(CATEGORIES)), start=1):
            instances[classes == value] = (CATEGORIES.index(value) + 1, number, 0)
        image_path, class_path, instance_path = challenge.paths(map_path.stem)
        save(instances, instance_path)
        for source, target in ((sample / f"images/{map_path.stem}.jpg", image_path), (map_path, class_path)):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
        truth[map_path.stem] = classes
    for record in challenge.read().records():
        class_ids = np.array([-1, *(segment.class_id for segment in record.segments)])[record.segment_map()]
        np.testing.assert_array_equal(class_ids + 1, truth.pop(record.key))
    assert not truth


def test_image_is_small_and_picklable(challenge):
    challenge.add("ADE_val_00000001", *random_maps(0))
    (image,) = challenge.read().images
    assert len(pickle.dumps(image)) < 2000
    assert pickle.loads(pickle.dumps(image)).convert(Findings(), Findings()) == image.convert(Findings(), Findings())


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_missing_partner_is_named(challenge, lost):
    for seed in (1, 2):
        challenge.add(f"ADE_val_{seed:08}", *random_maps(seed))
    path = challenge.paths("ADE_val_00000001")[lost]
    path.unlink()
    split = challenge.read()
    assert [image.key for image in split.images] == ["ADE_val_00000002"]
    assert (split.num_unusable, split.errors.lines()) == (1, [f"missing files: 1 ({path})"])
    with pytest.raises(ValueError, match="missing files"):
        list(split.records())


def test_missing_folder_names_its_archive(challenge):
    challenge.add("ADE_val_00000001", *random_maps(1))
    shutil.rmtree(challenge.root / "annotations_instance")
    with pytest.raises(ValueError, match=r"annotations_instance/validation \(annotations_instance\.tar"):
        challenge.read()
    with pytest.raises(ValueError, match="images/testing"):
        challenge.read("testing")


def test_folders_without_images_are_no_split(challenge):
    for path in challenge.paths("none"):
        path.parent.mkdir(parents=True)
    with pytest.raises(ValueError, match="no images"):
        challenge.read()


@pytest.mark.parametrize(
    ("category", "number", "says"),
    [
        (101, 3, "instance 3 is of category 101, not 1 to 100"),
        (0, 3, "category 0"),
        (6, 9, "9 is of several categories"),
    ],
)
def test_impossible_instances(challenge, category, number, says):
    instances = np.zeros((4, 4, 3), np.uint8)
    instances[0], instances[1] = (5, 9, 0), (category, number, 0)
    challenge.add("ADE_val_00000001", np.ones((4, 4), np.uint8), instances)
    assert says in challenge.complaint()


def test_impossible_class(challenge):
    challenge.add("ADE_val_00000001", np.full((4, 4), 151, np.uint8), np.zeros((4, 4, 3), np.uint8))
    assert "class 151, but the challenge has 150" in challenge.complaint()


@pytest.mark.parametrize(
    ("which", "array", "says"),
    [
        (1, np.ones((4, 4), np.uint16), "is a PNG 16-bit grey, but the dataset's maps are 8-bit grey"),
        (1, np.ones((4, 4, 3), np.uint8), "is a PNG 8-bit RGB"),
        (2, np.ones((4, 4), np.uint8), "is a PNG 8-bit grey, but the dataset's maps are 8-bit RGB"),
        (2, np.zeros((4, 5, 3), np.uint8), "differ in height, width: (4, 4) and (4, 5)"),
        (0, np.ones((5, 4, 3), np.uint8), "annotations of another size than their image"),
    ],
)
def test_files_of_another_kind_or_size(challenge, which, array, says):
    challenge.add("ADE_val_00000001", np.ones((4, 4), np.uint8), np.zeros((4, 4, 3), np.uint8))
    save(array, challenge.paths("ADE_val_00000001")[which])
    assert says in challenge.complaint()


def test_palette_map_is_refused(challenge):
    challenge.add("ADE_val_00000001", np.ones((4, 4), np.uint8), np.zeros((4, 4, 3), np.uint8))
    palette = Image.fromarray(np.ones((4, 4), np.uint8)).convert("P")
    palette.save(challenge.paths("ADE_val_00000001")[1])
    assert "8-bit with a palette" in challenge.complaint()


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("damage", [lambda data: data[:60], lambda data: b"no picture", lambda data: b""])
def test_broken_files_are_named(challenge, which, damage):
    challenge.add("ADE_val_00000001", *random_maps(1))
    path = challenge.paths("ADE_val_00000001")[which]
    path.write_bytes(damage(path.read_bytes()))
    assert str(path) in challenge.complaint()
