"""Where pixels go: which part of an image is seen, how large, mirrored or not, and how it lies on the square input.

A placement is drawn once and applied to the image (here) and to its masks (`coverage.py`) alike. Evaluation follows the
released code's pixel rules, so that its scores can be compared; training resizes with a faster library
(`docs/fidelity.md`).
"""

# h, w pixels as they were decoded  S image side, px

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Context = float | Literal["global", "none"]
MaskRule = Literal["touched", "share", "nearest"]

cv2.setNumThreads(0)  # loader workers are many already, and OpenCV's own threads do not survive a fork


@dataclass(frozen=True, slots=True)
class Placement:
    """How an image is laid on the square input: a part of it, scaled, in the upper left corner."""

    box_xywh_px: tuple[int, int, int, int]
    """What is seen, in the image's own pixels: left, top, width, height."""
    width_px: int
    """Width of what is seen on the input; the rest of the input is padding."""
    height_px: int
    """Height of what is seen on the input."""
    side_px: int
    """Side of the input (S)."""
    flip: bool = False
    """Whether what is seen is mirrored, left to right."""

    @property
    def reduction(self) -> int:
        """1, 2, 4 or 8: the image may be decoded that many times smaller and still have a pixel for every one seen."""
        return _reduction(min(self.box_xywh_px[2] / self.width_px, self.box_xywh_px[3] / self.height_px))


def fit(width_px: int, height_px: int, side_px: int) -> Placement:
    """The placement of evaluation: the whole image, as large as the input allows.

    A square becomes S x S. Else the short side becomes S - 1 and the long one follows; where that is more than S, the
    long side becomes S and the short one follows (released rule, with its roundings).
    """
    whole = (0, 0, width_px, height_px)
    short, long = sorted((width_px, height_px))
    if short == long:
        return Placement(whole, side_px, side_px, side_px)
    new_short, new_long = side_px - 1, int((side_px - 1) * long / short)
    if new_long > side_px:
        new_short, new_long = int(side_px * (side_px - 1) / new_long), side_px
    new_short = max(1, new_short)
    return Placement(whole, *((new_short, new_long) if width_px < height_px else (new_long, new_short)), side_px)


def draw(
    width_px: int, height_px: int, side_px: int, scale: tuple[float, float], rng: np.random.Generator
) -> Placement:
    """The placement of training: the long side at a random multiple of the input, a random crop, mirrored or not.

    The crop is rounded to the image's own pixels, or to those that are left of them when it is decoded smaller, so that
    image and masks are cut at the same place.

    Args:
        width_px: width of the image.
        height_px: height of the image.
        side_px: side of the input (S).
        scale: range of the long side, as a share of S.
        rng: where the randomness comes from.
    """
    factor = side_px * rng.uniform(*scale) / max(width_px, height_px)
    x_px, seen_width_px, width = _crop(width_px, factor, side_px, rng)
    y_px, seen_height_px, height = _crop(height_px, factor, side_px, rng)
    return Placement((x_px, y_px, seen_width_px, seen_height_px), width, height, side_px, flip=bool(rng.random() < 0.5))


def _crop(size_px: int, factor: float, side_px: int, rng: np.random.Generator) -> tuple[int, int, int]:
    """One axis of a random crop: its start and length in the image, and its length on the input."""
    scaled_px = max(1, round(size_px * factor))
    start_px = int(rng.integers(0, max(0, scaled_px - side_px) + 1))
    if scaled_px <= side_px:
        return 0, size_px, scaled_px
    shrink = size_px / scaled_px
    step_px = _reduction(shrink)
    left = min(round(start_px * shrink / step_px) * step_px, size_px - 1)
    seen_px = min(max(1, round(side_px * shrink / step_px) * step_px), size_px - left)
    return left, seen_px, side_px


def _reduction(shrink: float) -> int:
    return next((factor for factor in (8, 4, 2) if factor <= shrink), 1)


def place_image(image: Image.Image, placement: Placement) -> NDArray[np.uint8]:
    """uint8[S, S, 3] of an RGB image: Pillow's bicubic, then padded right and bottom with black (released rule)."""
    p = placement
    x, y, width, height = p.box_xywh_px
    pixels = image.resize((p.width_px, p.height_px), Image.Resampling.BICUBIC, box=(x, y, x + width, y + height))
    out = _black_padding(p)
    out[: p.height_px, : p.width_px] = np.asarray(pixels)[:, :: -1 if p.flip else 1]
    return out


def place_quickly(pixels_hw3: NDArray[np.uint8], reduction: int, placement: Placement) -> NDArray[np.uint8]:
    """uint8[S, S, 3] of RGB pixels, for training: a tenth of the time of `place_image`, with nearly its pixels.

    Args:
        pixels_hw3: the image, decoded at 1/reduction of its size.
        reduction: 1, 2, 4 or 8; no more than the placement's.
        placement: how it lies on the input.
    """
    p = placement
    x, y, width, height = (round(value / reduction) for value in p.box_xywh_px)
    seen = pixels_hw3[y : y + max(1, height), x : x + max(1, width)]
    shrink = max(seen.shape[0] / p.height_px, seen.shape[1] / p.width_px)
    # Enlarged bicubically, as Pillow does; shrunk by up to two, a bilinear pixel reads nearly all there is; beyond,
    # areas are averaged.
    method = cv2.INTER_CUBIC if shrink <= 1 else cv2.INTER_LINEAR if shrink <= 2 else cv2.INTER_AREA
    out = _black_padding(p)
    target = out[: p.height_px, : p.width_px]
    cv2.resize(cv2.flip(seen, 1) if p.flip else seen, (p.width_px, p.height_px), target, interpolation=method)
    return out


def _black_padding(placement: Placement) -> NDArray[np.uint8]:
    """uint8[S, S, 3], black where nothing is seen; the rest is to be written."""
    out = np.empty((placement.side_px, placement.side_px, 3), dtype=np.uint8)
    out[placement.height_px :] = 0
    out[: placement.height_px, placement.width_px :] = 0
    return out


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
