"""One record to one MaskSample: choose segments, place them, ask a question.

In training the geometry and the segments are drawn; in evaluation all segments that count are taken, the image whole.
Whatever is random comes from the generator that is passed in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from osm_lightning.batch import FREE_TEXT, MaskSample
from osm_lightning.data import geometry
from osm_lightning.data.coverage import Masks, Patches
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


PREDICTED = Labels("predicted")
"""Those of masks that are to be named: none."""


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
    mask_rule: geometry.MaskRule = "touched"
    """How masks lie on the grid of patches."""

    @property
    def grid_side(self) -> int:
        """Patches on each side of the input (G)."""
        return self.image_size_px // self.patch_size_px

    def centre(self, record: Record, index: int, placement: geometry.Placement) -> Patches:
        """What stands for a mask of which nothing is left: the one pixel at the centre of its box."""
        left, top, width, height = record.segments[index].bbox_xywh_px
        x = int((left + width / 2) * placement.width_px / record.width_px)
        y = int((top + height / 2) * placement.height_px / record.height_px)
        share = np.zeros((self.grid_side, self.grid_side), dtype=np.float16)
        share[y // self.patch_size_px, x // self.patch_size_px] = 1 / self.patch_size_px**2
        return Patches(share, (x, y, x, y), 1)


def draw_sample(
    record: Record, labels: Labels, view: View, codec: TextCodec, num_masks: int, rng: np.random.Generator
) -> MaskSample | None:
    """Draws a training sample: a placement, up to `num_masks` of the masks that survive it, a question for each.

    Masks are looked at in random order until there are enough: all that survive have the same chance, and the others of
    the image cost nothing.

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
    masks = Masks(record)
    for _ in range(view.max_tries if usable else 0):
        placement = geometry.draw(record.width_px, record.height_px, view.image_size_px, view.scale, rng)
        masks.place(placement, view.patch_size_px, view.mask_rule == "nearest")
        seen: dict[int, Patches] = {}
        vanished = 0
        for index in rng.permutation(usable).tolist():
            found = masks.patches(index)
            if found is not None and found.area_px > view.min_mask_px:
                seen[index] = found
            else:
                vanished += 1
            if len(seen) == num_masks:
                break
        if seen:
            asked = [MASK_QUESTIONS[q] for q in rng.integers(len(MASK_QUESTIONS), size=len(seen))]
            image = geometry.place_quickly(*record.pixels(placement.reduction), placement)
            return _assemble(record, labels, view, codec, image, seen, asked).with_vanished(vanished)
    return None


def whole_sample(
    record: Record, labels: Labels, view: View, codec: TextCodec, keep_vanished: bool = False
) -> MaskSample:
    """An image whole, and all of its segments that count; see `whole_masks`."""
    return whole_masks(record, whole_image(record.image(), view), labels, view, codec, keep_vanished)


def whole_image(image: Image.Image, view: View) -> NDArray[np.uint8]:
    """uint8[S, S, 3], an RGB image as evaluation and prediction see it: whole."""
    return geometry.place_image(image, geometry.fit(*image.size, view.image_size_px))


def whole_masks(
    record: Record,
    image_SS3: NDArray[np.uint8],
    labels: Labels,
    view: View,
    codec: TextCodec,
    keep_vanished: bool = False,
) -> MaskSample:
    """Takes all segments that count, with the question of the protocol.

    Args:
        record: the image's size and its segments; its bytes are not read.
        image_SS3: what `whole_image` made of the image.
        labels: what names mean.
        view: how records are turned into what the model sees.
        codec: tokenizers.
        keep_vanished: name a mask even where scaling left no pixel of it, by the patch at its centre. The protocol
            does not count such masks; prediction names every mask that it was given.

    Raises:
        ValueError: the record is broken, or a class is not in the vocabulary.
    """
    masks = Masks(record)
    placement = geometry.fit(record.width_px, record.height_px, view.image_size_px)
    masks.place(placement, view.patch_size_px, view.mask_rule == "nearest")
    counted = [i for i, segment in enumerate(record.segments) if labels.counts(segment)]
    seen = {i: masks.patches(i) for i in counted}
    if keep_vanished:
        seen = {i: found or view.centre(record, i, placement) for i, found in seen.items()}
    present = {i: found for i, found in seen.items() if found is not None}
    sample = _assemble(record, labels, view, codec, image_SS3, present, [TEST_QUESTION] * len(present))
    return sample.with_vanished(len(counted) - len(present))


def _assemble(
    record: Record,
    labels: Labels,
    view: View,
    codec: TextCodec,
    image_SS3: NDArray[np.uint8],
    seen: Mapping[int, Patches],
    questions: Sequence[str],
) -> MaskSample:
    segments = [record.segments[index] for index in seen]
    names = [labels.name(segment, record.key) for segment in segments]
    texts = [codec.encode(question, name) for question, name in zip(questions, names, strict=True)]
    shares = [mask.coverage_GG for mask in seen.values()]
    boxes = [geometry.context_box(mask.box, view.image_size_px, view.context) for mask in seen.values()]
    grid = (view.grid_side, view.grid_side)
    return MaskSample(
        key=record.key,
        dataset=labels.dataset,
        image_3SS=torch.from_numpy(image_SS3).permute(2, 0, 1),
        coverage_KGG=torch.from_numpy(np.array(shares, dtype=np.float16).reshape(-1, *grid)),
        context_box_px_K4=torch.tensor(boxes, dtype=torch.int32).reshape(-1, 4),
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
