"""Binary masks in class folders: whose they are, what they are called, and that pixels stay what they were."""

import pickle
import re

import numpy as np
import pytest
from PIL import Image

from osm_lightning.record import box_of, decode, encode
from osm_lightning.shards.class_folders import read_class_folders
from osm_lightning.shards.source import Findings
from osm_lightning.vocabulary import Class, Vocabulary

HEIGHT, WIDTH = 24, 31
EXIF_ORIENTATION = 0x0112
SMALL = Vocabulary(
    "small", (Class(3, "any", ("red cap", "hat")), Class(9, "any", ("box",)), Class(10, "any", ("box",)))
)


def blob(seed):
    return np.random.default_rng(seed).random((HEIGHT, WIDTH)) > 0.6


def save_image(root, name):
    (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), (9, 9, 9)).save(root / "images" / name)


def save_mask(root, name, mask, value=255):
    (root / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
    pixels = mask if value is None else mask.astype(np.uint8) * value
    Image.fromarray(pixels).save(root / "masks" / f"{name}.png")


def read(root, vocabulary=None):
    return read_class_folders(root / "images", root / "masks", vocabulary)


@pytest.fixture
def root(tmp_path):
    """Two images; overlapping masks of two classes, of black and white, of 0 and 1, and with one bit."""
    save_image(tmp_path, "a.jpg")
    save_image(tmp_path, "b.webp")
    save_mask(tmp_path, "red_cap/a", blob(0))
    save_mask(tmp_path, "red_cap/a__2", blob(1), value=1)
    save_mask(tmp_path, "Hat/a__x__y", blob(2), value=None)
    save_mask(tmp_path, "Hat/b", np.ones((HEIGHT, WIDTH), bool))
    return tmp_path


MASKS = {"Hat/a__x__y": blob(2), "red_cap/a": blob(0), "red_cap/a__2": blob(1), "Hat/b": np.ones((HEIGHT, WIDTH), bool)}


def test_masks_keep_their_pixels_and_may_overlap(root):
    records = [decode(record.key, encode(record)) for record in read(root).records()]
    assert [(record.key, record.image_ending) for record in records] == [("a", "jpg"), ("b", "webp")]
    assert [segment.id for segment in records[0].segments] == ["Hat/a__x__y", "red_cap/a", "red_cap/a__2"]
    for record in records:
        for index, segment in enumerate(record.segments):
            np.testing.assert_array_equal(record.mask(index), MASKS[segment.id])
            assert (segment.area_px, segment.bbox_xywh_px) == (MASKS[segment.id].sum(), box_of(MASKS[segment.id]))
    assert (records[0].mask(0) & records[0].mask(1)).any()
    assert records[0].source == {"file_name": "a.jpg"}


def test_names_are_the_folders_as_words_or_classes_of_any_such_name(root):
    (first, _) = read(root).records()
    assert [(segment.name, segment.class_id) for segment in first.segments] == [
        ("hat", None),
        ("red cap", None),
        ("red cap", None),
    ]
    (first, _) = read(root, SMALL).records()
    assert [(segment.name, segment.class_id) for segment in first.segments] == [(None, 3)] * 3


def test_folders_without_one_class_are_refused(root):
    for name in ("cup/a", "box/a"):
        save_mask(root, name, blob(0))
    with pytest.raises(ValueError, match="cannot be converted") as caught:
        read(root, SMALL)
    assert "folders with the name of no class in vocabulary small: 1 ('cup')" in str(caught.value)
    assert "folders that several classes have the name of in vocabulary small: 1 ('box')" in str(caught.value)


def test_the_image_with_the_longest_name_has_the_mask(root):
    save_image(root, "a__x.jpg")
    save_image(root, "sub/a.jpg")
    save_mask(root, "Hat/sub/a__1", blob(5))
    found = {record.source["file_name"]: [s.id for s in record.segments] for record in read(root).records()}
    assert found == {
        "a.jpg": ["red_cap/a", "red_cap/a__2"],
        "a__x.jpg": ["Hat/a__x__y"],
        "b.webp": ["Hat/b"],
        "sub/a.jpg": ["Hat/sub/a__1"],
    }


def test_images_convert_in_another_process(root):
    for image in read(root).images:
        thawed = pickle.loads(pickle.dumps(image))
        assert thawed.convert(Findings(), Findings()) == image.convert(Findings(), Findings()) is not None


def test_what_is_left_out_is_noted(root):
    save_image(root, "c.jpg")
    save_mask(root, "Hat/b", np.zeros((HEIGHT, WIDTH), bool))
    split = read(root)
    assert [record.key for record in split.records()] == ["a"]
    assert split.notes.lines() == [
        f"images without a mask, left out: 1 ({root}/images/c.jpg)",
        f"segments without pixels, left out: 1 ({root}/masks/Hat/b.png)",
        "images without any segment, left out: 1 (b)",
    ]


def grey_levels(path):
    Image.fromarray(np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH)).save(path)


@pytest.mark.parametrize(
    ("bend", "message"),
    [
        (grey_levels, "it has 256 grey levels from 0 to 255, but a mask has two"),
        (lambda p: Image.fromarray(blob(0).astype(np.uint8) + 1).save(p), "it has 2 grey levels from 1 to 2"),
        (
            lambda p: Image.new("RGB", (WIDTH, HEIGHT)).save(p),
            "it is a PNG of mode RGB; save the mask as black and white",
        ),
        (lambda p: Image.new("P", (WIDTH, HEIGHT)).save(p), "it is a PNG of mode P"),
        (lambda p: Image.new("L", (9, HEIGHT)).save(p), "it is 9 x 24 px, its image 31 x 24"),
        (lambda p: p.write_text("<html>"), "cannot identify image file"),
        (lambda p: p.write_bytes((p.parent / "a__x__y.png").read_bytes()[:99]), "masks/Hat/b.png"),
    ],
)
def test_a_broken_mask_makes_its_image_unusable(root, bend, message):
    bend(root / "masks/Hat/b.png")
    split = read(root)
    errors = Findings()
    assert [image.key for image in split.images if image.convert(errors, Findings()) is not None] == ["a"]
    with pytest.raises(ValueError, match="masks that can't be read: 1 .*" + re.escape(message)):
        list(split.records())


def test_a_bomb_is_refused_by_its_header(root, monkeypatch):
    monkeypatch.setattr("osm_lightning.shards.class_folders.MAX_IMAGE_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(ValueError, match="it is 31 x 24 px, more than 743 pixels"):
        list(read(root).records())


def test_masks_of_missing_images_count_their_images(root):
    for name in ("Hat/gone__1", "red_cap/gone__2", "Hat/lost"):
        save_mask(root, name, blob(0))
    split = read(root)
    assert (len(split), split.num_unusable) == (2, 2)
    assert split.errors.counts == {"masks without an image": 3}


def test_masks_of_stored_pixels_turn_with_their_image(root):
    stored = blob(7)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 8
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "images/b.webp", exif=exif)
    save_mask(root, "Hat/b", stored)
    record = list(read(root).records())[1]
    np.testing.assert_array_equal(record.mask(0), np.rot90(stored))


@pytest.mark.parametrize("missing", ["images", "masks"])
def test_a_missing_folder_is_named(root, missing):
    (root / missing).rename(root / "elsewhere")
    with pytest.raises(ValueError, match=f"there is no folder {root}/{missing}"):
        read(root)


def test_a_folder_without_classes_is_refused(root):
    (root / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no folder; it must hold one for each class"):
        read_class_folders(root / "images", root / "empty", None)
