import io

import numpy as np
import pytest
from naive_geometry import placed_map
from PIL import Image
from tiny_shards import noise_image

from osm_lightning.data.geometry import Placement, context_box, draw, fit, place_image, place_quickly
from osm_lightning.picture import decode_jpeg

SIZES = [(1, 1), (64, 64), (640, 480), (480, 640), (427, 640), (1001, 1000), (1000, 1001), (3, 1000), (1000, 1), (2, 3)]
CROPPED = [
    Placement((17, 5, 60, 50), 56, 47, 56),
    Placement((40, 20, 56, 28), 56, 28, 56, flip=True),
    Placement((9, 0, 20, 27), 40, 54, 56, flip=True),
    Placement((0, 0, 96, 64), 30, 20, 56, flip=True),
]
"""Of images of at least 96 x 70 px: crops that shrink, keep and enlarge; no crop but padding."""


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
    assert placement == Placement((0, 0, width, height), placement.width_px, placement.height_px, side)
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


def padded(pixels, side):
    return np.pad(pixels, ((0, side - pixels.shape[0]), (0, side - pixels.shape[1]), (0, 0)))


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_an_image_that_is_not_cropped_is_pillows_bicubic(width, height):
    image = noise_image(height, width)
    placement = fit(width, height, 56)
    placed = place_image(image, placement)
    scaled = np.asarray(image.resize((placement.width_px, placement.height_px), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(placed, padded(scaled, 56))
    assert placed.dtype == np.uint8


@pytest.mark.parametrize("placement", CROPPED)
def test_a_cropped_image_is_pillows_bicubic_of_the_crop(placement):
    x, y, width, height = placement.box_xywh_px
    image = smooth_image(100, 120)
    seen = image.resize(
        (placement.width_px, placement.height_px), Image.Resampling.BICUBIC, (x, y, x + width, y + height)
    )
    pixels = np.asarray(seen)
    expected = padded(pixels[:, ::-1] if placement.flip else pixels, 56)
    np.testing.assert_array_equal(place_image(image, placement), expected)


def smooth_image(height, width, finest_px=6):
    """A picture with detail, but none finer than a few pixels, as photographs are."""
    small = noise_image(height // finest_px, width // finest_px)
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("placement", "size", "finest_px"),
    [
        *((placement, (120, 100), 6) for placement in (*CROPPED, fit(120, 100, 56), fit(120, 100, 224))),
        (fit(960, 800, 112), (960, 800), 50),  # shrunk eight times: what is finer than a pixel of the input is noise
    ],
)
def test_the_quick_way_shows_nearly_the_same(placement, size, finest_px):
    image = smooth_image(*size[::-1], finest_px)
    quick = place_quickly(np.asarray(image), 1, placement).astype(int)
    difference = np.abs(quick - place_image(image, placement))
    assert difference.mean() < 2
    shown = np.zeros((placement.side_px, placement.side_px), dtype=bool)
    shown[: placement.height_px, : placement.width_px] = True
    assert not quick[~shown].any()
    wrong = Placement(placement.box_xywh_px, *placement_size(placement), flip=not placement.flip)
    assert np.abs(quick - place_image(image, wrong)).mean() > 10, "the test would not see a mirrored picture"


def placement_size(placement):
    return placement.width_px, placement.height_px, placement.side_px


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_a_jpeg_that_is_decoded_smaller_stays_where_it_is(reduction):
    image = smooth_image(803, 1201)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95)
    pixels = decode_jpeg(out.getvalue(), 1201, 803, reduction)
    assert pixels.shape == (-(-803 // reduction), -(-1201 // reduction), 3)
    for box in [(0, 0, 1201, 803), (136, 72, 904, 600)]:
        placement = Placement(box, box[2] // reduction, box[3] // reduction, 1120)
        assert placement.reduction == reduction
        quick, slow = place_quickly(pixels, reduction, placement).astype(int), place_image(image, placement).astype(int)
        shifts = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
        apart = {shift: np.abs(np.roll(quick, shift, (0, 1)) - slow)[2:90, 2:100].mean() for shift in shifts}
        assert min(apart, key=apart.get) == (0, 0)
        assert 2 * apart[0, 0] < min(difference for shift, difference in apart.items() if shift != (0, 0))


def test_crops_are_cut_between_the_pixels_of_the_smaller_image():
    rng = np.random.default_rng(0)
    reductions = set()
    for _ in range(300):
        placement = draw(2048, 1024, 224, (0.5, 3.0), rng)
        reductions.add(placement.reduction)
        x, y, width, _ = placement.box_xywh_px
        assert x % placement.reduction == y % placement.reduction == 0
        assert x + width == 2048 or width % placement.reduction == 0
    assert reductions == {2, 4, 8}


@pytest.mark.parametrize(
    ("shown_px", "reduction"), [(1120, 1), (641, 1), (640, 1), (321, 1), (320, 2), (161, 2), (160, 4), (80, 8), (9, 8)]
)
def test_an_image_is_never_decoded_smaller_than_it_is_shown(shown_px, reduction):
    assert Placement((0, 0, 640, 640), shown_px, shown_px, 1120).reduction == reduction


def test_image_and_map_stay_aligned():
    # Blocks of 8 px; where the placed map is the same all around a pixel, the pixel must have that segment's colour.
    rng = np.random.default_rng(0)
    segments = np.kron(rng.integers(1, 200, (12, 16)), np.ones((8, 8), dtype=int)).astype(np.uint8)
    image = Image.fromarray(np.stack([segments, 255 - segments, segments // 2], axis=2))
    checked = 0
    for _ in range(30):
        placement = draw(128, 96, 84, (0.8, 2.5), rng)
        placed = placed_map(segments, placement)
        wide = np.pad(placed, 4)
        around = [wide[dy : dy + 84, dx : dx + 84] == placed for dy in range(9) for dx in range(9)]
        sure = np.logical_and.reduce(around) & (placed > 0)
        for seen in (place_image(image, placement), place_quickly(np.asarray(image), 1, placement)):
            np.testing.assert_allclose(seen[sure][:, 0].astype(int), placed[sure], atol=3)
            np.testing.assert_allclose(seen[sure][:, 1].astype(int), 255 - placed[sure].astype(int), atol=3)
            assert not seen[placed == 0].any()
        checked += sure.sum()
    assert checked > 1000


def test_draws_keep_their_promises():
    rng = np.random.default_rng(0)
    placements = [draw(640, 480, 100, (0.5, 1.5), rng) for _ in range(400)]
    scales = []
    for p in placements:
        x, y, width, height = p.box_xywh_px
        assert min(x, y) >= 0
        assert x + width <= 640
        assert y + height <= 480
        assert max(p.width_px, p.height_px) <= 100
        assert p.width_px / width == pytest.approx(p.height_px / height, rel=0.03)  # not distorted, but for rounding
        scales.append(p.width_px / width * 640 / 100)
    assert min(scales) == pytest.approx(0.5, abs=0.02)
    assert max(scales) == pytest.approx(1.5, abs=0.02)
    assert 0.95 < np.mean(scales) < 1.05
    assert 0.4 < np.mean([p.flip for p in placements]) < 0.6
    cropped = [p.box_xywh_px for p, scale in zip(placements, scales, strict=True) if scale > 1.3]
    assert min(x for x, _, _, _ in cropped) <= 20
    assert max(x + width for x, _, width, _ in cropped) >= 620


def test_draws_repeat_with_the_generator():
    first, again, other = (draw(640, 480, 100, (0.5, 1.5), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (1, 1)])
def test_an_image_of_one_pixel_can_be_placed(size):
    rng = np.random.default_rng(0)
    image = noise_image(*size[::-1])
    for placement in (fit(*size, 56), *(draw(*size, 56, (0.5, 1.5), rng) for _ in range(20))):
        assert min(placement.width_px, placement.height_px, *placement.box_xywh_px[2:]) >= 1
        placed = placed_map(np.ones(size[::-1], dtype=bool), placement)
        assert placed.sum() == placement.width_px * placement.height_px
        assert place_image(image, placement).shape == (56, 56, 3)
        assert place_quickly(np.asarray(image), 1, placement).shape == (56, 56, 3)


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
