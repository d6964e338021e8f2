"""Label maps: pixels are ids exactly as they were written, or an error says why they can't be."""

import pickle
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from osm_lightning.record import box_of, decode, encode
from osm_lightning.shards.semantic import (
    A847_PREPARED,
    PC459_IN_VOC,
    PC459_PREPARED,
    read_label_map,
    read_label_maps,
    read_split,
)
from osm_lightning.shards.source import Findings
from osm_lightning.vocabulary import Class, Vocabulary, load_vocabulary

HEIGHT, WIDTH = 24, 31
EXIF_ORIENTATION = 0x0112
IGNORED = 65535
SMALL = Vocabulary("small", tuple(Class(number, "any", (f"class {number}",)) for number in (1, 7, 200)))


def ids_of(*class_ids, dtype=np.uint16, seed=0):
    """[H, W] of these ids, each of which is there; no region is a rectangle."""
    ids = np.random.default_rng(seed).choice(np.array(class_ids, dtype), (HEIGHT, WIDTH))
    ids[:3] = ids[0, 0]
    ids.ravel()[-len(class_ids) :] = class_ids
    return ids


def save(folder, name, ids, image_suffix=".jpg", map_suffix=".tif", maps="maps", images="images", **options):
    for sub in (maps, images):
        (folder / sub / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids).save(folder / maps / f"{name}{map_suffix}", **options)
    Image.new("RGB", ids.shape[::-1], (9, 9, 9)).save(folder / images / f"{name}{image_suffix}")


def read(folder, vocabulary=SMALL, ignored_ids=()):
    return read_label_maps(folder / "images", folder / "maps", vocabulary, ignored_ids)


def assert_same_pixels(record, ids, left_out=()):
    """Every class is one segment with exactly its pixels; ids that are left out are in none."""
    record = decode(record.key, encode(record))
    present = [class_id for class_id in np.unique(ids).tolist() if class_id not in left_out]
    assert [(segment.id, segment.class_id) for segment in record.segments] == [(str(c), c) for c in present]
    for index, segment in enumerate(record.segments):
        np.testing.assert_array_equal(record.mask(index), ids == segment.class_id)
        assert segment.area_px == (ids == segment.class_id).sum()
        assert segment.bbox_xywh_px == box_of(ids == segment.class_id)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    ("suffix", "options"),
    [(".png", {}), (".tif", {}), (".tiff", {"compression": "tiff_lzw"}), (".TIF", {"compression": "tiff_deflate"})],
)
def test_pixels_are_the_ids_that_were_written(tmp_path, dtype, suffix, options):
    ids = ids_of(1, 7, 200, dtype=dtype)
    save(tmp_path, "a", ids, map_suffix=suffix, **options)
    (record,) = read(tmp_path).records()
    assert_same_pixels(record, ids)


def test_big_endian_tiff(tmp_path):
    ids = ids_of(1, 7, 200).astype(">u2")
    save(tmp_path, "a", ids)
    (record,) = read(tmp_path).records()
    assert_same_pixels(record, ids)


def test_images_without_a_map_are_left_out_and_subfolders_keep_apart(tmp_path):
    for seed, name in enumerate(["b/0001", "a/0001", "c"]):
        save(tmp_path, name, ids_of(1, 7, seed=seed), image_suffix=".PNG")
    save(tmp_path, "c2", ids_of(1))
    (tmp_path / "maps/c2.tif").unlink()
    (tmp_path / "maps/._c.tif").write_bytes(b"Mac OS X")
    split = read(tmp_path)
    records = list(split.records())
    assert [record.source["file_name"] for record in records] == ["a/0001.PNG", "b/0001.PNG", "c.PNG"]
    assert records[2].key == "c"
    assert len({record.key for record in records}) == 3
    for record, seed in zip(records, [1, 0, 2], strict=True):
        assert_same_pixels(record, ids_of(1, 7, seed=seed))
    assert split.notes.lines() == [f"images without a label map, left out: 1 ({tmp_path}/images/c2.jpg)"]


def test_ignored_ids_are_no_segment_even_if_they_are_classes(tmp_path):
    ids = ids_of(1, 7, 99, IGNORED)
    save(tmp_path, "a", ids)
    save(tmp_path, "b", ids_of(7, IGNORED))
    split = read(tmp_path, ignored_ids=(7, 99, IGNORED))
    (record,) = split.records()
    assert_same_pixels(record, ids, left_out=(7, 99, IGNORED))
    assert split.notes.lines() == ["images without any segment, left out: 1 (b)"]


