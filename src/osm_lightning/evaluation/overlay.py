"""Draws masks and their names on an image: a picture to look at, from which nothing is ever read back.

Colours and places are computed, not drawn by lot: the same input gives the same picture.
"""

# Shape letters: H, W image height and width  h, w height and width of a mask's box  P candidate places of a label

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from osm_lightning.record import box_of

FILL_OPACITY = 0.45
PLATE_OPACITY = 0.9
MAX_NAME_CHARACTERS = 32
GRID = 48
"""A mask is thinned out to at most this many rows and columns to look for a place inside it."""

# B. Ottosson, "A perceptual color space for image processing", 2020.
CONES_OF_OKLAB = np.array(
    [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
)
LINEAR_OF_CONES = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]
"""x0, y0, x1, y1; the second corner is outside."""


@dataclass(frozen=True, slots=True)
class _Region:
    """One mask cut to its box and, within the image, one pixel around it: large images with many masks stay cheap."""

    mask_hw: NDArray[np.bool_]
    x: int
    y: int
    area_px: int
    name: str
    colour: Colour


def draw_overlay(image: Image.Image, masks: Iterable[NDArray[np.bool_]], names: Sequence[str]) -> Image.Image:
    """Draws every mask in a colour of its own, with an outline and its name.

    Args:
        image: RGB.
        masks: K of bool[H, W], of the image's size; may be a generator, only cuts are kept.
        names: one per mask; an empty name draws no label.

    Returns:
        A new RGB image of the same size.

    Raises:
        ValueError: a mask is not of the image's size, or there are more or fewer names than masks.
    """
    regions = _cut(masks, names, image.size)
    canvas_HW3 = np.array(image.convert("RGB"))
    line_px = max(1, round(min(image.size) / 260))
    for region in regions:
        _paint(canvas_HW3, region, line_px)
    picture = Image.fromarray(canvas_HW3)
    # With a size given it is Pillow's built-in FreeType font; without FreeType it raises.
    font = cast("ImageFont.FreeTypeFont", ImageFont.load_default(size=max(10, round(min(image.size) / 34))))
    _write_names(picture, regions, font)
    return picture


def colour_of(index: int) -> Colour:
    """RGB colour of a mask: hues by the golden angle, so that neighbours in the list differ most.

    Lightness and chroma are OKLab's: no colour is so dark that black text cannot be read on it.
    """
    hue, lightness = np.radians(255 + 137.508 * index), (0.76, 0.86, 0.67)[index % 3]
    lab = np.array([lightness, 0.15 * np.cos(hue), 0.15 * np.sin(hue)])
    linear = LINEAR_OF_CONES @ (CONES_OF_OKLAB @ lab) ** 3
    gamma = 1.055 * np.maximum(linear, 0.0031308) ** (1 / 2.4) - 0.055
    red, green, blue = np.clip(np.round(255 * gamma), 0, 255).astype(int).tolist()
    return red, green, blue


def _cut(masks: Iterable[NDArray[np.bool_]], names: Sequence[str], size_px: tuple[int, int]) -> list[_Region]:
    """Masks that have pixels, large ones first, so that small ones are painted over them."""
    regions = []
    for index, (mask_HW, name) in enumerate(zip(masks, names, strict=True)):
        if mask_HW.shape != (size_px[1], size_px[0]):
            raise ValueError(
                f"mask {index} is {mask_HW.shape[1]} x {mask_HW.shape[0]} px, but the image is {size_px[0]} x "
                f"{size_px[1]} px. Give the masks of this image."
            )
        x, y, width, height = box_of(mask_HW)
        x0, y0 = max(x - 1, 0), max(y - 1, 0)
        cut_hw = mask_HW[y0 : y + height + 1, x0 : x + width + 1].copy()
        regions.append(_Region(cut_hw, x0, y0, int(cut_hw.sum()), _shorten(name), colour_of(index)))
    return sorted((region for region in regions if region.area_px), key=lambda region: -region.area_px)


def _shorten(name: str) -> str:
    text = " ".join(name.split())
    return text if len(text) <= MAX_NAME_CHARACTERS else text[: MAX_NAME_CHARACTERS - 3] + "..."


def _paint(canvas_HW3: NDArray[np.uint8], region: _Region, line_px: int) -> None:
    """Blends the mask's colour in, opaque along the inside of its outline."""
    height, width = region.mask_hw.shape
    part_hw3 = canvas_HW3[region.y : region.y + height, region.x : region.x + width]
    colour = np.array(region.colour, dtype=np.float32)
    inner_hw = region.mask_hw
    for step in range(line_px):
        # "edge": a mask that goes on to the border of the image has no outline there.
        inner_hw = _erode(inner_hw, "edge", diagonal=step % 2 == 1)
    edge_hw = region.mask_hw & ~inner_hw
    part_hw3[inner_hw] = ((1 - FILL_OPACITY) * part_hw3[inner_hw] + FILL_OPACITY * colour).astype(np.uint8)
    part_hw3[edge_hw] = region.colour


