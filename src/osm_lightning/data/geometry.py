"""Where pixels go: scale, flip, crop and pad of an image and its masks, and what is left of a mask on the grid.

A placement is drawn once and applied to the image and to the masks alike. The pixel rules are the released code's, so
that its scores can be compared (`docs/fidelity.md`).
"""

# H, W image as it came, px  S image side, px  G patch-grid side  K masks  s segments of a map

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Context = float | Literal["global", "none"]


@dataclass(frozen=True, slots=True)
class Placement:
    """How an image is laid on the square input."""

    width_px: int
    """Width of the image after scaling."""
    height_px: int
    """Height of the image after scaling."""
    side_px: int
    """Side of the input (S)."""
    x_px: int = 0
    """Left edge of the crop in the scaled image."""
    y_px: int = 0
    """Upper edge of the crop in the scaled image."""
    flip: bool = False
    """Whether the crop is mirrored, left to right."""

    @property
    def crop_width_px(self) -> int:
        """Width of what is seen; the rest of the input is padding."""
        return min(self.width_px - self.x_px, self.side_px)

    @property
    def crop_height_px(self) -> int:
        """Height of what is seen."""
        return min(self.height_px - self.y_px, self.side_px)


def fit(width_px: int, height_px: int, side_px: int) -> Placement:
    """The placement of evaluation: the whole image, as large as the input allows.

    A square becomes S x S. Else the short side becomes S - 1 and the long one follows; where that is more than S, the
    long side becomes S and the short one follows (released rule, with its roundings).
    """
    short, long = sorted((width_px, height_px))
    if short == long:
        return Placement(side_px, side_px, side_px)
    new_short, new_long = side_px - 1, int((side_px - 1) * long / short)
    if new_long > side_px:
        new_short, new_long = int(side_px * (side_px - 1) / new_long), side_px
    new_short = max(1, new_short)
    return Placement(*((new_short, new_long) if width_px < height_px else (new_long, new_short)), side_px)


def draw(
    width_px: int, height_px: int, side_px: int, scale: tuple[float, float], rng: np.random.Generator
) -> Placement:
    """The placement of training: the long side at a random multiple of the input, a random crop, mirrored or not.

    Args:
        width_px: width of the image.
        height_px: height of the image.
        side_px: side of the input (S).
        scale: range of the long side, as a share of S.
        rng: where the randomness comes from.
    """
    long_px = side_px * rng.uniform(*scale)
    factor = long_px / max(width_px, height_px)
    width, height = max(1, round(width_px * factor)), max(1, round(height_px * factor))
    x_px = int(rng.integers(0, max(0, width - side_px) + 1))
    y_px = int(rng.integers(0, max(0, height - side_px) + 1))
    return Placement(width, height, side_px, x_px, y_px, flip=bool(rng.random() < 0.5))


def place_image(image: Image.Image, placement: Placement) -> NDArray[np.uint8]:
    """uint8[3, S, S] of an RGB image: bicubic, then padded right and bottom with black."""
    p = placement
    width, height = p.crop_width_px, p.crop_height_px
    across, down = image.width / p.width_px, image.height / p.height_px
    box = (p.x_px * across, p.y_px * down, (p.x_px + width) * across, (p.y_px + height) * down)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))
    out = np.zeros((3, p.side_px, p.side_px), dtype=np.uint8)
    out[:, :height, :width] = (pixels[:, ::-1] if p.flip else pixels).transpose(2, 0, 1)
    return out


def place_map(array: NDArray, placement: Placement) -> NDArray:
    """[S, S] of [H, W], any dtype: nearest neighbour, padded with zeros. Reads only the pixels that are wanted."""
    p = placement
    rows = _nearest(array.shape[0], p.height_px, p.y_px, p.crop_height_px)
    columns = _nearest(array.shape[1], p.width_px, p.x_px, p.crop_width_px)
    if p.flip:
        columns = columns[::-1]
    out = np.zeros((p.side_px, p.side_px), dtype=array.dtype)
    out[: len(rows), : len(columns)] = array[rows][:, columns]  # one axis at a time: four times as fast
    return out


def _nearest(size: int, scaled: int, start: int, count: int) -> NDArray[np.intp]:
    # Pillow adds its steps up, and the rounding of the sum decides ties: 640 px to 1120 have one in seven.
    step = size / scaled
    centres = np.cumsum(np.r_[step / 2, np.full(scaled - 1, step)])
    return centres[start : start + count].astype(np.intp)


def areas(segment_map: NDArray[np.uint16], num_segments: int) -> NDArray[np.int64]:
    """int64[s], pixels of every segment of a map that counts segments from 1."""
    return np.bincount(segment_map.ravel(), minlength=num_segments + 1)[1:]


def coverage(mask: NDArray[np.bool_], patch_size_px: int) -> NDArray[np.float16]:
    """float16[G, G], share of each patch that bool[S, S] covers."""
    side = mask.shape[0] // patch_size_px
    cells = mask.reshape(side, patch_size_px, side, patch_size_px)
    return (cells.sum(axis=(1, 3), dtype=np.float32) / patch_size_px**2).astype(np.float16)


def tight_box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 (both ends included) of a mask that has pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def context_box(box: tuple[int, int, int, int], side_px: int, context: Context) -> tuple[int, int, int, int]:
    """A mask's box enlarged by a share of its size on each side and clipped to the input, both ends included.

    Args:
        box: x0, y0, x1, y1 of the mask, both ends included.
        side_px: side of the input (S).
        context: the share (0.5 in the paper); "global" is the whole input, "none" the box as it is.
    """
    if context == "global":
        return (0, 0, side_px - 1, side_px - 1)
    share = 0.0 if context == "none" else float(context)
    x0, y0, x1, y1 = box
    dx, dy = share * (x1 - x0 + 1), share * (y1 - y0 + 1)
    last = side_px - 1
    return (max(0, int(x0 - dx)), max(0, int(y0 - dy)), min(last, int(x1 + dx)), min(last, int(y1 + dy)))
