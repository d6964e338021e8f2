import numpy as np
import pytest
from PIL import Image
from tiny_shards import noise_image

from osm_lightning.data.geometry import (
    Placement,
    areas,
    context_box,
    coverage,
    draw,
    fit,
    place_image,
    place_map,
    tight_box,
)

SIZES = [(1, 1), (64, 64), (640, 480), (480, 640), (427, 640), (1001, 1000), (1000, 1001), (3, 1000), (1000, 1), (2, 3)]
CROPPED = [
    Placement(84, 63, 56, x_px=17, y_px=5, flip=False),
    Placement(84, 63, 56, x_px=28, y_px=7, flip=True),
    Placement(84, 40, 56, x_px=9, y_px=0, flip=True),
    Placement(30, 21, 56, flip=True),
]
"""Crop in both directions, at the far corner, in one direction; no crop but padding."""


def fitted_size(width, height, side):
    """The released rule, restated (short side to S - 1 unless the long one becomes too long)."""
    if width == height:
        return side, side
    short, long = min(width, height), max(width, height)
    new_short, new_long = side - 1, int((side - 1) * long / short)
    if new_long > side:
        new_short = max(1, int(side * (side - 1) / new_long))
        new_long = side
    return (new_long, new_short) if width > height else (new_short, new_long)


@pytest.mark.parametrize("side", [56, 224, 1120])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_fit_is_the_released_rule(width, height, side):
    placement = fit(width, height, side)
    assert (placement.width_px, placement.height_px) == fitted_size(width, height, side)
    assert placement == Placement(placement.width_px, placement.height_px, side)  # no crop, no flip
    assert max(placement.width_px, placement.height_px) <= side


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((640, 480), 1120, (1120, 840)),  # 1119 -> 1492, too long -> int(1120 * 1119 / 1492)
        ((480, 640), 1120, (840, 1120)),
        ((1001, 1000), 224, (223, 223)),  # 223 -> int(223.223)
        ((1000, 3), 56, (56, 1)),  # int(56 * 55 / 18333) is 0, and an image has at least one row
        ((7, 7), 56, (56, 56)),
    ],
)
def test_fit_by_hand(size, side, expected):
    placement = fit(*size, side)
    assert (placement.width_px, placement.height_px) == expected


def resized(array, placement):
    """Pillow's own nearest neighbour, cropped, mirrored and padded step by step.

    In its 32-bit mode, which rounds like the 8-bit one of masks; 16-bit images take another path in Pillow.
    """
    p = placement
    image = Image.fromarray(array.astype(np.int32))
    scaled = np.asarray(image.resize((p.width_px, p.height_px), Image.Resampling.NEAREST))
    seen = scaled[p.y_px : p.y_px + p.side_px, p.x_px : p.x_px + p.side_px]
    seen = seen[:, ::-1] if p.flip else seen
    return np.pad(seen, ((0, p.side_px - seen.shape[0]), (0, p.side_px - seen.shape[1])))


# 640 -> 1120 and 1024 -> 1120 are full of ties between two pixels, which Pillow's rounding decides.
@pytest.mark.parametrize("placement", [*CROPPED, *(fit(w, h, 1120) for w, h in [(640, 480), (1024, 2048), (427, 640)])])
@pytest.mark.parametrize("size", [(480, 640), (2048, 1024), (640, 427), (48, 64), (1, 9)])
def test_a_map_is_placed_as_pillow_would(size, placement):
    array = np.random.default_rng(0).integers(0, 60_000, size).astype(np.uint16)
    np.testing.assert_array_equal(place_map(array, placement), resized(array, placement))


def test_nearest_neighbour_is_pillows_for_all_small_sizes():
    for size in range(1, 41):
        row = np.arange(size, dtype=np.uint8)[None]
        for scaled in range(1, 57):
            placement = Placement(scaled, 1, 56)
            np.testing.assert_array_equal(
                place_map(row, placement), resized(row, placement), err_msg=f"{size} px to {scaled} px"
            )


def test_a_map_keeps_its_type():
    for kind in (np.bool_, np.uint8, np.uint16):
        placed = place_map(np.ones((5, 7), dtype=kind), Placement(10, 8, 14))
        assert placed.dtype == kind
        assert placed.sum() == 80


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_an_image_that_is_not_cropped_is_pillows_bicubic(width, height):
    image = noise_image(height, width)
    placement = fit(width, height, 56)
    placed = place_image(image, placement)
    scaled = np.asarray(image.resize((placement.width_px, placement.height_px), Image.Resampling.BICUBIC))
    expected = np.pad(scaled, ((0, 56 - scaled.shape[0]), (0, 56 - scaled.shape[1]), (0, 0)))
    np.testing.assert_array_equal(placed, expected.transpose(2, 0, 1))
    assert placed.dtype == np.uint8


@pytest.mark.parametrize("placement", CROPPED)
@pytest.mark.parametrize("size", [(96, 128), (20, 27)])
def test_a_cropped_image_is_the_crop_of_the_scaled_image(placement, size):
    p = placement
    image = noise_image(*size)
    scaled = np.asarray(image.resize((p.width_px, p.height_px), Image.Resampling.BICUBIC))
    expected = scaled[p.y_px : p.y_px + p.side_px, p.x_px : p.x_px + p.side_px]
    expected = expected[:, ::-1] if p.flip else expected
    height, width = expected.shape[:2]
    placed = place_image(image, p).transpose(1, 2, 0)
    difference = np.abs(placed[:height, :width].astype(int) - expected)
    assert difference.max() <= 1  # the box of the crop is kept in single precision
    assert not placed[height:].any()
    assert not placed[:, width:].any()


