"""The masks of one image, as some layout stores them: three ways to hold pixels, one way to read them.

Every reader checks what it reads against the size of the upright image and refuses masks without a pixel. Messages do
not name the image: whoever holds it adds that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from osm_lightning.record import Segment, box_of
from osm_lightning.rle import area_and_box, encode_rle, to_rle

MAX_SEGMENTS = 2**16 - 1
"""What a 16-bit segment map can tell apart, 0 being no segment."""

Masks = tuple[tuple[Segment, ...], NDArray[np.uint16] | None]
"""Segments, and either their map (uint16[H, W], positions from 1) or None where they carry RLE."""


class ImageMasks(Protocol):
    """The masks of one image, still on disk or still encoded."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold their pixels."""

    def read(self, height_px: int, width_px: int) -> Masks:
        """Reads and checks all masks.

        Args:
            height_px: height of the upright image.
            width_px: width of the upright image.

        Raises:
            ValueError: a mask is broken, empty, or of another size than the image.
        """


@dataclass(frozen=True, slots=True)
class AnnotatedMasks:
    """Masks from a JSON file: polygons or RLE."""

    path: Path
    segmentations: tuple[tuple[str, object], ...]
    """Id and COCO segmentation of each mask."""
    size_px: tuple[int, int] | None = None
    """Height and width that the file's table of images states."""

    @property
    def files(self) -> tuple[Path, ...]:
        """See ImageMasks."""
        return (self.path,)

    def read(self, height_px: int, width_px: int) -> Masks:
        """See ImageMasks."""
        if self.size_px not in (None, (height_px, width_px)):
            stated_height_px, stated_width_px = self.size_px
            raise ValueError(
                f"{self.path} states {stated_width_px} x {stated_height_px} px for it, so that its masks do not fit: "
                f"it is {width_px} x {height_px} px (upright, as its EXIF orientation says). "
                "Segment the very image that is to be named."
            )
        segments = []
        for mask_id, segmentation in self.segmentations:
            where = f"mask {mask_id} of {self.path}"
            try:
                counts = to_rle(segmentation, height_px, width_px)
            except ValueError as error:
                raise ValueError(f"{where} {error}.") from error
            segments.append(segment_of_rle(mask_id, counts, height_px, where))
        return tuple(segments), None


@dataclass(frozen=True, slots=True)
class PanopticMasks:
    """Masks of a COCO panoptic PNG, whose pixels are ids: red + 256 green + 65536 blue."""

    png: Path
    ids: tuple[int, ...]
    """Segment ids, in the order of the JSON."""

    @property
    def files(self) -> tuple[Path, ...]:
        """See ImageMasks."""
        return (self.png,)

    def read(self, height_px: int, width_px: int) -> Masks:
        """See ImageMasks. Pixels of id 0 belong to no segment, unless the JSON lists one of that id."""
        mode, pixels = _read_png(self.png, height_px, width_px)
        if mode not in {"RGB", "RGBA"}:
            raise ValueError(f"{self.png} is a PNG of mode {mode}, but panoptic ids need RGB. Was it re-coloured?")
        ids_HW = pixels[..., :3].astype(np.int32) @ np.array([1, 256, 65536], dtype=np.int32)
        present, index_HW = np.unique(ids_HW, return_inverse=True)
        position = {segment_id: place for place, segment_id in enumerate(self.ids, start=1)}
        unlisted = set(present.tolist()) - set(self.ids) - {0}
        if unlisted:
            raise ValueError(
                f"{self.png} holds segment {min(unlisted)} ({len(unlisted)} such), which its JSON does not list. "
                "Are the PNG files of another run?"
            )
        to_position = np.array([position.get(int(i), 0) for i in present], dtype=np.uint16)
        segment_map = to_position[index_HW].reshape(height_px, width_px)
        areas_px = np.bincount(segment_map.ravel(), minlength=len(self.ids) + 1).tolist()
        segments = []
        for segment_id, place in position.items():
            _refuse_empty(f"mask {segment_id} of {self.png}", areas_px[place])
            box = box_of(segment_map == place)
            segments.append(Segment(id=str(segment_id), area_px=areas_px[place], bbox_xywh_px=box))
        return tuple(segments), segment_map


@dataclass(frozen=True, slots=True)
class BinaryMasks:
    """One PNG file per mask."""

    pngs: tuple[Path, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """See ImageMasks."""
        return self.pngs

    def read(self, height_px: int, width_px: int) -> Masks:
        """See ImageMasks."""
        segments = []
        for path in self.pngs:
            mask = _foreground(*_read_png(path, height_px, width_px))
            segments.append(segment_of_rle(path.stem, encode_rle(mask), height_px, f"mask {path}"))
        return tuple(segments), None


def segment_of_rle(mask_id: str, counts: str, height_px: int, where: str) -> Segment:
    """One mask's facts, of compressed counts that are known to fill the image.

    Args:
        mask_id: its id within the image.
        counts: compressed COCO RLE.
        height_px: height of the image.
        where: what a message calls it.

    Raises:
        ValueError: the mask is empty.
    """
    area_px, box = area_and_box(counts, height_px)
    _refuse_empty(where, area_px)
    return Segment(id=mask_id, area_px=area_px, bbox_xywh_px=box, rle=counts)


def _foreground(mode: str, pixels: NDArray[Any]) -> NDArray[np.bool_]:
    """bool[H, W]: not zero. A cut-out (some pixel fully transparent) is the mask of what is visible, black or not."""
    if mode in {"LA", "RGBA"}:
        alpha_HW = pixels[..., -1]
        pixels = alpha_HW if alpha_HW.min() == 0 else pixels[..., :-1]
    nonzero = pixels.astype(np.bool_)
    return nonzero if nonzero.ndim == 2 else np.logical_or.reduce(nonzero, axis=-1)


def _read_png(path: Path, height_px: int, width_px: int) -> tuple[str, NDArray[Any]]:
    """Mode and pixels, [H, W] or [H, W, channels], of a PNG of the image's size; a palette's pixels are its indices.

    Raises:
        ValueError: it is no PNG, broken, or of another size.
    """
    try:
        with Image.open(path, formats=("PNG",)) as png:
            size_px = png.size
            if size_px == (width_px, height_px):
                return png.mode, np.asarray(png)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be decoded as a PNG ({error}). Write it again.") from error
    raise ValueError(
        f"{path} is {size_px[0]} x {size_px[1]} px, but the image is {width_px} x {height_px} px (upright, as its EXIF "
        "orientation says). Segment the very image that is to be named."
    )


def _refuse_empty(where: str, area_px: int) -> None:
    if area_px == 0:
        raise ValueError(f"{where} is empty; a mask without pixels cannot be named. Remove it.")
