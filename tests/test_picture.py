"""Decoding images: pictures of every kind that Pillow knows, and files that are none."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from osm_lightning import picture as picture_module
from osm_lightning.picture import decode_image, decode_jpeg
from osm_lightning.record import Record

HEIGHT, WIDTH = 8, 16
COLOUR = (200, 100, 50)


def packed(image: Image.Image, ending: str = "png", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format=ending, **options)
    return out.getvalue()


def plain(mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", (WIDTH, HEIGHT), COLOUR).convert(mode)


def pixel(data: bytes) -> tuple[int, ...]:
    """Top left pixel of a decoded image, and that it is RGB of the right size."""
    image = decode_image(data, "sample")
    assert (image.mode, image.size) == ("RGB", (WIDTH, HEIGHT))
    value = image.getpixel((0, 0))
    assert isinstance(value, tuple)
    return value


@pytest.mark.parametrize("ending", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(ending: str, orientation: int) -> None:
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24] = (255, 0, 0)
    upright[16:, :24] = (0, 255, 0)
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # Image.Transpose that a viewer undoes
    image = Image.fromarray(upright)
    stored = image if undo is None else image.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = np.asarray(decode_image(packed(stored, ending, exif=exif, quality=95), "sample"))
    assert decoded.shape == upright.shape
    assert np.abs(decoded.astype(int) - upright).mean() < 12


def test_grey_palette_and_bilevel_become_rgb() -> None:
    grey = plain("L").getpixel((0, 0))
    assert pixel(packed(plain("L"))) == (grey,) * 3
    assert pixel(packed(plain().quantize(4))) == COLOUR
    assert pixel(packed(Image.new("1", (WIDTH, HEIGHT), 1))) == (255,) * 3


@pytest.mark.parametrize(("stored", "shown"), [(0, 0), (257, 1), (32_896, 128), (65_535, 255)])
def test_16_bit_grey_is_scaled_not_clipped(stored: int, shown: int) -> None:
    image = Image.fromarray(np.full((HEIGHT, WIDTH), stored, np.uint16))
    assert pixel(packed(image)) == (shown,) * 3


def test_16_bit_grey_is_turned_upright_as_well() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.zeros((WIDTH, HEIGHT), np.uint16))
    assert decode_image(packed(image, exif=exif), "sample").size == (WIDTH, HEIGHT)


def test_cmyk_jpeg_as_adobe_writes_it() -> None:
    data = packed(plain("CMYK"), "jpeg", quality=95)
    assert b"Adobe" in data  # Pillow writes the inverted values and the marker, as Photoshop does
    assert np.abs(np.subtract(pixel(data), COLOUR)).max() <= 3


def test_transparency_is_dropped_not_blended() -> None:
    """Colours under transparent pixels show, as Pillow's convert shows them and as the released code reads images."""
    image = plain("RGBA")
    image.putalpha(0)
    assert pixel(packed(image)) == COLOUR
    grey = plain("LA")
    grey.putalpha(0)
    assert pixel(packed(grey)) == (plain("L").getpixel((0, 0)),) * 3
    assert pixel(packed(plain(), transparency=COLOUR)) == COLOUR


def test_first_frame_of_an_animation_counts() -> None:
    other = Image.new("RGB", (WIDTH, HEIGHT))
    assert pixel(packed(plain(), "png", save_all=True, append_images=[other])) == COLOUR


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be decoded: it is no JPEG, PNG or WebP"),
        (b"<html>404</html>", "cannot be decoded: it is no JPEG, PNG or WebP"),
        (packed(plain(), "gif"), "cannot be decoded: it is no JPEG, PNG or WebP"),
        (packed(plain(), "jpeg")[:-30], "cannot be decoded"),
        (packed(plain(), "png")[:50], "cannot be decoded"),
        (packed(plain(), "webp")[:60], "cannot be decoded"),
    ],
    ids=["empty", "html", "gif", "jpeg cut", "png cut", "webp cut"],
)
def test_broken_image_is_one_clear_error(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"image sample .*{message}"):
        decode_image(data, "sample")


def test_compressed_text_that_unpacks_to_megabytes_is_refused() -> None:
    info = PngInfo()
    info.add_text("comment", "x" * 4_000_000, zip=True)
    with pytest.raises(ValueError, match=r"image sample cannot be decoded .*TEXT"):
        decode_image(packed(plain(), pnginfo=info), "sample")


def test_image_above_pillows_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 3)
    with pytest.raises(ValueError, match=r"image sample cannot be decoded .*decompression bomb"):
        decode_image(packed(plain()), "sample")


def test_image_above_our_own_limit_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_module, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH)
    pixel(packed(plain()))
    header_only = packed(Image.new("RGB", (WIDTH, HEIGHT + 1)))[:50]
    with pytest.raises(ValueError, match="image sample is 16 x 9 px; more than 128 pixels are refused"):
        decode_image(header_only, "sample")


# JPEGs in training: another decoder, which may leave pixels out


def photograph(width: int = 90, height: int = 61, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 2, "quality": 30}])
def test_the_quick_decoder_gives_the_same_pixels(mode: str, options: dict[str, Any]) -> None:
    data = packed(photograph(mode=mode), "jpeg", **options)
    pixels = decode_jpeg(data, 90, 61, 1)
    assert pixels is not None
    np.testing.assert_array_equal(pixels, np.asarray(decode_image(data, "sample")))


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_a_smaller_decoding_is_that_of_pillows_drafts(reduction: int) -> None:
    data = packed(photograph(640, 488), "jpeg", quality=95)
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (640 // reduction, 488 // reduction))
        drafted = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(decode_jpeg(data, 640, 488, reduction), drafted)


def test_what_is_no_ordinary_jpeg_is_left_to_pillow() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    jpeg = packed(photograph(), "jpeg")
    for data in (
        packed(photograph(), "png"),
        packed(photograph(mode="CMYK"), "jpeg"),
        packed(photograph(61, 90), "jpeg", exif=turned),
        jpeg[: len(jpeg) // 2],
        b"",
    ):
        assert decode_jpeg(data, 90, 61, 1) is None
    assert decode_jpeg(jpeg, 91, 61, 1) is None, "of another size than recorded"


def test_a_record_falls_back_on_pillow_and_its_errors() -> None:
    jpeg, png = packed(photograph(), "jpeg"), packed(photograph(), "png")
    record = Record("k", jpeg, "jpg", 61, 90, ())
    assert record.pixels(2)[0].shape == (31, 45, 3)
    assert record.pixels(2)[1] == 2
    pixels, reduction = Record("k", png, "png", 61, 90, ()).pixels(2)
    assert reduction == 1
    np.testing.assert_array_equal(pixels, np.asarray(photograph()))
    with pytest.raises(ValueError, match=r"image k cannot be decoded .*Replace the file"):
        Record("k", jpeg[: len(jpeg) // 2], "jpg", 61, 90, ()).pixels(1)
    with pytest.raises(ValueError, match="the image is 90 x 61 px, but its record says 91 x 61"):
        Record("k", jpeg, "jpg", 61, 91, ()).pixels(1)
