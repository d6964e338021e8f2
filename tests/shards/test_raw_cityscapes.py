import pickle

import numpy as np
import pytest
from PIL import Image

from osm_lightning.record import box_of
from osm_lightning.shards.cityscapes_fine import read
from osm_lightning.shards.source import Findings
from osm_lightning.vocabulary import load_vocabulary

VOCABULARY = load_vocabulary("cityscapes")
EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
HAVE_INSTANCES = (24, 25, 26, 27, 28, 31, 32, 33)
"""Of the evaluated ones; caravan (29) and trailer (30) have instances too (labels.py of cityscapesScripts)."""
IDS = (0, 1, 3, 4, 7, 11, 23, 24, 26, 29, 33, 24000, 24001, 26000, 26257, 29001, 30000, 33012, 33999)
"""Of all kinds: unlabelled, static, stuff, groups, objects, objects that are not evaluated."""


class Cityscapes:
    """A small Cityscapes with random pictures."""

    def __init__(self, root):
        self.root = root

    def paths(self, name, split="val"):
        below = f"{split}/{name.split('_')[0]}/{name}"
        return (
            self.root / f"leftImg8bit/{below}_leftImg8bit.png",
            self.root / f"gtFine/{below}_gtFine_instanceIds.png",
        )

    def add(self, name, ids, split="val"):
        pixels = np.random.default_rng(0).integers(0, 256, (*ids.shape, 3), dtype=np.uint8)
        for path, array in zip(self.paths(name, split), (pixels, ids), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)

    def read(self, split="val"):
        return read(self.root, split, VOCABULARY)

    def complaint(self):
        """What stands against the only image."""
        errors = Findings()
        (image,) = self.read().images
        assert image.convert(errors, Findings()) is None
        (line,) = errors.lines()
        return line


def naive(ids):
    """Segments as createPanopticImgs makes them: (id, category_id, area, bbox, iscrowd), and the map of their ids."""
    segments, kept = [], np.zeros(ids.shape, np.int64)
    for value in sorted(set(ids.ravel().tolist())):
        label, iscrowd = (value, 1) if value < 1000 else (value // 1000, 0)
        if label not in EVALUATED:
            continue
        if label not in HAVE_INSTANCES:
            iscrowd = 0
        mask = ids == value
        segments.append((str(value), label, int(mask.sum()), box_of(mask), bool(iscrowd)))
        kept[mask] = value
    return segments, kept


def random_ids(seed, height=40, width=56):
    rng = np.random.default_rng(seed)
    blocks = rng.choice(IDS, (10, 14))
    blocks.flat[: len(IDS)] = IDS
    return np.repeat(np.repeat(blocks, 4, 0), 4, 1)[:height, :width].astype(np.uint16)


@pytest.fixture
def cityscapes(tmp_path):
    return Cityscapes(tmp_path / "cityscapes")


def test_vocabulary_has_the_evaluated_labels_and_their_kinds():
    assert tuple(entry.id for entry in VOCABULARY) == EVALUATED
    assert tuple(entry.id for entry in VOCABULARY if entry.kind == "thing") == HAVE_INSTANCES


def test_same_segments_as_create_panoptic_imgs(cityscapes):
    maps = {f"{city}_000000_{seed:06}": random_ids(seed) for city, seed in (("ulm", 1), ("aachen", 3), ("aachen", 2))}
    for name, ids in maps.items():
        cityscapes.add(name, ids, "train")
    split = cityscapes.read("train")
    records = list(split.records())
    assert [record.key for record in records] == [f"{name}_leftImg8bit" for name in sorted(maps)]
    for record in records:
        segments, kept = naive(maps[record.key.removesuffix("_leftImg8bit")])
        assert [(s.id, s.class_id, s.area_px, s.bbox_xywh_px, s.iscrowd) for s in record.segments] == segments
        ids = np.array([0, *(int(segment.id) for segment in record.segments)])[record.segment_map()]
        np.testing.assert_array_equal(ids, kept)
    assert split.notes.counts["crowd segments, kept but not counted as masks"] == 3 * 3  # 24, 26 and 33 in each


def test_image_is_small_and_picklable(cityscapes):
    cityscapes.add("ulm_000000_000019", random_ids(0))
    (image,) = cityscapes.read().images
    assert len(pickle.dumps(image)) < 2000
    assert pickle.loads(pickle.dumps(image)).convert(Findings(), Findings()) == image.convert(Findings(), Findings())


@pytest.mark.parametrize("lost", [0, 1])
def test_missing_partner_is_named(cityscapes, lost):
    for name in ("ulm_000000_000019", "ulm_000001_000019"):
        cityscapes.add(name, random_ids(0))
    path = cityscapes.paths("ulm_000000_000019")[lost]
    path.unlink()
    (path.parent / f"._{path.name}").write_bytes(b"what a Mac leaves")
    split = cityscapes.read()
    assert [image.key for image in split.images] == ["ulm_000001_000019_leftImg8bit"]
    assert (split.num_unusable, split.errors.lines()) == (1, [f"missing files: 1 ({path})"])


def test_missing_split_names_its_archives(cityscapes):
    cityscapes.add("ulm_000000_000019", random_ids(0))
    with pytest.raises(ValueError, match=r"gtFine/train \(gtFine_trainvaltest\.zip\)"):
        cityscapes.read("train")


@pytest.mark.parametrize(("value", "says"), [(34, "no label 34"), (999, "no label 999"), (65535, "no label 65")])
def test_unknown_labels(cityscapes, value, says):
    cityscapes.add("ulm_000000_000019", np.full((4, 4), value, np.uint16))
    assert says in cityscapes.complaint()


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.full((4, 4), 26, np.uint8), "is a PNG 8-bit grey, but the dataset's maps are 16-bit grey"),
        (np.zeros((4, 4, 3), np.uint8), "is a PNG 8-bit RGB"),
        (np.zeros((4, 4, 4), np.uint8), "is a PNG 8-bit RGB with transparency"),
        (np.full((4, 5), 7, np.uint16), "5 x 4 px, not 4 x 4"),
    ],
)
def test_maps_of_another_kind_or_size(cityscapes, array, says):
    """An 8-bit map is what labelIds are, and what tools make that cut ids off at 255."""
    cityscapes.add("ulm_000000_000019", np.full((4, 4), 7, np.uint16))
    Image.fromarray(array).save(cityscapes.paths("ulm_000000_000019")[1])
    assert says in cityscapes.complaint()


def test_huge_map_is_not_decoded(cityscapes):
    cityscapes.add("ulm_000000_000019", np.full((4, 4), 7, np.uint16))
    path = cityscapes.paths("ulm_000000_000019")[1]
    data = bytearray(path.read_bytes())
    data[16:24] = (30_000).to_bytes(4, "big") * 2  # width and height in the header
    path.write_bytes(data)
    assert str(path) in cityscapes.complaint()
