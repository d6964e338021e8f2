"""What a shard folder holds: images, masks, classes and sizes. It counts; whether all is sound, `verify.py` says.

Numbers of images, masks and classes come from the index and the vocabulary alone, sizes from the samples' JSON. No
pixel is decoded.
"""

# Shape letters: I images, M masks, B bins

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from osm_lightning import record as records
from osm_lightning.record import Record
from osm_lightning.shard_index import ShardIndex, SplitInfo, read_index
from osm_lightning.shard_tar import Entry, read_table
from osm_lightning.vocabulary import Vocabulary, load_vocabulary

SHARE_EDGES_PERCENT = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
AREA_EDGES_PX = (10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000)
MASKS_EDGES = (1, 2, 3, 5, 9, 17, 33, 65)

# The picture, in pixels and colours.
_WIDTH, _HEAD, _PANEL = 1100, 70, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 1070, 60, 270
"""Where a panel's bars are; top and bottom count from the panel's own top."""
_INK, _GREY, _RULE, _BAR = "#1f2933", "#616e7c", "#e4e7eb", "#4c78a8"


@dataclass(frozen=True, slots=True)
class Split:
    """One split of a shard folder, and the vocabulary of its classes."""

    folder: Path
    name: str
    index: ShardIndex
    vocabulary: Vocabulary | None

    @property
    def info(self) -> SplitInfo:
        """What the index says of it."""
        return self.index.splits[self.name]

    @property
    def title(self) -> str:
        """Folder and split, to tell it from others."""
        return f"{self.folder.absolute().name} {self.name}"


@dataclass(frozen=True, slots=True)
class ClassCount:
    """How often a class, or a free-text name, occurs in a split."""

    class_id: int | None
    """None for free text."""
    kind: str
    name: str
    """First name of the class."""
    num_masks: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large a split's masks are and how many an image has; crowd regions and empty segments are not counted."""

    area_px_M: NDArray[np.int64]
    share_M: NDArray[np.float64]
    """Area as a share of the image's, in [0, 1]."""
    masks_I: NDArray[np.int64]
    """Masks of each image."""
    free_text: Counter[str]
    """Masks of each name, for masks that have no class."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts in ranges, with the words that explain them."""

    title: str
    axis: str
    """What is measured, with its unit."""
    counted: str
    """What is counted."""
    summary: str
    ranges: tuple[str, ...]
    counts_B: NDArray[np.int64]


def open_splits(folder: Path, split: str | None) -> list[Split]:
    """The splits of a shard folder, or the one that is asked for; no tar is opened.

    Raises:
        ValueError: the folder has no valid index, no such split, or its vocabulary cannot be read.
    """
    index = read_index(folder)
    if not index.splits or split not in {None, *index.splits}:
        asked = "" if split is None else f" called {split}"
        raise ValueError(f"shard folder {folder} has no split{asked}; it has {', '.join(index.splits) or 'none'}.")
    key = index.vocabulary
    if key is not None and (folder / key).is_file():
        key = str(folder / key)
    vocabulary = None if key is None else load_vocabulary(key)
    return [Split(folder, name, index, vocabulary) for name in index.splits if split in {None, name}]


def count_classes(split: Split, free_text: Counter[str]) -> list[ClassCount]:
    """Masks of every class of the vocabulary and every free-text name, most first; classes never seen have none."""
    masks = split.info.masks_per_class
    classes = () if split.vocabulary is None else split.vocabulary.classes
    known = {c.id for c in classes}
    counts = [ClassCount(c.id, c.kind, c.names[0], masks.get(c.id, 0)) for c in classes]
    counts += [ClassCount(i, "unknown", "not in the vocabulary", n) for i, n in masks.items() if i not in known]
    counts += [ClassCount(None, "free text", name, num_masks) for name, num_masks in free_text.items()]
    return sorted(counts, key=lambda count: (-count.num_masks, count.name))


def measure(split: Split, on_sample: Callable[[], object]) -> Sizes:
    """Reads the JSON of every sample of a split.

    Args:
        split: what to read.
        on_sample: called after each sample.

    Raises:
        ValueError: a shard is missing or broken, or a sample is no record.
    """
    areas_px: list[int] = []
    shares: list[float] = []
    num_masks: list[int] = []
    free_text: Counter[str] = Counter()
    for shard in split.info.shards:
        path = split.folder / shard.file
        table = read_table(path)
        with path.open("rb") as file:
            for entry in table:
                record = _read_facts(file, entry)
                masks = [segment for segment in record.segments if segment.is_mask]
                areas_px += [mask.area_px for mask in masks]
                shares += [mask.area_px / (record.height_px * record.width_px) for mask in masks]
                num_masks.append(len(masks))
                free_text.update(mask.name for mask in masks if mask.class_id is None and mask.name is not None)
                on_sample()
    return Sizes(
        area_px_M=np.array(areas_px, dtype=np.int64),
        share_M=np.array(shares, dtype=np.float64),
        masks_I=np.array(num_masks, dtype=np.int64),
        free_text=free_text,
    )