def test_images_convert_in_another_process(tmp_path):
    save(tmp_path, "a", ids_of(1, 7))
    (image,) = read(tmp_path).images
    thawed = pickle.loads(pickle.dumps(image))
    assert thawed.convert(Findings(), Findings()) == image.convert(Findings(), Findings()) is not None


@pytest.mark.parametrize("annotated", ["upright", "as stored"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_maps_lie_on_the_upright_image(tmp_path, annotated, dtype):
    stored = np.full((40, 64), 7, dtype)
    stored[0:8, 16:40] = stored[8:24, 16:24] = 200
    upright = np.rot90(stored, -1)
    save(tmp_path, "a", upright if annotated == "upright" else stored)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    Image.fromarray((stored == 200).astype(np.uint8) * 255).save(tmp_path / "images/a.jpg", exif=exif, quality=95)
    (record,) = read(tmp_path).records()
    assert_same_pixels(record, upright)
    np.testing.assert_array_equal(record.mask(1), np.asarray(record.image().convert("L")) > 127)


@pytest.mark.parametrize(
    ("bend", "message"),
    [
        (
            lambda f: save(f, "a", ids_of(1, 8, 9)),
            "annotations that can't be used: 1 (a.tif has ids that are no class: 8, 9)",
        ),
        (lambda f: save(f, "a", np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)), " and 736 more)"),
        (
            lambda f: Image.new("RGB", (WIDTH, 9)).save(f / "images/a.jpg"),
            "annotations of another size than their image: 1 (a.tif: 31 x 24 px, not 31 x 9)",
        ),
        (lambda f: (f / "images/a.jpg").write_text("<html>"), "images/a.jpg"),
        (lambda f: (f / "maps/a.tif").write_text("<html>"), "maps/a.tif: cannot identify image file"),
        (lambda f: (f / "maps/a.tif").write_bytes((f / "maps/a.tif").read_bytes()[:600]), "maps/a.tif: "),
        (lambda f: (f / "images/a.jpg").unlink(), "label maps without an image: 1 ("),
    ],
)
def test_an_unusable_image_is_named(tmp_path, bend, message):
    for name in ("a", "b"):
        save(tmp_path, name, ids_of(1, 7))
    bend(tmp_path)
    split = read(tmp_path)
    errors = Findings()
    usable = [image.key for image in split.images if image.convert(errors, Findings()) is not None]
    assert usable == ["b"]
    assert len(split) + split.num_unusable == 2
    with pytest.raises(ValueError, match=re.escape(message)):
        list(split.records())


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGB", "RGBA"])
def test_what_is_not_grey_is_refused(tmp_path, mode):
    Image.new(mode, (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(
        ValueError, match=rf"a\.png: it is of mode {mode}( with 1 bits)?, but a label map is grey with 8"
    ):
        read_label_map(tmp_path / "a.png", 7)


@pytest.mark.parametrize("bits", [2, 4])
def test_bits_that_pillow_stretches_are_refused(tmp_path, bits):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 8 // bits, 1, bits, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0\x11")) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(png)
    assert np.asarray(Image.open(tmp_path / "a.png")).max() == {2: 85, 4: 17}[bits]  # the id was 1
    with pytest.raises(
        ValueError, match=f"it is of mode L with {bits} bits, but a label map is grey with 8 or 16 bits"
    ):
        read_label_map(tmp_path / "a.png", 7)


@pytest.mark.parametrize(
    ("array", "options"),
    [
        (np.zeros((4, 4), np.int32), {}),
        (np.zeros((4, 4), np.float32), {}),
        (np.zeros((4, 4), np.uint8), {"tiffinfo": {262: 0}}),  # white is zero: Pillow turns values round
        (np.zeros((4, 4, 3), np.uint8), {}),
        (np.zeros((4, 4), bool), {}),
    ],
)
def test_other_tiffs_are_refused(tmp_path, array, options):
    Image.fromarray(array).save(tmp_path / "a.tif", **options)
    if options:
        tag = b"\x06\x01\x03\x00\x01\x00\x00\x00"  # 262, SHORT, 1 value
        data = (tmp_path / "a.tif").read_bytes()
        at = data.index(tag) + len(tag)
        (tmp_path / "a.tif").write_bytes(data[:at] + b"\0\0" + data[at + 2 :])
    with pytest.raises(ValueError, match=r"a\.tif: it is of mode .*, but a label map is grey with 8 or 16 bits"):
        read_label_map(tmp_path / "a.tif", 7)


def test_an_8_bit_map_is_refused_where_ids_need_16(tmp_path):
    save(tmp_path, "a", ids_of(1, 7).astype(np.uint8), map_suffix=".png")
    with pytest.raises(ValueError, match=r"a\.png: it has 8 bits, but class ids go up to 846, which takes 16"):
        list(read(tmp_path, load_vocabulary("a847")).records())


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, monkeypatch):
    monkeypatch.setattr("osm_lightning.shards.semantic.MAX_IMAGE_PIXELS", 1_000_000)
    Image.new("L", (1_000, 1_001)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match=r"bomb\.png: it is 1000 x 1001 px, more than 1,000,000 pixels"):
        read_label_map(tmp_path / "bomb.png", 7)


@pytest.mark.parametrize(
    ("vocabulary", "ignored_ids", "message"),
    [
        (Vocabulary("v", (Class(65_536, "any", ("x",)),)), (), "with ids up to 65536"),
        (SMALL, (1, 7, 200), "has 0 classes that are not ignored"),
        (SMALL, (-1,), r"\[-1\] are ignored"),
        (SMALL, (65_536,), r"\[65536\] are ignored"),
    ],
)
def test_ids_that_no_map_holds_are_refused(tmp_path, vocabulary, ignored_ids, message):
    save(tmp_path, "a", ids_of(1))
    with pytest.raises(ValueError, match=message):
        read(tmp_path, vocabulary, ignored_ids)


def test_two_files_of_one_name_are_refused(tmp_path):
    save(tmp_path, "a", ids_of(1))
    save(tmp_path, "a", ids_of(1), image_suffix=".png")
    with pytest.raises(ValueError, match=r"files that differ only in their ending: 1 \(.*a\.jpg, a\.png\)"):
        read(tmp_path)


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*images and no .*maps\."):
        read(tmp_path)


@pytest.mark.parametrize(
    ("layout", "split", "images", "maps", "highest", "ignored"),
    [
        (A847_PREPARED, "train", "images_detectron2/training", "annotations_detectron2/training", 846, ()),
        (A847_PREPARED, "val", "images_detectron2/validation", "annotations_detectron2/validation", 846, ()),
        (PC459_PREPARED, "train", "images/training", "annotations_ctx459/training", 458, (430,)),
        (PC459_IN_VOC, "val", "JPEGImages", "annotations_detectron2/pc459_val", 458, (430,)),
    ],
)
def test_prepared_datasets(tmp_path, layout, split, images, maps, highest, ignored):
    ids = ids_of(0, 256, highest, IGNORED, *ignored)
    save(tmp_path, "2008_000002", ids, images=images, maps=maps)
    (record,) = read_split(layout, tmp_path, split, load_vocabulary(layout.dataset)).records()
    assert record.key == "2008_000002"
    assert_same_pixels(record, ids, left_out=(IGNORED, *ignored))
    save(tmp_path, "2008_000003", ids_of(0, highest + 1), images=images, maps=maps)
    with pytest.raises(ValueError, match=f"2008_000003.tif has ids that are no class: {highest + 1}"):
        list(read_split(layout, tmp_path, split, load_vocabulary(layout.dataset)).records())


def test_real_ade20k_maps(shared_data, tmp_path):
    """Real 8-bit maps of 0 (other) to 150; classes here are shifted by one, as the maps have them."""
    source = shared_data / "ade_samples/challenge"
    for folder in ("images", "annotations"):
        (tmp_path / folder).symlink_to(source / folder)
    shifted = Vocabulary("ade", tuple(Class(e.id + 1, e.kind, e.names) for e in load_vocabulary("ade20k")))
    records = list(read_label_maps(tmp_path / "images", tmp_path / "annotations", shifted, (0,)).records())
    assert len(records) == 3
    for record in records:
        ids = np.asarray(Image.open(source / f"annotations/{record.key}.png"))
        assert_same_pixels(record, ids, left_out=(0,))
