"""One record to one MaskSample: choose segments, place them, ask a question.

In training the geometry and the segments are drawn; in evaluation all segments that count are taken, the image whole.
Whatever is random comes from the generator that is passed in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from osm_lightning.batch import FREE_TEXT, MaskSample
from osm_lightning.data import geometry
from osm_lightning.data.text import TextCodec
from osm_lightning.instructions import MASK_QUESTIONS, TEST_QUESTION
from osm_lightning.record import Record, Segment
from osm_lightning.vocabulary import Vocabulary


@dataclass(frozen=True)
class Labels:
    """What the names of a data source mean."""

    dataset: str
    """Name of the data source."""
    vocabulary: Vocabulary | None = None
    """Its classes; None where names are free text."""
    ignored_ids: tuple[int, ...] = ()
    """Classes that are no class."""

    def counts(self, segment: Segment) -> bool:
        """Whether a segment is trained on and counted: no crowd region, no ignored class."""
        return not segment.iscrowd and segment.class_id not in self.ignored_ids

    def name(self, segment: Segment, key: str) -> str | None:
        """The name to train on: the class's first, or the segment's free text; None where there is none.

        Raises:
            ValueError: the class is not in the vocabulary.
        """
        if segment.class_id is None or self.vocabulary is None:
            return segment.name if segment.name and segment.name.strip() else None
        if segment.class_id not in self.vocabulary:
            raise ValueError(
                f"sample {key}, segment {segment.id}: class {segment.class_id} is not in the "
                f"vocabulary {self.vocabulary.key!r} ({len(self.vocabulary)} classes). Is that another dataset's? Set "
                f"data.sources.{self.dataset}.vocabulary."
            )
        return self.vocabulary.by_id[segment.class_id].names[0]


@dataclass(frozen=True)
class View:
    """How records are turned into what the model sees."""

    image_size_px: int
    """Side of the input (S)."""
    patch_size_px: int
    """Side of a patch."""
    context: geometry.Context
    """Context ratio."""
    scale: tuple[float, float] = (0.5, 1.5)
    """Range of the long side in training, as a share of S."""
    min_mask_px: int = 100
    """Masks of no more pixels than this after the crop are skipped in training (released rule)."""
    max_tries: int = 500
    """Crops that are tried before an image without a usable mask is given up (released rule)."""


def draw_sample(
    record: Record, labels: Labels, view: View, codec: TextCodec, num_masks: int, rng: np.random.Generator
) -> MaskSample | None:
    """Draws a training sample: a placement, up to `num_masks` of the masks that survive it, a question for each.

    Returns:
        The sample, or None where no crop leaves a usable mask.

    Raises:
        ValueError: the record is broken, or a class is not in the vocabulary.
    """
    usable = [
        i
        for i, segment in enumerate(record.segments)
        if labels.counts(segment) and labels.name(segment, record.key) is not None
    ]
    pixels = _Pixels(record)
    for _ in range(view.max_tries if usable else 0):
        placement = geometry.draw(record.width_px, record.height_px, view.image_size_px, view.scale, rng)
        pixels.place(placement)
        surviving = [i for i in usable if pixels.area(i) > view.min_mask_px]
        if surviving:
            chosen = rng.permutation(surviving)[:num_masks].tolist()
            questions = rng.integers(len(MASK_QUESTIONS), size=len(chosen))
            asked = [MASK_QUESTIONS[q] for q in questions]
            sample = _assemble(record, labels, view, codec, pixels, chosen, asked)
            return sample.with_vanished(len(usable) - len(surviving))
    return None


def whole_sample(
    record: Record, labels: Labels, view: View, codec: TextCodec, keep_vanished: bool = False
) -> MaskSample:
    """Takes all segments that count, with the image whole and the question of the protocol.

    Args:
        record: the image and its segments.
        labels: what names mean.
        view: how records are turned into what the model sees.
        codec: tokenizers.
        keep_vanished: name a mask even where scaling left no pixel of it, by the patch at its centre. The protocol
            does not count such masks; prediction names every mask that it was given.

    Raises:
        ValueError: the record is broken, or a class is not in the vocabulary.
    """
    pixels = _Pixels(record)
    pixels.place(geometry.fit(record.width_px, record.height_px, view.image_size_px))
    counted = [i for i, segment in enumerate(record.segments) if labels.counts(segment)]
    present = [i for i in counted if keep_vanished or pixels.area(i) > 0]
    sample = _assemble(record, labels, view, codec, pixels, present, [TEST_QUESTION] * len(present))
    return sample.with_vanished(len(counted) - len(present))


class _Pixels:
    """A record's masks under a placement, decoded once and placed as often as crops are tried."""

    placement: geometry.Placement

    def __init__(self, record: Record) -> None:
        self.record = record
        self._map = record.segment_map()
        self._masks: dict[int, NDArray[np.bool_]] = {}

    def place(self, placement: geometry.Placement) -> None:
        """Lays all masks on the input."""
        self.placement = placement
        if self._map is not None:
            self._placed = geometry.place_map(self._map, placement)
            self._areas = geometry.areas(self._placed, len(self.record.segments))

    def area(self, index: int) -> int:
        """Pixels of a segment on the input."""
        return int(np.count_nonzero(self.mask(index))) if self._map is None else int(self._areas[index])

    def mask(self, index: int) -> NDArray[np.bool_]:
        """bool[S, S], a segment's pixels on the input."""
        if self._map is not None:
            return self._placed == index + 1
        if index not in self._masks:
            self._masks[index] = self.record.mask(index)
        return geometry.place_map(self._masks[index], self.placement)

    def mask_or_centre(self, index: int) -> NDArray[np.bool_]:
        """The same; where nothing is left, the one pixel at the centre of the segment's box."""
        mask = self.mask(index)
        if not mask.any():
            x, y, width, height = self.record.segments[index].bbox_xywh_px
            across = self.placement.width_px / self.record.width_px
            down = self.placement.height_px / self.record.height_px
            mask[int((y + height / 2) * down), int((x + width / 2) * across)] = True
        return mask


