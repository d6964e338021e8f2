"""Images and their masks, joined into records that are read when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from osm_lightning.evaluation.segments.layouts import find_masks
from osm_lightning.evaluation.segments.stored import ImageMasks, Masks
from osm_lightning.picture import decode_image
from osm_lightning.record import Record, encode_segment_map

IMAGE_ENDINGS = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
"""From a file's ending, in lower case, to a record's."""


@dataclass(frozen=True, slots=True)
class SegmentSource:
    """Records of the images that have masks, sorted by key; class ids and names are always None."""

    entries: tuple[tuple[Path, ImageMasks], ...]
    num_images_without_masks: int
    masks: Path
    """Where all masks were looked for: a JSON file or a folder."""

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Record:
        """Reads one image and its masks; the key is the image's file name without its ending.

        Raises:
            ValueError: the image or a mask is broken, a mask is empty or of another size than the image.
        """
        path, _ = self.entries[index]
        data, (height_px, width_px), (segments, segment_map) = self._read(index)
        return Record(
            key=path.stem,
            image_bytes=data,
            image_ending=IMAGE_ENDINGS[path.suffix.lower()],
            height_px=height_px,
            width_px=width_px,
            segments=segments,
            segment_map_png=None if segment_map is None else encode_segment_map(segment_map),
            source={"file_name": path.name},
        )

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the records, in their order."""
        return tuple(path.stem for path, _ in self.entries)

    def problems(self, indices: Iterable[int]) -> list[str]:
        """Reads images and their masks, so that bad input is known before hours are spent on the good.

        Returns:
            What is wrong with those that cannot be used, one message each.
        """
        found = []
        for index in indices:
            try:
                self._read(index)
            except ValueError as error:
                found.append(str(error))
        return found

    def refuse(self, problems: Sequence[str]) -> None:
        """Raises if there are problems.

        Raises:
            ValueError: says how many images cannot be used and why, for up to five.
        """
        if problems:
            shown = "\n".join(problems[:5])
            raise ValueError(f"{len(problems)} of {len(self)} images and their masks cannot be used:\n{shown}")

    def fingerprint(self) -> str:
        """Changes with the name, size or time of any file that images or masks are read from. Opens none of them.

        Raises:
            OSError: one is gone.
        """
        digest = hashlib.sha256()
        tables = [self.masks] if self.masks.is_file() else []
        for path in chain(tables, *((path, *masks.files) for path, masks in self.entries)):
            facts = path.stat()
            digest.update(f"{path.name!a} {facts.st_size} {facts.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]

    def _read(self, index: int) -> tuple[bytes, tuple[int, int], Masks]:
        path, masks = self.entries[index]
        try:
            data = path.read_bytes()
            width_px, height_px = decode_image(data, path.name).size
            return data, (height_px, width_px), masks.read(height_px, width_px)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path.name}: {error}") from error


def read_segments(images: Path, masks: Path) -> SegmentSource:
    """Joins images with masks in any known layout; reads JSON and file names, no pixels.

    Images without masks are left out and counted, masks without an image are ignored.

    Args:
        images: an image (JPEG, PNG, WebP) or a folder of them, not searched recursively.
        masks: one of the layouts in `layouts.KNOWN_LAYOUTS`.

    Raises:
        ValueError: a path does not exist, there is no image, two images have the same stem, the masks are of no known
            layout or broken, or no image has a mask.
    """
    by_stem = _find_images(images)
    found = find_masks(masks, list(by_stem))
    return SegmentSource(
        entries=tuple((by_stem[stem], found[stem]) for stem in sorted(found)),
        num_images_without_masks=len(by_stem) - len(found),
        masks=masks,
    )


def _find_images(images: Path) -> dict[str, Path]:
    endings = ", ".join(IMAGE_ENDINGS)
    if images.is_dir():
        inside = sorted(path for path in images.iterdir() if not path.name.startswith("."))
        paths = [path for path in inside if path.suffix.lower() in IMAGE_ENDINGS and path.is_file()]
        if not paths:
            raise ValueError(f"images: the folder {images} holds no image ({endings}). Folders in it are not searched.")
    elif images.is_file() and images.suffix.lower() in IMAGE_ENDINGS:
        paths = [images]
    elif images.is_file():
        raise ValueError(f"images: {images} is no image by its ending. Give an image ({endings}) or a folder of them.")
    else:
        raise ValueError(f"images: there is no file or folder {images}. Give an image ({endings}) or a folder of them.")
    by_stem: dict[str, Path] = {}
    for path in paths:
        other = by_stem.setdefault(path.stem, path)
        if other is not path:
            raise ValueError(f"images: {other} and {path.name} have the same stem, which is their key. Rename one.")
    return by_stem
