"""Cutting a high-resolution image into windows, and laying their patch tokens together again (Sec. 3.2)."""

# I images  S image side, px  W windows per image  R windows along a side  g patches along a window's side
# G patches along the image's side (R * g)  E width

from __future__ import annotations

from math import isqrt

from torch import Tensor


def cut(images_I3SS: Tensor, window_size_px: int) -> Tensor:
    """Cuts images into windows that do not overlap.

    Args:
        images_I3SS: any dtype [I, 3, S, S], S a multiple of the window size.
        window_size_px: side of a window.

    Returns:
        [I * W, 3, window, window], windows of an image in row-major order.
    """
    num_images, channels, side, _ = images_I3SS.shape
    rows = side // window_size_px
    cells = images_I3SS.reshape(num_images, channels, rows, window_size_px, rows, window_size_px)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, window_size_px, window_size_px)


def merge(patches_IWpE: Tensor) -> Tensor:
    """Lays the patch tokens of an image's windows together, in the order of the image's rows.

    Args:
        patches_IWpE: [I, W, g * g, E], windows and patches in row-major order.

    Returns:
        [I, G * G, E], patches of the whole image in row-major order.
    """
    num_images, num_windows, num_patches, width = patches_IWpE.shape
    rows, side = isqrt(num_windows), isqrt(num_patches)
    cells = patches_IWpE.reshape(num_images, rows, rows, side, side, width)
    return cells.permute(0, 1, 3, 2, 4, 5).reshape(num_images, -1, width)