def _assemble(
    record: Record,
    labels: Labels,
    view: View,
    codec: TextCodec,
    pixels: _Pixels,
    chosen: Sequence[int],
    questions: Sequence[str],
) -> MaskSample:
    side = view.image_size_px // view.patch_size_px
    shares = np.empty((len(chosen), side, side), dtype=np.float16)
    boxes = np.empty((len(chosen), 4), dtype=np.int32)
    for row, index in enumerate(chosen):
        mask = pixels.mask_or_centre(index)
        shares[row] = geometry.coverage(mask, view.patch_size_px)
        boxes[row] = geometry.context_box(geometry.tight_box(mask), view.image_size_px, view.context)
    segments = [record.segments[index] for index in chosen]
    names = [labels.name(segment, record.key) for segment in segments]
    texts = [codec.encode(question, name) for question, name in zip(questions, names, strict=True)]
    return MaskSample(
        key=record.key,
        dataset=labels.dataset,
        image_3SS=torch.from_numpy(geometry.place_image(record.image(), pixels.placement)),
        coverage_KGG=torch.from_numpy(shares),
        context_box_px_K4=torch.from_numpy(boxes),
        mask_ids=tuple(segment.id for segment in segments),
        class_ids=tuple(FREE_TEXT if segment.class_id is None else segment.class_id for segment in segments),
        text_ids=tuple(text.text_ids for text in texts),
        prompt_tokens=tuple(text.prompt_tokens for text in texts),
        instruction_ids=tuple(text.instruction_ids for text in texts),
    )


def generator(*parts: int | str) -> np.random.Generator:
    """A generator derived from numbers and names, so that any sample can be drawn again."""
    return np.random.default_rng(list(_words(parts)))


def _words(parts: Sequence[int | str]) -> Iterator[int]:
    for part in parts:
        if isinstance(part, int):
            yield part
        else:
            # The length keeps ("a", "bc") and ("ab", "c") apart.
            data = part.encode()
            yield len(data)
            yield int.from_bytes(data, "little") if data else 0