def _read_facts(file: BinaryIO, entry: Entry) -> Record:
    """A sample's record from its JSON alone: image and segment map are left empty and unread."""
    members = {member.ending: b"" for member in entry.members}
    for member in entry.members:
        if member.ending == "json":
            file.seek(member.offset)
            members["json"] = file.read(member.num_bytes)
    return records.decode(entry.key, members)


def histograms(sizes: Sizes) -> tuple[Histogram, Histogram, Histogram]:
    """Mask sizes as share of the image and in pixels, and masks per image."""
    return (
        Histogram(
            title="Mask size, relative",
            axis="share of the image's area, %",
            counted="masks",
            summary=f"median {_median(sizes.share_M * 100):.2g} %",
            ranges=_ranges(SHARE_EDGES_PERCENT),
            counts_B=_count(sizes.share_M * 100, SHARE_EDGES_PERCENT),
        ),
        Histogram(
            title="Mask size, absolute",
            axis="area, px",
            counted="masks",
            summary=f"median {_median(sizes.area_px_M):,.0f} px",
            ranges=_ranges(AREA_EDGES_PX),
            counts_B=_count(sizes.area_px_M, AREA_EDGES_PX),
        ),
        Histogram(
            title="Masks per image",
            axis="masks in the image",
            counted="images",
            summary=f"median {_median(sizes.masks_I):g}, most {sizes.masks_I.max(initial=0)}",
            ranges=("0", "1", "2", "3-4", "5-8", "9-16", "17-32", "33-64", "65 or more"),
            counts_B=_count(sizes.masks_I, MASKS_EDGES),
        ),
    )


def _count(values: NDArray, edges: Sequence[float]) -> NDArray[np.int64]:
    """int64[len(edges) + 1], values below the first edge, from each edge to below the next, and from the last one."""
    return np.bincount(np.digitize(values, edges), minlength=len(edges) + 1)


def _median(values: NDArray) -> float:
    return float(np.median(values)) if values.size else 0.0


def _ranges(edges: Sequence[float]) -> tuple[str, ...]:
    texts = [f"{edge // 1000}k" if edge >= 1000 else f"{edge:g}" for edge in edges]
    between = [f"{low}-{high}" for low, high in pairwise(texts)]
    return (f"under {texts[0]}", *between, f"{texts[-1]} or more")


def draw_histograms(title: str, panels: Sequence[Histogram]) -> Image.Image:
    """Draws histograms below each other, RGB."""
    picture = Image.new("RGB", (_WIDTH, _HEAD + len(panels) * _PANEL), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((_LEFT, _HEAD / 2), title, fill=_INK, font=ImageFont.load_default(26), anchor="lm")
    for number, panel in enumerate(panels):
        _draw_panel(draw, panel, _HEAD + number * _PANEL)
    return picture


def _draw_panel(draw: ImageDraw.ImageDraw, panel: Histogram, top: int) -> None:
    large, small = ImageFont.load_default(19), ImageFont.load_default(14)
    floor, height = top + _BOTTOM, _BOTTOM - _TOP
    draw.text((_LEFT, top), panel.title, fill=_INK, font=large)
    draw.text((_RIGHT, top), panel.summary, fill=_INK, font=large, anchor="ra")
    draw.text((_LEFT - 10, top + 28), panel.counted, fill=_GREY, font=small, anchor="ra")
    draw.text(((_LEFT + _RIGHT) / 2, floor + 30), panel.axis, fill=_GREY, font=small, anchor="ma")
    step = _tick_step(int(panel.counts_B.max(initial=0)))
    highest = step * max(1, math.ceil(panel.counts_B.max(initial=0) / step))
    for tick in range(0, highest + 1, step):
        y = floor - height * tick / highest
        draw.line((_LEFT, y, _RIGHT, y), fill=_RULE if tick else _GREY)
        draw.text((_LEFT - 10, y), f"{tick:,}", fill=_GREY, font=small, anchor="rm")
    pitch = (_RIGHT - _LEFT) / len(panel.ranges)
    for number, (text, count) in enumerate(zip(panel.ranges, panel.counts_B.tolist(), strict=True)):
        left, middle = _LEFT + number * pitch, _LEFT + (number + 0.5) * pitch
        y = floor - height * count / highest
        if count:
            draw.rectangle((left + 0.08 * pitch, min(y, floor - 1), left + 0.92 * pitch, floor), fill=_BAR)
            draw.text(
                (middle, y - 4), f"{count:,}", fill=_INK, font=small, anchor="ms", stroke_width=2, stroke_fill="white"
            )
        draw.text((middle, floor + 8), text, fill=_GREY, font=small, anchor="ma")


def _tick_step(highest: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, ... that reaches `highest` in at most four steps."""
    power = 10 ** int(math.log10(max(highest / 4, 1)))
    return next(factor * power for factor in (1, 2, 5, 10) if 4 * factor * power >= highest)
