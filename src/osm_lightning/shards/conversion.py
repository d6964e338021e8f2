"""What every converter gives: the images of one split, in order, each able to become a record by itself.

A converter reads a dataset's tables and checks them, but opens no picture; pictures are opened image by image, in any
process, by `RawImage.convert`. That split is what makes a build parallel, resumable and still deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from osm_lightning.record import Record
from osm_lightning.shards.source import Findings


class RawImage(Protocol):
    """One image of a raw dataset and what its tables say of it. Small, and picklable: workers receive it."""

    @property
    def key(self) -> str:
        """Key of its sample: unique in the split, letters, digits, `_` and `-`."""

    def convert(self, errors: Findings, notes: Findings) -> Record | None:
        """Opens the image's files and makes its record.

        Args:
            errors: takes what makes the image unusable: files that can't be read, or don't fit each other.
            notes: takes what was left out or corrected.

        Returns:
            The record, or None after an error, or where nothing of the image is to be kept (with a note).
        """


@dataclass(frozen=True)
class RawSplit:
    """One split of a raw dataset, checked as far as its tables and file names go."""

    source: Path
    """Table or folder that the split was read from; errors name it."""
    images: Sequence[RawImage]
    """In the order in which they will be written."""
    notes: Findings = field(default_factory=Findings)
    """What was left out or corrected while the tables were read."""
    errors: Findings = field(default_factory=Findings)
    """What makes single images unusable as far as tables and file names tell, such as a missing file."""
    num_unusable: int = 0
    """Images that `errors` speaks of. They are not among `images`, but a build counts them as skipped."""

    def __len__(self) -> int:
        return len(self.images)

    def records(self) -> Iterator[Record]:
        """Converts image by image, in this process, and takes no error for small.

        Raises:
            ValueError: some images are unusable. Those that only their pictures betray are named at the end.
        """
        self.errors.raise_if_any(self.source)
        errors = Findings()
        for image in self.images:
            record = convert_fully(image, errors, self.notes)
            if record is not None:
                yield record
        errors.raise_if_any(self.source)


def convert_fully(image: RawImage, errors: Findings, notes: Findings) -> Record | None:
    """Makes an image's record and decodes its picture once: one that was cut off has a header like any other.

    Args:
        image: what to convert.
        errors: takes what makes the image unusable.
        notes: takes what was left out or corrected.

    Returns:
        The record, or None where there is none to be written.
    """
    record = image.convert(errors, notes)
    if record is None:
        return None
    assert record.key == image.key, f"{image.key} became {record.key}"
    if not record.segments:
        notes.add("images without any segment, left out", record.key)
        return None
    try:
        record.image()
    except ValueError as error:
        errors.add("pictures that can't be decoded", str(error))
        return None
    return record
