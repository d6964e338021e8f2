"""What every converter needs to read a raw dataset folder that it doesn't trust: paths, image headers, findings.

A converter doesn't stop at the first problem. It gathers them by kind and shows a few of each, so that a broken
download is mended once and not file by file.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self

from PIL import Image

from osm_lightning.picture import MAX_IMAGE_PIXELS

MAX_EXAMPLES = 5
_ENDING_OF_FORMAT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_EXIF_ORIENTATION = 0x0112

# What makes stored pixels upright, for the orientations that swap width and height (Exif 2.32, tag 0x0112).
_TURNS = {
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FLIPS = (2, 3, 4)
"""Orientations that are not upright either, but keep width and height."""


@dataclass(slots=True)
class Findings:
    """Things met in a source, counted by kind, with the first examples of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, example: str) -> None:
        """Counts one more of a kind."""
        self.counts[kind] += 1
        if len(self.examples[kind]) < MAX_EXAMPLES:
            self.examples[kind].append(example)

    def merge(self, other: Findings) -> None:
        """Counts what others found, after what was found here."""
        for kind, num in other.counts.items():
            self.counts[kind] += num
            free = MAX_EXAMPLES - len(self.examples[kind])
            self.examples[kind] += other.examples[kind][:free]

    def to_json(self) -> dict[str, Any]:
        """Plain content, for `from_json`."""
        return {kind: [num, self.examples[kind]] for kind, num in self.counts.items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Findings that `to_json` gave.

        Raises:
            ValueError, TypeError, AttributeError: they are no findings.
        """
        found = cls()
        for kind, (num, examples) in content.items():
            found.counts[kind] = int(num)
            found.examples[kind] = [str(example) for example in examples]
        return found

    def lines(self) -> list[str]:
        """One line per kind: what, how many, examples."""
        return [
            f"{kind}: {num} ({', '.join(self.examples[kind])}{', ...' if num > MAX_EXAMPLES else ''})"
            for kind, num in self.counts.items()
        ]

    def raise_if_any(self, source: Path) -> None:
        """Raises one ValueError that names everything found."""
        if self.counts:
            raise ValueError(
                f"{source} cannot be converted, and nothing was written:\n  "
                + "\n  ".join(self.lines())
                + "\nMend or download these again, then build once more."
            )


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What an image's header says; its pixels may still be broken."""

    ending: str
    """Ending of its true format, whatever the file is called."""
    stored_size_px: tuple[int, int]
    """Width, height of the pixels as they are stored."""
    orientation: int
    """EXIF orientation, 1 where there is none."""

    @property
    def size_px(self) -> tuple[int, int]:
        """Width, height of the upright image."""
        width, height = self.stored_size_px
        return (width, height) if self.turn is None else (height, width)

    @property
    def turn(self) -> Image.Transpose | None:
        """What makes the stored pixels upright, if that swaps their sides."""
        return _TURNS.get(self.orientation)


def read_header(path: Path) -> ImageHeader:
    """Reads format, size and orientation of an image without decoding its pixels.

    Raises:
        ValueError: it is no JPEG, PNG or WebP, or too large to be decoded later.
    """
    try:
        with Image.open(path, formats=tuple(_ENDING_OF_FORMAT)) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise ValueError(f"{path} is {image.width} x {image.height} px, more than {MAX_IMAGE_PIXELS:,} pixels")
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
            return ImageHeader(_ENDING_OF_FORMAT[str(image.format)], image.size, orientation)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: {error}") from error


def as_upright(annotation: Image.Image, header: ImageHeader, name: str, notes: Findings) -> Image.Image:
    """A picture of annotations as it lies on the upright image; what had to be assumed is noted.

    Whether the annotators saw an image with EXIF orientation upright or as it is stored, only the sizes can tell.

    Args:
        annotation: segment map, of the size of the upright or of the stored image.
        header: the image's.
        name: the image's, for the notes.
        notes: takes a note of what was turned or assumed.
    """
    if header.size_px == header.stored_size_px:
        if header.orientation in _TURNS or header.orientation in _FLIPS:
            notes.add("images whose EXIF orientation keeps their size, taken to be annotated upright", name)
        return annotation
    if annotation.size == header.stored_size_px and header.turn is not None:
        notes.add("segment maps of images annotated as stored, turned upright with them", name)
        return annotation.transpose(header.turn)
    return annotation


def stays_inside(name: str) -> bool:
    """Whether a file name of a foreign JSON stays below the folder that it is meant for."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name