def _erode(mask_hw: NDArray[np.bool_], beyond: Literal["constant", "edge"], diagonal: bool) -> NDArray[np.bool_]:
    """Takes away the pixels that touch the outside, over an edge or (diagonal) a corner too.

    Args:
        mask_hw: bool[h, w].
        beyond: what lies beyond the cut: nothing (constant), or what lies at its border (edge).
        diagonal: whether corners count; taking turns makes the distance nearly round.
    """
    padded = np.pad(mask_hw, 1, mode=beyond)
    if diagonal:
        rows = padded[:-2] & padded[1:-1] & padded[2:]
        return rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]
    across = padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask_hw & across & padded[:-2, 1:-1] & padded[2:, 1:-1]


def _write_names(picture: Image.Image, regions: Sequence[_Region], font: ImageFont.FreeTypeFont) -> None:
    """Places all labels, those with the fewest places to go first, then writes them."""
    placed: list[tuple[Box, _Region]] = []
    for region in reversed(regions):
        if region.name:
            size = _plate_size(region.name, font)
            placed.append((_place(region, size, picture.size, [box for box, _ in placed]), region))
    # An RGBA drawing board on an RGB picture blends what it draws.
    board = ImageDraw.Draw(picture, "RGBA")
    for (x0, y0, x1, y1), region in placed:
        board.rounded_rectangle(
            (x0, y0, x1 - 1, y1 - 1), radius=(y1 - y0) // 5, fill=(*region.colour, round(255 * PLATE_OPACITY))
        )
        board.text(((x0 + x1) / 2, (y0 + y1) / 2), region.name, font=font, fill=(0, 0, 0), anchor="mm")


def _plate_size(name: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    """Width and height of a label; the height is the font's, so that all plates are alike."""
    return round(font.getlength(name) + 0.6 * font.size), round(1.3 * font.size)


def _place(region: _Region, plate: tuple[int, int], size_px: tuple[int, int], taken: Sequence[Box]) -> Box:
    """The place that hides least of other labels, then the one deepest inside the mask.

    Args:
        region: the mask.
        plate: width and height of its label.
        size_px: width and height of the image.
        taken: labels that have their place.
    """
    centres_P2, cost_P = _inside(region) if _has_room(region, plate) else _beside(region, plate)
    limits = np.maximum(np.array(size_px) - plate, 0)
    corners_P2 = np.clip(np.round(centres_P2 - np.array(plate) / 2), 0, limits).astype(np.int64)
    for x0, y0, x1, y1 in taken:
        # One pixel of air between labels.
        overlap_x_P = np.minimum(corners_P2[:, 0] + plate[0], x1 + 1) - np.maximum(corners_P2[:, 0], x0 - 1)
        overlap_y_P = np.minimum(corners_P2[:, 1] + plate[1], y1 + 1) - np.maximum(corners_P2[:, 1], y0 - 1)
        cost_P = cost_P + 10 * np.maximum(overlap_x_P, 0) * np.maximum(overlap_y_P, 0) / (plate[0] * plate[1])
    x0, y0 = corners_P2[int(np.argmin(cost_P))].tolist()
    return x0, y0, x0 + plate[0], y0 + plate[1]


def _has_room(region: _Region, plate: tuple[int, int]) -> bool:
    """Whether a label leaves most of the mask to be seen."""
    return region.area_px > 2 * plate[0] * plate[1]


def _inside(region: _Region) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points of the mask (float[P, 2], x and y) and their cost in [0, 1]: 0 is farthest from the outline."""
    step = max(1, -(-max(region.mask_hw.shape) // GRID))
    thin_hw = region.mask_hw[step // 2 :: step, step // 2 :: step]
    if not thin_hw.any():
        thin_hw, step = region.mask_hw, 1
    depth_hw = np.zeros(thin_hw.shape)
    left_hw, round_ = thin_hw, 0
    while left_hw.any():
        depth_hw += left_hw
        left_hw, round_ = _erode(left_hw, "constant", diagonal=round_ % 2 == 1), round_ + 1
    ys, xs = np.nonzero(thin_hw)
    centres_P2 = np.stack([xs, ys], axis=1) * step + step // 2 + np.array([region.x, region.y])
    depth_P = depth_hw[ys, xs]
    # Among equally deep points, the one nearest to the mask's centre.
    away_P = np.linalg.norm(centres_P2 - centres_P2.mean(axis=0), axis=1)
    return centres_P2, 1 - depth_P / depth_P.max() + 0.1 * away_P / (away_P.max() + 1)


def _beside(region: _Region, plate: tuple[int, int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points around the box of a small mask at which a label does not hide it, nearest and topmost first."""
    height, width = region.mask_hw.shape
    x, y = region.x + width / 2, region.y + height / 2
    dx, dy = (width + plate[0]) / 2 + 1, (height + plate[1]) / 2 + 1
    away = [(0, -1), (0, 1), (1, 0), (-1, 0), (1, -1), (-1, -1), (1, 1), (-1, 1)]
    away += [(0, -2), (0, 2), (1, -2), (-1, -2), (1, 2), (-1, 2)]
    centres_P2 = np.array([(x + right * dx, y + down * dy) for right, down in away])
    return centres_P2, np.linspace(0, 1, len(away))
