"""Writes names to disk: a line per mask for programs, a COCO JSON for labelling tools, a picture per image for eyes.

Nothing is seen under its final name before everything is written: the files grow in a hidden folder inside the output
folder and are moved when all went well. Files of an earlier run are replaced then, and left alone otherwise.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from osm_lightning.batch import Answer, NamedMask
from osm_lightning.evaluation.overlay import draw_overlay
from osm_lightning.record import Record
from osm_lightning.rle import encode_rle

LINES = "predictions.jsonl"
COCO = "predictions.coco.json"
OVERLAYS = "overlay"


class PredictionWriter:
    """Context manager: `write` once per image; a clean exit puts the files into `out`, an exception leaves none.

    `predictions.jsonl` has one object per mask: image, mask_id, bbox_xywh_px, area_px, and names by mode.
    `predictions.coco.json` has one category per distinct name of the first mode, sorted; an annotation's `score` is
    that name's probability, its `attributes` are the mask's id and its name in every mode.
    `overlay/<key>.png` shows the names of the first mode.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._images: dict[str, dict[str, Any]] = {}
        self._annotations: list[dict[str, Any]] = []
        self._names: list[str] = []

    def __enter__(self) -> Self:
        """Makes the output folder.

        Raises:
            ValueError: it cannot be made or written to.
        """
        self._made_out = not self.out.exists()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._staging = Path(tempfile.mkdtemp(prefix=".predictions-", dir=self.out))
        except OSError as error:
            raise ValueError(f"out: {self.out} is no folder to write to ({error}). Give another.") from error
        (self._staging / OVERLAYS).mkdir()
        self._lines = (self._staging / LINES).open("w", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Moves the files to their names, or removes them where something went wrong."""
        try:
            with self._lines:
                _sync(self._lines)
            if kind is None:
                with (self._staging / COCO).open("w", encoding="utf-8") as file:
                    file.write(_dump(self._coco()))
                    _sync(file)
                self._publish()
        finally:
            shutil.rmtree(self._staging)
            if self._made_out and not any(self.out.iterdir()):
                self.out.rmdir()

    def write(self, record: Record, named: Sequence[NamedMask]) -> None:
        """Takes one image's masks and their names.

        Args:
            record: the image; every image once.
            named: its masks, with an answer in every mode; the modes stand in one order throughout.

        Raises:
            ValueError: the image cannot be decoded, or a probability is not a number.
        """
        assert record.key not in self._images, f"{record.key} is written twice"
        image = {
            "id": len(self._images) + 1,
            "file_name": str(record.source.get("file_name", record.key)),
            "width": record.width_px,
            "height": record.height_px,
        }
        self._images[record.key] = image
        index_of = {segment.id: index for index, segment in enumerate(record.segments)}
        indices = [index_of[mask.mask_id] for mask in named]
        segment_map = record.segment_map()
        for index, mask in zip(indices, named, strict=True):
            _refuse_nan(mask)
            segment = record.segments[index]
            facts = {"bbox_xywh_px": segment.bbox_xywh_px, "area_px": segment.area_px}
            line = {"image": image["file_name"], "mask_id": segment.id, **facts, "names": _names_row(mask.answers)}
            self._lines.write(_dump(line) + "\n")
            counts = segment.rle or encode_rle(record.mask(index, segment_map))
            annotation = {
                "id": len(self._annotations) + 1,
                "image_id": image["id"],
                "segmentation": {"size": [record.height_px, record.width_px], "counts": counts},
                "bbox": segment.bbox_xywh_px,
                "area": segment.area_px,
                "iscrowd": 0,
            }
            self._annotations.append(annotation | _judgement(mask))
        names = [_first(mask.answers).name for mask in named]
        self._names += names
        picture = draw_overlay(record.image(), (record.mask(index, segment_map) for index in indices), names)
        with (self._staging / OVERLAYS / f"{record.key}.png").open("wb") as file:
            picture.save(file, format="PNG")
            _sync(file)

    def _coco(self) -> dict[str, Any]:
        category_of = {name: place for place, name in enumerate(sorted(set(self._names)), start=1)}
        return {
            "images": list(self._images.values()),
            "categories": [{"id": place, "name": name} for name, place in category_of.items()],
            "annotations": [
                annotation | {"category_id": category_of[name]}
                for annotation, name in zip(self._annotations, self._names, strict=True)
            ],
        }

    def _publish(self) -> None:
        """Moves all files into place; the lines last, so that whoever sees new ones sees all that belongs to them."""
        (self.out / OVERLAYS).mkdir(exist_ok=True)
        for picture in sorted((self._staging / OVERLAYS).iterdir()):
            picture.replace(self.out / OVERLAYS / picture.name)
        for name in (COCO, LINES):
            (self._staging / name).replace(self.out / name)


def _first(answers: Mapping[str, Answer]) -> Answer:
    return next(iter(answers.values()))


def _names_row(answers: Mapping[str, Answer]) -> dict[str, dict[str, Any]]:
    return {
        mode: {
            "name": answer.name,
            "token_ids": answer.token_ids,
            "logprob": answer.logprob,
            "logprob_no_eos": answer.logprob_no_eos,
        }
        for mode, answer in answers.items()
    }


def _judgement(mask: NamedMask) -> dict[str, Any]:
    names = {f"name_{mode}": answer.name for mode, answer in mask.answers.items()}
    return {"score": math.exp(_first(mask.answers).logprob), "attributes": {"mask_id": mask.mask_id, **names}}


def _refuse_nan(mask: NamedMask) -> None:
    for mode, answer in mask.answers.items():
        if not math.isfinite(answer.logprob) or not math.isfinite(answer.logprob_no_eos):
            raise ValueError(
                f"image {mask.image}, mask {mask.mask_id}, mode {mode}: the log probability of {answer.name!r} is "
                f"{answer.logprob} ({answer.logprob_no_eos} without EOS), which is no number. Use a higher precision."
            )


def _dump(value: object) -> str:
    # ASCII: file names may hold bytes that are no UTF-8, generated names line separators that would break a line.
    return json.dumps(value, ensure_ascii=True, allow_nan=False)


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
