"""Shares, boxes and areas of masks equal those of masks that are laid out pixel by pixel (`tests/reference`)."""

import naive_geometry as naive
import numpy as np
import pytest
import torch
from tiny_shards import make_record, rectangle

from osm_lightning.data.coverage import Axes, Masks
from osm_lightning.data.geometry import Placement, draw, fit
from osm_lightning.record import Segment


def assert_same(mask, placement, patch_size_px=14):
    axes = Axes(placement, patch_size_px)
    found = axes.patches(axes.seen(mask))
    placed = naive.placed_map(mask, placement)
    if not placed.any():
        assert found is None
        return False
    np.testing.assert_array_equal(found.coverage_GG, naive.coverage(placed, patch_size_px))
    assert found.coverage_GG.dtype == np.float16
    assert found.box == naive.tight_box(placed)
    assert found.area_px == placed.sum()
    return True


# 640 -> 1120 and 1024 -> 1120 are full of ties between two pixels, which Pillow's rounding decides.
@pytest.mark.parametrize("size", [(640, 480), (1024, 2048), (427, 640), (9, 1), (48, 64), (1500, 1499)])
def test_whole_images_at_the_papers_size(size):
    rng = np.random.default_rng(0)
    width, height = size
    noise = rng.random((height, width)) < 0.3
    large = rectangle(width // 3, height // 4, width, height - height // 5, height, width)
    dot = rectangle(width // 2, height // 2, width // 2 + 1, height // 2 + 1, height, width)
    for mask in (noise, large, dot):
        assert_same(mask, fit(width, height, 1120))


def test_random_crops_of_random_images():
    rng = np.random.default_rng(1)
    seen = 0
    for _ in range(300):
        width, height = (int(side) for side in rng.integers(1, 150, 2))
        mask = rng.random((height, width)) < rng.choice([0.01, 0.5])
        seen += assert_same(mask, draw(width, height, 84, (0.3, 3.0), rng))
    assert 150 < seen < 300, "some masks must vanish, and most not"


def test_every_small_size_to_every_other():
    for size in range(1, 41):
        row = np.arange(size) % 3 == 1
        for shown in range(1, 57):
            placement = Placement((0, 0, size, 1), shown, 1, 56, flip=size % 2 == 0)
            assert_same(row[None], placement)


@pytest.mark.parametrize("as_rle", [False, True])
def test_maps_and_runs_are_read_alike(as_rle):
    rng = np.random.default_rng(0)
    masks = [rectangle(0, 0, 16, 24), rectangle(16, 0, 32, 12), rectangle(20, 16, 22, 18), rectangle(31, 23, 32, 24)]
    record = make_record(masks=masks, segments=[Segment(str(i)) for i in range(4)], as_rle=as_rle)
    read = Masks(record)
    for _ in range(20):
        placement = draw(32, 24, 56, (0.4, 2.0), rng)
        read.place(placement, 14)
        for index, mask in enumerate(masks):
            placed = naive.placed_map(mask, placement)
            found = read.patches(index)
            assert (found is None) == (not placed.any())
            if found is not None:
                np.testing.assert_array_equal(found.coverage_GG, naive.coverage(placed, 14))


@pytest.mark.parametrize("size", [(32, 24), (24, 32), (30, 30), (100, 7)])
def test_nearest_is_torch_s_own_from_the_input_to_the_grid(size):
    width, height = size
    rng = np.random.default_rng(1)
    masks = [rng.random((height, width)) < share for share in (0.5, 0.05)]
    masks[1][masks[0]] = False
    record = make_record(masks=masks, segments=[Segment("0"), Segment("1")])
    read = Masks(record)
    for placement in [fit(width, height, 56), *(draw(width, height, 56, (0.4, 2.0), rng) for _ in range(10))]:
        read.place(placement, 14, nearest=True)
        for index, mask in enumerate(masks):
            placed = naive.placed_map(mask, placement)
            found = read.patches(index)
            if found is None:
                assert not placed.any()
                continue
            pixels = torch.from_numpy(placed.astype(np.float32))[None, None]
            wanted = torch.nn.functional.interpolate(pixels, size=(4, 4), mode="nearest")[0, 0].numpy()
            np.testing.assert_array_equal(found.coverage_GG, wanted)
            assert found.box == naive.tight_box(placed)
            assert found.area_px == placed.sum(), "what a mask's size is does not depend on the grid"


def test_more_segments_than_a_byte_counts():
    masks = [rectangle(x, y, x + 1, y + 1) for y in range(24) for x in range(32)][:300]
    record = make_record(masks=masks, segments=[Segment(str(i)) for i in range(300)])
    read = Masks(record)
    read.place(fit(32, 24, 56), 14)
    for index in (0, 254, 255, 256, 299):
        placed = naive.placed_map(masks[index], fit(32, 24, 56))
        assert read.patches(index).box == naive.tight_box(placed)


def test_one_pixel_of_196_does_not_vanish():
    mask = rectangle(30, 30, 31, 31, 56, 56)
    axes = Axes(fit(56, 56, 56), 14)
    found = axes.patches(axes.seen(mask))
    assert found.coverage_GG[2, 2] == np.float16(1 / 196)
    assert (found.coverage_GG > 0).sum() == 1
