"""Compressed COCO RLE: encoding, safe decoding, and any COCO `segmentation` turned into it.

The runs are checked here, before pycocotools sees them: given runs that end early it returns uninitialised memory, and
given a string that breaks off within a number it reads on behind the string's end (both as of 2.0.11).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_rle

MAX_DIGITS = 7
"""Longest number in compressed counts: 35 bits, more than any image has pixels."""
MAX_COORDINATE = 1e9
"""Polygon coordinates beyond are no pixels of any image (and not-a-number is not below)."""


def encode_rle(mask: NDArray[np.bool_]) -> str:
    """Compressed COCO RLE counts of bool[H, W]."""
    counts: str = coco_rle.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode("ascii")
    return counts


def decode_rle(counts: str, height_px: int, width_px: int) -> NDArray[np.bool_]:
    """bool[H, W] of compressed COCO RLE counts.

    Raises:
        ValueError: the counts are broken, or their runs do not fill the picture exactly. The message starts in the
            middle of a sentence about the mask: the caller says which mask it is.
    """
    runs = decode_runs(counts)
    check_fills(runs, height_px, width_px)
    return fill(runs, height_px, width_px)


def fill(runs: NDArray[np.int64], height_px: int, width_px: int) -> NDArray[np.bool_]:
    """bool[H, W] of runs (int64[R]) that fill it exactly."""
    values = np.zeros(len(runs), dtype=bool)
    values[1::2] = True
    return np.repeat(values, runs).reshape(width_px, height_px).T


def to_rle(segmentation: object, height_px: int, width_px: int) -> str:
    """Compressed counts of a COCO segmentation, checked.

    Args:
        segmentation: a list of polygons, or an object with `size` and `counts` (a list, or a compressed string).
        height_px: height of the upright image.
        width_px: width of the upright image.

    Raises:
        ValueError: it is of no such form, of another size than the image, or broken. The message starts in the middle
            of a sentence about the mask: the caller says which mask it is.
    """
    match segmentation:
        case list():
            return _polygons_to_rle(segmentation, height_px, width_px)
        case {"size": [int(height), int(width)], "counts": str() | list() as counts}:
            if (height, width) != (height_px, width_px):
                raise ValueError(
                    f"is {width} x {height} px, but the image is {width_px} x {height_px} px (upright, as its EXIF "
                    "orientation says). Segment the very image that is to be named"
                )
            if isinstance(counts, str):
                check_fills(decode_runs(counts), height_px, width_px)
                return counts
            return _runs_to_rle(counts, height_px, width_px)
    raise ValueError(
        f"has a segmentation of an unknown form ({_shorten(segmentation)}); it must be a list of polygons, or "
        'an object like {"size": [height, width], "counts": ...} with RLE. Export the masks again in COCO\'s format'
    )


def decode_runs(counts: str) -> NDArray[np.int64]:
    """int64[R], lengths of the runs in compressed COCO counts, background first, column-major.

    A number is written in 5-bit digits from the lowest, each as one character above '0' with bit 5 saying that more
    follow and bit 4 of the last one being the sign; from the fourth number on it is the difference to the number two
    places before (format of COCO's maskApi.c).

    Raises:
        ValueError: a character that is no digit, a number that breaks off or is too long.
    """
    codes = np.frombuffer(counts.encode("utf-8", "surrogatepass"), dtype=np.uint8).astype(np.int64) - ord("0")
    if codes.size == 0 or codes.min() < 0 or codes.max() > 63:
        raise ValueError(f"has compressed RLE counts that no encoder writes ({_shorten(counts)}). Export it again")
    ends = np.flatnonzero(codes & 32 == 0)
    if ends.size == 0 or ends[-1] != codes.size - 1:
        raise ValueError("has compressed RLE counts that break off within a number. Export it again")
    starts = np.concatenate(([0], ends[:-1] + 1))
    num_digits = ends - starts + 1
    if num_digits.max() > MAX_DIGITS:
        raise ValueError("has compressed RLE counts with a number of over 35 bits. Export it again")
    digit = np.arange(codes.size) - np.repeat(starts, num_digits)
    runs = np.add.reduceat((codes & 31) << (5 * digit), starts)
    runs -= np.where(codes[ends] & 16, 1 << (5 * num_digits), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def check_fills(runs: NDArray[np.int64], height_px: int, width_px: int) -> None:
    """Refuses runs (int64[R]) that do not fill the picture exactly.

    Raises:
        ValueError: a run is negative, or they add up to too little or too much.
    """
    if runs.min(initial=0) < 0 or runs.max(initial=0) > height_px * width_px or runs.sum() != height_px * width_px:
        raise ValueError(
            f"has RLE runs that add up to {runs.sum()}, but a picture of {width_px} x {height_px} px needs runs of "
            f"0 or more that add up to {height_px * width_px}. Its counts are broken or of another image"
        )


def area_and_box(counts: str, height_px: int) -> tuple[int, tuple[int, int, int, int]]:
    """Pixels and tight box (x, y, width, height) of compressed counts; all zero for an empty mask.

    From the runs alone: a hundred masks of a 12-megapixel photograph take milliseconds, not seconds.
    """
    runs = decode_runs(counts)
    ends = np.cumsum(runs)[1::2]
    lengths = runs[1::2]
    starts, lasts = (ends - lengths)[lengths > 0], ends[lengths > 0] - 1
    if starts.size == 0:
        return 0, (0, 0, 0, 0)
    x0, x1 = int(starts[0]) // height_px, int(lasts[-1]) // height_px
    # A run that goes on into the next column touches the bottom of one and the top of the other.
    wraps = bool((starts // height_px != lasts // height_px).any())
    y0 = 0 if wraps else int((starts % height_px).min())
    y1 = height_px - 1 if wraps else int((lasts % height_px).max())
    return int(lengths.sum()), (x0, y0, x1 - x0 + 1, y1 - y0 + 1)


def _polygons_to_rle(polygons: list[object], height_px: int, width_px: int) -> str:
    if not polygons:
        raise ValueError("has an empty segmentation. Remove it, or give it polygons or RLE")
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(
                f"has a polygon {_shorten(polygon)}; a polygon is a flat list x0, y0, x1, y1, ... of at least three "
                "points. Mend or remove it"
            )
        if not all(isinstance(value, int | float) and abs(value) < MAX_COORDINATE for value in polygon):
            raise ValueError(
                f"has a polygon with a coordinate that is no number of pixels ({_shorten(polygon)}). Mend it"
            )
        xs, ys = np.array(polygon[0::2], dtype=np.float64), np.array(polygon[1::2], dtype=np.float64)
        # pycocotools allocates in proportion to the polygon's length, so that far points would take all memory.
        if not (
            np.abs(xs - width_px / 2).max() <= 1.5 * width_px and np.abs(ys - height_px / 2).max() <= 1.5 * height_px
        ):
            raise ValueError(
                f"has a polygon from ({xs.min():g}, {ys.min():g}) to ({xs.max():g}, {ys.max():g}), far outside its "
                f"image of {width_px} x {height_px} px. Is it another image's?"
            )
    merged = coco_rle.merge(coco_rle.frPyObjects(polygons, height_px, width_px))
    counts: str = merged["counts"].decode("ascii")
    return counts


def _runs_to_rle(counts: list[object], height_px: int, width_px: int) -> str:
    if not all(isinstance(run, int) and 0 <= run <= height_px * width_px for run in counts):
        raise ValueError(
            f"has RLE counts that are not whole numbers from 0 to {height_px * width_px} ({_shorten(counts)}). "
            "Export it again"
        )
    check_fills(np.array(counts, dtype=np.int64), height_px, width_px)
    compressed = coco_rle.frPyObjects({"size": [height_px, width_px], "counts": counts}, height_px, width_px)
    text: str = compressed["counts"].decode("ascii")
    return text


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
