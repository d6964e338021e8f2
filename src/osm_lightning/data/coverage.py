"""What a record's masks are under a placement: their share of every patch, their box, their number of pixels.

A mask is resized by nearest neighbour (released rule), so that every pixel of the input shows one of the annotation's.
Nothing is laid out on the input: a pixel counts as often as it is shown, and its rows and columns can be counted apart.
All counts are whole numbers and exact; `tests/reference/` does the same pixel by pixel.
"""

# h, w pixels of the annotation that are seen  G patch-grid side  g patches of a band

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from osm_lightning.data.geometry import Placement
from osm_lightning.record import Record
from osm_lightning.rle import fill

BAND_PATCHES = 16
"""Patches of a band: enough for a matrix product to be quick, and few enough that it is mostly not zeros."""


class Patches(NamedTuple):
    """One mask, as the model reads it."""

    coverage_GG: NDArray[np.float16]
    """Share of each patch that the mask covers, in [0, 1]; by the rule "nearest" 1 or 0, as the patch's first pixel."""
    box: tuple[int, int, int, int]
    """x0, y0, x1, y1 of the mask on the input, both ends included."""
    area_px: int
    """Pixels of the mask on the input."""


class Band(NamedTuple):
    """Some neighbouring patches along one axis, and the rows or columns of the annotation that they show."""

    patches: slice
    begin: int
    """First of these rows or columns."""
    times_gh: NDArray[np.float32]
    """[g, h], how many pixels of each of these patches show each of these rows or columns."""

    def within(self, first: int, last: int) -> tuple[slice, NDArray[np.float32]] | None:
        """The band's part between two positions (both included): the slice from `first` on, and its times."""
        low, high = max(first, self.begin), min(last + 1, self.begin + self.times_gh.shape[1])
        if low >= high:
            return None
        return slice(low - first, high - first), self.times_gh[:, low - self.begin : high - self.begin]


class Axis:
    """Rows or columns of an annotation under a placement. Those that no pixel of the input shows are left out."""

    def __init__(self, start: int, seen: int, shown: int, flip: bool, patch_size_px: int) -> None:
        """Shows `seen` pixels of an annotation, from `start`, on `shown` pixels of the input.

        Which one a pixel shows is Pillow's choice: it adds its steps up, and the rounding of the sum decides ties (640
        px to 1120 have one in seven).
        """
        steps = np.full(shown, seen / shown)
        steps[0] /= 2
        nearest = np.cumsum(steps).astype(np.intp)
        changes = np.diff(nearest, prepend=-1) > 0
        position = np.cumsum(changes) - 1
        self.source = nearest[changes] + start
        """[h], positions in the annotation, ascending."""
        self.position = position[::-1] if flip else position
        """[pixels of the input], which of the positions each shows."""
        self.bands = list(self._bands(patch_size_px))

    def _bands(self, patch_size_px: int) -> Iterator[Band]:
        shown, num_positions = len(self.position), len(self.source)
        grid = -(-shown // patch_size_px)
        pairs = np.arange(shown) // patch_size_px * num_positions + self.position
        times_gh = np.bincount(pairs, minlength=grid * num_positions).reshape(grid, -1).astype(np.float32)
        for begin in range(0, grid, BAND_PATCHES):
            end = min(begin + BAND_PATCHES, grid)
            ends = self.position[begin * patch_size_px], self.position[min(end * patch_size_px, shown) - 1]
            yield Band(slice(begin, end), int(min(ends)), times_gh[begin:end, min(ends) : max(ends) + 1])

    def span(self, first: int, last: int) -> tuple[int, int]:
        """First and last pixel of the input that show any of the positions between two, both included."""
        shown = np.flatnonzero((self.position >= first) & (self.position <= last))
        return int(shown[0]), int(shown[-1])


class Axes:
    """Both axes of a placement."""

    def __init__(self, placement: Placement, patch_size_px: int, nearest: bool = False) -> None:
        x, y, width, height = placement.box_xywh_px
        self.patch_size_px, self.grid = patch_size_px, placement.side_px // patch_size_px
        self.nearest = nearest
        self.rows = Axis(y, height, placement.height_px, False, patch_size_px)
        self.columns = Axis(x, width, placement.width_px, placement.flip, patch_size_px)

    def seen(self, annotation: NDArray) -> NDArray:
        """[h, w] of [H, W], any dtype: the pixels that are shown at all."""
        rows, columns = self.rows.source, self.columns.source
        part = annotation[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        if part.shape[0] > len(rows):
            part = part[rows - rows[0]]
        if part.shape[1] > len(columns):
            part = part[:, columns - columns[0]]
        return part

    def patches(self, mask_hw: NDArray[np.bool_]) -> Patches | None:
        """A mask as the model reads it, or None if no pixel of it is seen."""
        ys = np.flatnonzero(mask_hw.any(axis=1))
        if ys.size == 0:
            return None
        y0, y1 = int(ys[0]), int(ys[-1])
        xs = np.flatnonzero(mask_hw[y0 : y1 + 1].any(axis=0))
        x0, x1 = int(xs[0]), int(xs[-1])
        inside_hw = mask_hw[y0 : y1 + 1, x0 : x1 + 1].astype(np.float32)
        pixels_Gw = np.zeros((self.grid, inside_hw.shape[1]), dtype=np.float32)
        for band in self.rows.bands:
            if part := band.within(y0, y1):
                pixels_Gw[band.patches] = part[1] @ inside_hw[part[0]]
        pixels_GG = np.zeros((self.grid, self.grid), dtype=np.float32)
        for band in self.columns.bands:
            if part := band.within(x0, x1):
                pixels_GG[:, band.patches] = pixels_Gw[:, part[0]] @ part[1].T
        (left, right), (top, bottom) = self.columns.span(x0, x1), self.rows.span(y0, y1)
        shares_GG = self._first_pixels(mask_hw) if self.nearest else pixels_GG / self.patch_size_px**2
        return Patches(shares_GG.astype(np.float16), (left, top, right, bottom), int(pixels_GG.sum()))

    def _first_pixels(self, mask_hw: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """bool[G, G], the upper left pixel of every patch: the nearest neighbour from S to G (released rule)."""
        rows, columns = (axis.position[:: self.patch_size_px] for axis in (self.rows, self.columns))
        first_GG = np.zeros((self.grid, self.grid), dtype=bool)
        first_GG[: len(rows), : len(columns)] = mask_hw[np.ix_(rows, columns)]
        return first_GG


class Masks:
    """A record's masks under a placement. They are decoded once, whatever the number of placements that are tried."""

    def __init__(self, record: Record) -> None:
        """Decodes the segment map, where there is one.

        Raises:
            ValueError: it is broken.
        """
        self._record = record
        self._map = record.segment_map()
        self._runs: dict[int, NDArray[np.int64]] = {}

    def place(self, placement: Placement, patch_size_px: int, nearest: bool = False) -> None:
        """Lays all masks on the input; `nearest` reads of every patch its first pixel only."""
        self._axes = Axes(placement, patch_size_px, nearest)
        if self._map is not None:
            self._seen_hw = self._axes.seen(self._map)

    def patches(self, index: int) -> Patches | None:
        """A segment as the model reads it, or None if no pixel of it is seen.

        Raises:
            ValueError: its RLE is broken.
        """
        if self._map is not None:
            return self._axes.patches(self._seen_hw == index + 1)
        if index not in self._runs:
            self._runs[index] = self._record.runs(index)
        mask = fill(self._runs[index], self._record.height_px, self._record.width_px)
        return self._axes.patches(self._axes.seen(mask))
