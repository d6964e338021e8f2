"""Masks on the input, pixel by pixel: the truth that `data/coverage.py` is compared with.

The mask is cut, resized by Pillow's own nearest neighbour, mirrored, and laid on the input; then patches are counted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from osm_lightning.data.geometry import Placement


def placed_map(annotation: NDArray, placement: Placement) -> NDArray:
    """[S, S] of [H, W].

    In Pillow's 32-bit mode, which rounds like the 8-bit one of masks; 16-bit images take another path in Pillow.
    """
    p = placement
    x, y, width, height = p.box_xywh_px
    seen = Image.fromarray(annotation[y : y + height, x : x + width].astype(np.int32))
    shown = np.asarray(seen.resize((p.width_px, p.height_px), Image.Resampling.NEAREST))
    shown = shown[:, ::-1] if p.flip else shown
    padded = np.pad(shown, ((0, p.side_px - shown.shape[0]), (0, p.side_px - shown.shape[1])))
    return padded.astype(annotation.dtype)


def coverage(mask_SS: NDArray[np.bool_], patch_size_px: int) -> NDArray[np.float16]:
    """float16[G, G], share of each patch that bool[S, S] covers."""
    side = mask_SS.shape[0] // patch_size_px
    shares = np.empty((side, side), dtype=np.float16)
    for row in range(side):
        for column in range(side):
            top, left = row * patch_size_px, column * patch_size_px
            patch = mask_SS[top : top + patch_size_px, left : left + patch_size_px]
            shares[row, column] = np.float32(patch.sum()) / patch_size_px**2
    return shares


def tight_box(mask_SS: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 (both ends included) of a mask that has pixels."""
    rows, columns = np.nonzero(mask_SS)
    return int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())
