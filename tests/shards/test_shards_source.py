import json
import re

import numpy as np
import pytest
from PIL import Image

from osm_lightning.picture import decode_image
from osm_lightning.shards.source import Findings, as_upright, read_header, stays_inside

EXIF_ORIENTATION = 0x0112
TURNED = "segment maps of images annotated as stored, turned upright with them"
ASSUMED = "images whose EXIF orientation keeps their size, taken to be annotated upright"


def save_with_orientation(path, pixels, orientation):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    Image.fromarray(pixels).save(path, exif=exif)


# 0 and 9 stand in real files and mean nothing.
@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_header_says_what_decoding_gives(tmp_path, orientation, ending):
    path = tmp_path / "image.any"
    save_with_orientation(tmp_path / f"image.{ending}", np.zeros((40, 64, 3), np.uint8), orientation)
    (tmp_path / f"image.{ending}").rename(path)
    header = read_header(path)
    assert (header.ending, header.stored_size_px) == (ending, (64, 40))
    assert header.size_px == decode_image(path.read_bytes(), "image").size


@pytest.mark.parametrize("orientation", range(5, 9))
def test_annotations_of_stored_pixels_turn_with_their_image(tmp_path, orientation):
    stored = np.zeros((40, 64, 3), np.uint8)
    stored[0:8, 16:40] = stored[8:24, 16:24] = 255  # an L, so that no flip or turn maps it to itself
    save_with_orientation(tmp_path / "image.png", stored, orientation)
    upright = decode_image((tmp_path / "image.png").read_bytes(), "image")
    notes = Findings()
    turned = as_upright(Image.fromarray(stored), read_header(tmp_path / "image.png"), "image", notes)
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(upright))
    kept = as_upright(upright, read_header(tmp_path / "image.png"), "image", notes)
    np.testing.assert_array_equal(np.asarray(kept), np.asarray(upright))
    assert notes.counts == {TURNED: 1}


@pytest.mark.parametrize(("orientation", "size"), [(2, (64, 40)), (3, (64, 40)), (4, (64, 40)), (6, (40, 40))])
def test_what_sizes_cannot_tell_is_noted(tmp_path, orientation, size):
    annotation = Image.fromarray(np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(size[1], size[0], 3))
    save_with_orientation(tmp_path / "image.jpg", np.zeros((size[1], size[0], 3), np.uint8), orientation)
    notes = Findings()
    assert as_upright(annotation, read_header(tmp_path / "image.jpg"), "image.jpg", notes) == annotation
    assert notes.lines() == [f"{ASSUMED}: 1 (image.jpg)"]


@pytest.mark.parametrize("orientation", [0, 1, 9])
def test_an_upright_image_needs_no_note(tmp_path, orientation):
    save_with_orientation(tmp_path / "image.jpg", np.zeros((40, 64, 3), np.uint8), orientation)
    notes = Findings()
    as_upright(Image.new("RGB", (64, 40)), read_header(tmp_path / "image.jpg"), "image.jpg", notes)
    assert notes.lines() == []


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, monkeypatch):
    monkeypatch.setattr("osm_lightning.shards.source.MAX_IMAGE_PIXELS", 1_000_000)
    Image.new("1", (1_000, 1_001)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match=r"bomb\.png is 1000 x 1001 px, more than 1,000,000 pixels"):
        read_header(tmp_path / "bomb.png")


@pytest.mark.parametrize("content", [b"", b"<html>", b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", b"\xff\xd8\xff\xe0"])
def test_what_is_no_image_is_named(tmp_path, content):
    (tmp_path / "broken.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "broken.jpg"))):
        read_header(tmp_path / "broken.jpg")


@pytest.mark.parametrize("name", ["a.png", "city/a.png", "..a.png", "./a.png"])
def test_names_that_stay_inside(name):
    assert stays_inside(name)


@pytest.mark.parametrize("name", ["", ".", "/a.png", "../a.png", "city/../../a.png", "..", "..\\a.png"])
def test_names_that_do_not_stay_inside(name):
    assert not stays_inside(name)


def test_findings_of_many_count_as_if_found_by_one():
    one, parts = Findings(), [Findings(), Findings()]
    for number in range(9):
        for found in (one, parts[number // 3 % 2]):
            found.add("odd numbers" if number % 2 else "even numbers", str(number))
    merged = Findings()
    for part in parts:
        merged.merge(Findings.from_json(json.loads(json.dumps(part.to_json()))))
    assert merged.counts == one.counts == {"even numbers": 5, "odd numbers": 4}
    assert sorted(merged.examples["even numbers"]) == one.examples["even numbers"]
    merged.merge(one)
    assert merged.counts["even numbers"] == 10
    assert len(merged.examples["even numbers"]) == 5
    assert merged.lines()[0].endswith(", ...)")
