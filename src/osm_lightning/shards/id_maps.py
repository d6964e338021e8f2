"""Images beside maps of ids: what the readers of label maps, and of most datasets as downloaded, have in common.

A reader lists a split's files and says which ids are segments; here an image and its map are opened, checked against
each other, turned upright and measured. Nothing here knows a dataset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from osm_lightning.picture import BROKEN_IMAGE
from osm_lightning.record import Record, Segment, box_of, encode_segment_map
from osm_lightning.shards.conversion import RawSplit
from osm_lightning.shards.source import Findings, as_upright, read_header

_NUM_IDS = 2**16

PngKind = Literal["8-bit grey", "16-bit grey", "8-bit RGB"]
_KIND_OF_MODE = {
    "L": "8-bit grey",
    "P": "8-bit with a palette",
    "RGB": "8-bit RGB",
    "RGBA": "8-bit RGB with transparency",
    "I;16": "16-bit grey",
    "I": "16-bit grey",  # as Pillow 11 opens it
}


@dataclass(frozen=True, slots=True)
class IdMap:
    """What an image's annotation says, turned as it is stored."""

    ids: NDArray[np.uint16]
    """uint16[H, W], id of each pixel."""
    segments: Mapping[int, Segment]
    """From id to segment, in the order in which they are kept. Other ids are no segment; areas and boxes are measured
    later, and segments without pixels are left out."""


@dataclass(frozen=True, slots=True)
class MappedImage:
    """One image, and how its map is read; a `RawImage`."""

    image_path: Path
    map_paths: tuple[Path, ...]
    """Files that make the map."""
    read_map: Callable[..., IdMap]
    """Reads `map_paths`, one argument each. Raises OSError or ValueError where they can't be used. Picklable."""
    sample_key: str | None = None
    """Key of its sample, where the name of the image will not do."""
    file_name: str | None = None
    """What the record calls the image, where its name does not say where it lay."""

    @property
    def key(self) -> str:
        """Key of its sample."""
        return self.image_path.stem if self.sample_key is None else self.sample_key

    def convert(self, errors: Findings, notes: Findings) -> Record | None:
        """Makes the record; None and an error if the files can't be read or don't fit together."""
        try:
            image_bytes = self.image_path.read_bytes()
            header = read_header(self.image_path)
        except (OSError, ValueError) as error:
            errors.add("pictures that can't be read", str(error))
            return None
        try:
            id_map = self.read_map(*self.map_paths)
        except (OSError, ValueError) as error:
            errors.add("annotations that can't be used", str(error))
            return None
        upright = as_upright(Image.fromarray(id_map.ids), header, self.image_path.name, notes)
        if upright.size != header.size_px:
            sizes = f"{upright.width} x {upright.height} px, not {header.size_px[0]} x {header.size_px[1]}"
            errors.add("annotations of another size than their image", f"{self.map_paths[0].name}: {sizes}")
            return None
        segment_map, segments = _measure(np.asarray(upright), id_map.segments)
        for segment in segments:
            if segment.iscrowd:
                notes.add("crowd segments, kept but not counted as masks", f"{segment.id} in {self.image_path.name}")
        return Record(
            key=self.key,
            image_bytes=image_bytes,
            image_ending=header.ending,
            height_px=upright.height,
            width_px=upright.width,
            segments=segments,
            segment_map_png=encode_segment_map(segment_map),
            source={"file_name": self.file_name or self.image_path.name},
        )


def raw_split(source: Path, images: Iterable[MappedImage], notes: Findings | None = None) -> RawSplit:
    """The split of these images; those that lack a file are among its errors.

    Args:
        source: table or folder that they come from.
        images: in the order of their records.
        notes: what was noted before.

    Raises:
        ValueError: there are none, or two have one name.
    """
    usable: dict[str, MappedImage] = {}
    unusable, twice, num_unusable = Findings(), Findings(), 0
    for image in images:
        if image.key in usable:
            twice.add("images that stand twice", f"{usable[image.key].image_path}, {image.image_path}")
        missing = [path for path in (image.image_path, *image.map_paths) if not path.is_file()]
        for path in missing:
            unusable.add("missing files", str(path))
        num_unusable += bool(missing)
        if not missing:
            usable[image.key] = image
    twice.raise_if_any(source)
    if not usable and not num_unusable:
        raise ValueError(
            f"{source} holds no images of the split. Check --src and --split, or unpack the archives there."
        )
    return RawSplit(source, tuple(usable.values()), notes or Findings(), unusable, num_unusable)


def existing_folders(src: Path, archives: Mapping[str, str]) -> list[Path]:
    """Folders below a dataset's own.

    Args:
        src: the dataset's folder.
        archives: from a folder's relative path to the archive that holds it.

    Raises:
        ValueError: some are not there.
    """
    missing = [f"{path} ({archive})" for path, archive in archives.items() if not (src / path).is_dir()]
    if missing:
        raise ValueError(
            f"--src {src} lacks {' and '.join(missing)}. Check --src and --split, or unpack the archives there."
        )
    return [src / path for path in archives]


def read_png(path: Path, kind: PngKind) -> NDArray[np.uint16]:
    """Decodes a PNG whose pixels are ids.

    Returns:
        uint16[H, W], or uint16[H, W, 3] of RGB, which is wide enough to reckon with.

    Raises:
        ValueError: it is broken, too large, or of another kind. Tools that write maps anew often change their kind, and
            their ids with it.
    """
    read_header(path)  # refuses a decompression bomb before its pixels are decoded
    try:
        with Image.open(path, formats=("PNG",)) as png:
            found, pixels = _KIND_OF_MODE.get(png.mode, f"of mode {png.mode}"), np.asarray(png)
    except BROKEN_IMAGE as error:
        raise ValueError(f"{path}: {error}") from error
    if found != kind:
        raise ValueError(
            f"{path} is a PNG {found}, but the dataset's maps are {kind}. Some tool wrote it anew, or it is another "
            "file under this name: unpack the original"
        )
    return pixels.astype(np.uint16)


def ids_in(ids: NDArray[np.uint16]) -> list[int]:
    """The ids that occur in uint16[...], ascending. Counting beats sorting on whole maps."""
    present: list[int] = np.flatnonzero(np.bincount(ids.ravel())).tolist()
    return present


def _measure(
    ids: NDArray[np.uint16], segments: Mapping[int, Segment]
) -> tuple[NDArray[np.uint16], tuple[Segment, ...]]:
    """Numbers the segments that have pixels, in their order, and measures them.

    Returns:
        uint16[H, W], number of each pixel's segment from 1, 0 for none; the segments with areas and boxes.
    """
    areas_px = np.bincount(ids.ravel(), minlength=_NUM_IDS)
    kept = [segment_id for segment_id in segments if areas_px[segment_id] > 0]
    number_of_id = np.zeros(_NUM_IDS, np.uint16)
    number_of_id[kept] = np.arange(1, len(kept) + 1)
    segment_map = number_of_id[ids]
    measured = tuple(
        replace(segments[old], area_px=int(areas_px[old]), bbox_xywh_px=box_of(segment_map == new))
        for new, old in enumerate(kept, start=1)
    )
    return segment_map, measured
