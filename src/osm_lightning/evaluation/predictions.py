"""Writes names to disk: a line per mask for programs, a COCO JSON for labelling tools, a picture per image for eyes.

What an image gives goes into the journal (`prediction_journal.py`) as soon as it is named; when all images are in it,
`publish` makes the files of it. Nothing is seen under its final name before that. Files of an earlier run are replaced
then, and left alone otherwise. Memory holds one image at a time, and a place per image.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

from osm_lightning.batch import Answer, NamedMask
from osm_lightning.evaluation.overlay import draw_overlay
from osm_lightning.evaluation.prediction_journal import JournalPart, Place, PredictionJournal, dump
from osm_lightning.record import Record
from osm_lightning.rle import encode_rle
from osm_lightning.whole_file import open_whole

LINES = "predictions.jsonl"
COCO = "predictions.coco.json"
OVERLAYS = "overlay"

MOST_OPEN = 256
"""Parts of the journal that are open at once: fewer than the 1024 files that a process may usually open."""

Row = dict[str, Any]
"""What the journal holds of an image: key, file_name, width, height, and its masks, each with its names."""


def write_image(part: JournalPart, record: Record, named: Sequence[NamedMask]) -> None:
    """Draws one image's names, and puts them into the journal; they count once the part is committed.

    Args:
        part: of this process.
        record: the image; every image once.
        named: its masks, with an answer in every mode; the modes stand in one order throughout.

    Raises:
        ValueError: the image cannot be decoded, a probability is not a number, or the disk is full.
    """
    index_of = {segment.id: index for index, segment in enumerate(record.segments)}
    indices = [index_of[mask.mask_id] for mask in named]
    segment_map = record.segment_map()
    masks = []
    for index, mask in zip(indices, named, strict=True):
        refuse_nan(mask)
        segment = record.segments[index]
        masks.append(
            {
                "mask_id": segment.id,
                "bbox_xywh_px": segment.bbox_xywh_px,
                "area_px": segment.area_px,
                "counts": segment.rle or encode_rle(record.mask(index, segment_map)),
                "names": {mode: _answer_row(answer) for mode, answer in mask.answers.items()},
            }
        )
    names = [_first(mask.answers).name for mask in named]
    picture = draw_overlay(record.image(), (record.mask(index, segment_map) for index in indices), names)
    # In the hidden folder, and therefore under its own name: without a line in the journal it is drawn again.
    with part.journal.on_disk(), (part.journal.pictures / f"{record.key}.png").open("wb") as file:
        picture.save(file, format="PNG")
        file.flush()
        os.fsync(file.fileno())
    file_name = str(record.source.get("file_name", record.key))
    facts = {"key": record.key, "file_name": file_name, "width": record.width_px, "height": record.height_px}
    part.append({**facts, "masks": masks})


def publish(journal: PredictionJournal, keys: Sequence[str], score_eos: bool = True) -> int:
    """Makes the files of the journal and removes it, once it holds all images.

    `predictions.jsonl` has one object per mask: image, mask_id, bbox_xywh_px, area_px, and names by mode.
    `predictions.coco.json` has one category per distinct name of the first mode, sorted; an annotation's `score` is
    that name's probability, its `attributes` are the mask's id and its name in every mode.
    `overlay/<key>.png` shows the names of the first mode.

    Stopped anywhere, it can be done again.

    Args:
        journal: nobody writes to it any more.
        keys: all images, in the order in which they are to stand in the files.
        score_eos: whether a `score` is that of the name and its end, or of the name alone (released behaviour).

    Returns:
        How many images the journal holds; with fewer than all, nothing was done.

    Raises:
        ValueError: the disk is full.
    """
    places: dict[str, Place] = {}
    names: set[str] = set()
    for place, row in journal.rows():
        if places.setdefault(row["key"], place) is place:
            names.update(_first(mask["names"])["name"] for mask in row["masks"])
    order = [places[key] for key in keys if key in places]
    if len(order) < len(keys):
        return len(order)
    with journal.on_disk():
        # The lines take their name last, so that whoever sees new ones sees all that belongs to them.
        with open_whole(journal.out / LINES) as lines, open_whole(journal.out / COCO) as coco:
            for row in _read(order):
                lines.writelines(dump(line) + b"\n" for line in _lines(row))
            _write_coco(coco, order, sorted(names), "logprob" if score_eos else "logprob_no_eos")
            _move_pictures(journal, keys)
        journal.remove()
    return len(order)


def _read(order: Iterable[Place]) -> Iterator[Row]:
    """The rows at some places, in their order."""
    files: dict[Path, BinaryIO] = {}
    with ExitStack() as stack:
        for place in order:
            if place.part not in files:
                if len(files) == MOST_OPEN:
                    stack.close()
                    files.clear()
                files[place.part] = stack.enter_context(place.part.open("rb"))
            files[place.part].seek(place.offset)
            yield json.loads(files[place.part].readline())


def _lines(row: Row) -> Iterator[dict[str, Any]]:
    for mask in row["masks"]:
        facts = {fact: mask[fact] for fact in ("mask_id", "bbox_xywh_px", "area_px", "names")}
        yield {"image": row["file_name"], **facts}


def _write_coco(file: BinaryIO, order: Sequence[Place], names: Sequence[str], score: str) -> None:
    category_of = {name: place for place, name in enumerate(names, start=1)}
    categories = ({"id": place, "name": name} for name, place in category_of.items())
    lists = {"images": _images(order), "categories": categories, "annotations": _annotations(order, category_of, score)}
    for before, (title, entries) in zip((b"{", b", ", b", "), lists.items(), strict=True):
        file.write(before + dump(title) + b": [")
        for number, entry in enumerate(entries):
            file.write((b", " if number else b"") + dump(entry))
        file.write(b"]")
    file.write(b"}")


def _images(order: Sequence[Place]) -> Iterator[dict[str, Any]]:
    for image_id, row in enumerate(_read(order), start=1):
        yield {"id": image_id, **{fact: row[fact] for fact in ("file_name", "width", "height")}}


def _annotations(order: Sequence[Place], category_of: Mapping[str, int], score: str) -> Iterator[dict[str, Any]]:
    annotation_id = 0
    for image_id, row in enumerate(_read(order), start=1):
        for mask in row["masks"]:
            annotation_id += 1
            first = _first(mask["names"])
            names = {f"name_{mode}": answer["name"] for mode, answer in mask["names"].items()}
            yield {
                "id": annotation_id,
                "image_id": image_id,
                "segmentation": {"size": [row["height"], row["width"]], "counts": mask["counts"]},
                "bbox": mask["bbox_xywh_px"],
                "area": mask["area_px"],
                "iscrowd": 0,
                "score": math.exp(first[score]),
                "attributes": {"mask_id": mask["mask_id"], **names},
                "category_id": category_of[first["name"]],
            }


def _move_pictures(journal: PredictionJournal, keys: Iterable[str]) -> None:
    folder = journal.out / OVERLAYS
    folder.mkdir(exist_ok=True)
    for key in keys:
        with suppress(FileNotFoundError):  # moved before a kill
            (journal.pictures / f"{key}.png").replace(folder / f"{key}.png")


def _answer_row(answer: Answer) -> dict[str, Any]:
    return {
        "name": answer.name,
        "token_ids": answer.token_ids,
        "logprob": answer.logprob,
        "logprob_no_eos": answer.logprob_no_eos,
    }


def _first(by_mode: Mapping[str, Any]) -> Any:
    return next(iter(by_mode.values()))


def refuse_nan(mask: NamedMask) -> None:
    """Refuses names whose probability is none.

    Raises:
        ValueError: a log probability is not finite.
    """
    for mode, answer in mask.answers.items():
        if not math.isfinite(answer.logprob) or not math.isfinite(answer.logprob_no_eos):
            raise ValueError(
                f"image {mask.image}, mask {mask.mask_id}, mode {mode}: the log probability of {answer.name!r} is "
                f"{answer.logprob} ({answer.logprob_no_eos} without EOS), which is no number. Use a higher precision."
            )
