"""Masks as polygons without holes, the only form in which LVIS gives them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


def polygons_of(mask: NDArray[np.bool_]) -> list[list[float]]:
    """Polygons (x0, y0, x1, y1, ...) along the edges of pixels that together cover exactly bool[H, W].

    Each is the outline of a piece whose pixels are joined by their sides. A piece with a hole is cut in two there.
    """
    polygons = []
    pending = [(mask, 0, 0)]
    while pending:
        part, part_x, part_y = pending.pop()
        labels, _ = ndimage.label(part)
        for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
            piece, x, y = labels[rows, columns] == number, part_x + columns.start, part_y + rows.start
            hole_columns = np.nonzero(ndimage.binary_fill_holes(piece) & ~piece)[1]
            if hole_columns.size:
                cut = int(np.sort(hole_columns)[hole_columns.size // 2])
                pending += [(piece[:, :cut], x, y), (piece[:, cut:], x + cut, y)]
            else:
                polygons.append(_outline(piece, x, y))
    return polygons


def _outline(piece: NDArray[np.bool_], x: int, y: int) -> list[float]:
    """The one polygon around bool[h, w], a piece in one part and without holes, whose first pixel lies at x, y."""
    pixels = np.pad(piece, 1).astype(int)
    around = pixels[:-1, :-1] + pixels[:-1, 1:] + pixels[1:, :-1] + pixels[1:, 1:]
    # At a corner one or three of the four pixels are set. Two that only touch there would enclose a hole, so that no
    # corner is met twice, and along every grid line corners pair up, each pair an edge.
    corners_yx = np.argwhere(around % 2)
    by_column = np.lexsort((corners_yx[:, 0], corners_yx[:, 1]))
    upright = by_column[np.argsort(by_column) ^ 1]
    polygon: list[float] = []
    corner = 0
    while not polygon or corner != 0:
        for end in (corner, corner ^ 1):
            polygon += [float(x + corners_yx[end, 1]), float(y + corners_yx[end, 0])]
        corner = int(upright[corner ^ 1])
    return polygon