def test_image_and_map_stay_aligned():
    # Blocks of 8 px; where the placed map is the same all around a pixel, the pixel must have that segment's colour.
    rng = np.random.default_rng(0)
    segments = np.kron(rng.integers(1, 200, (12, 16)), np.ones((8, 8), dtype=int)).astype(np.uint8)
    image = Image.fromarray(np.stack([segments, 255 - segments, segments // 2], axis=2))
    checked = 0
    for _ in range(30):
        placement = draw(128, 96, 84, (0.8, 2.5), rng)
        seen, placed = place_image(image, placement), place_map(segments, placement)
        wide = np.pad(placed, 4)
        around = [wide[dy : dy + 84, dx : dx + 84] == placed for dy in range(9) for dx in range(9)]
        sure = np.logical_and.reduce(around) & (placed > 0)
        np.testing.assert_allclose(seen[0][sure].astype(int), placed[sure], atol=3)
        np.testing.assert_allclose(seen[1][sure].astype(int), 255 - placed[sure].astype(int), atol=3)
        assert not seen[:, placed == 0].any()
        checked += sure.sum()
    assert checked > 1000


def test_draws_keep_their_promises():
    rng = np.random.default_rng(0)
    placements = [draw(640, 480, 100, (0.5, 1.5), rng) for _ in range(400)]
    for p in placements:
        assert 50 <= p.width_px <= 150
        assert p.height_px == pytest.approx(p.width_px * 0.75, abs=1)
        assert 0 <= p.x_px <= max(0, p.width_px - 100)
        assert 0 <= p.y_px <= max(0, p.height_px - 100)
        assert p.crop_width_px == min(p.width_px, 100)
        assert p.crop_height_px == min(p.height_px, 100)
    assert 0.4 < np.mean([p.flip for p in placements]) < 0.6
    assert 95 < np.mean([p.width_px for p in placements]) < 105
    cropped = [p for p in placements if p.width_px > 130]
    assert min(p.x_px for p in cropped) <= 3
    assert max(p.x_px + 100 - p.width_px for p in cropped) >= -3


def test_draws_repeat_with_the_generator():
    first, again, other = (draw(640, 480, 100, (0.5, 1.5), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (1, 1)])
def test_an_image_of_one_pixel_can_be_placed(size):
    rng = np.random.default_rng(0)
    for placement in (fit(*size, 56), *(draw(*size, 56, (0.5, 1.5), rng) for _ in range(20))):
        assert min(placement.crop_width_px, placement.crop_height_px) >= 1
        placed = place_map(np.ones(size[::-1], dtype=bool), placement)
        assert placed.sum() == placement.crop_width_px * placement.crop_height_px
        assert place_image(noise_image(*size[::-1]), placement).shape == (3, 56, 56)


def test_coverage_is_the_share_of_every_patch():
    mask = np.random.default_rng(0).random((42, 42)) < 0.3
    mask[:14, :14], mask[14:28, :14] = True, False
    mask[28:42, 28:42] = False
    mask[30, 30] = True
    shares = coverage(mask, 14)
    assert shares.dtype == np.float16
    for row in range(3):
        for column in range(3):
            inside = [mask[14 * row + y, 14 * column + x] for y in range(14) for x in range(14)]
            assert shares[row, column] == np.float16(sum(inside) / 196)
    assert shares[0, 0] == 1
    assert shares[1, 0] == 0
    assert shares[2, 2] > 0  # one pixel of 196 does not vanish


def test_areas_count_every_segment_even_the_absent_ones():
    segment_map = np.array([[0, 1, 1], [3, 3, 3]], dtype=np.uint16)
    assert areas(segment_map, 4).tolist() == [2, 0, 3, 0]
    assert areas(np.zeros((2, 2), dtype=np.uint16), 0).tolist() == []


def test_tight_box_holds_all_pixels_and_no_more():
    mask = np.zeros((9, 8), dtype=bool)
    mask[2, 5] = mask[6, 1] = True
    assert tight_box(mask) == (1, 2, 5, 6)
    assert tight_box(np.ones((9, 8), dtype=bool)) == (0, 0, 7, 8)


@pytest.mark.parametrize(
    ("box", "context", "expected"),
    [
        ((10, 20, 14, 22), 0.5, (7, 18, 16, 23)),  # 5 x 3 px: 2.5 and 1.5 more on each side, fractions cut off
        ((10, 20, 13, 23), 0.5, (8, 18, 15, 25)),  # both ends count: 4 px, 2 more
        ((30, 30, 30, 30), 0.5, (29, 29, 30, 30)),  # one pixel: 29.5 and 30.5, cut off
        ((1, 2, 40, 50), 0.5, (0, 0, 55, 55)),  # clipped on all sides; never negative
        ((0, 0, 0, 0), 3.0, (0, 0, 3, 3)),
        ((10, 20, 14, 22), 0.0, (10, 20, 14, 22)),
        ((10, 20, 14, 22), "none", (10, 20, 14, 22)),
        ((10, 20, 14, 22), "global", (0, 0, 55, 55)),
    ],
)
def test_context_box(box, context, expected):
    assert context_box(box, 56, context) == expected
