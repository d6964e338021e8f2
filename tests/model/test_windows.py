"""Cutting into windows and laying together again, against slices."""

from __future__ import annotations

import torch

from osm_lightning.model.windows import cut, merge

IMAGES, SIDE, WINDOW, PATCH = 2, 12, 4, 2


def counting_images() -> torch.Tensor:
    """Every value another, so that any swap shows."""
    return torch.arange(IMAGES * 3 * SIDE * SIDE).view(IMAGES, 3, SIDE, SIDE)


def test_windows_are_slices_in_row_major_order() -> None:
    images = counting_images()
    slices = [
        image[:, top : top + WINDOW, left : left + WINDOW]
        for image in images
        for top in range(0, SIDE, WINDOW)
        for left in range(0, SIDE, WINDOW)
    ]
    assert torch.equal(cut(images, WINDOW), torch.stack(slices))


def test_one_window_of_the_whole_image_is_the_image() -> None:
    images = counting_images()
    assert torch.equal(cut(images, SIDE), images)


def test_merge_undoes_cut() -> None:
    images = counting_images()
    tokens = cut(images, WINDOW).flatten(2).transpose(1, 2)  # every pixel is a token of width 3
    merged = merge(tokens.reshape(IMAGES, -1, WINDOW * WINDOW, 3))
    assert torch.equal(merged, images.flatten(2).transpose(1, 2))


def test_merged_patches_stand_where_they_are_in_the_image() -> None:
    images = counting_images()
    corners = cut(images, WINDOW)[:, :1, ::PATCH, ::PATCH].flatten(2).transpose(1, 2)  # first pixel of every patch
    merged = merge(corners.reshape(IMAGES, -1, (WINDOW // PATCH) ** 2, 1))
    assert torch.equal(merged.squeeze(-1), images[:, 0, ::PATCH, ::PATCH].flatten(1))
