"""Masks at hand in memory: every form gives the same segments, and what cannot be named is said at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_rle

from osm_lightning.evaluation.segments import given_segments
from osm_lightning.record import box_of
from osm_lightning.rle import decode_rle

HEIGHT, WIDTH = 6, 9


def masks(num: int = 3) -> NDArray[np.bool_]:
    drawn = np.random.default_rng(0).random((num, HEIGHT, WIDTH)) < 0.4
    drawn[:, 0, 0] = True
    return drawn


def rle(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """As pycocotools gives it: counts are bytes."""
    return coco_rle.encode(np.asfortranarray(mask.astype(np.uint8)))


def with_counts(mask: NDArray[np.bool_], kind: str) -> dict[str, Any]:
    if kind == "list":  # runs, background first, column by column
        flat = np.concatenate(([False], mask.T.ravel()))
        changes = np.flatnonzero(np.diff(flat, prepend=False)[1:])
        runs = np.diff(np.concatenate(([0], changes, [mask.size])))
        return {"size": [HEIGHT, WIDTH], "counts": runs.tolist()}
    packed = rle(mask)
    return {**packed, "counts": packed["counts"].decode()} if kind == "text" else packed


FORMS: dict[str, Any] = {
    "numpy": lambda given: given,
    "numpy, transposed in memory": lambda given: np.asfortranarray(given),
    "torch": torch.from_numpy,
    "list of numpy": list,
    "tuple of torch": lambda given: tuple(torch.from_numpy(given)),
    "RLE bytes": lambda given: [with_counts(mask, "bytes") for mask in given],
    "RLE text": lambda given: [with_counts(mask, "text") for mask in given],
    "RLE runs": lambda given: [with_counts(mask, "list") for mask in given],
    "mixed": lambda given: [given[0], torch.from_numpy(given[1]), rle(given[2])],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_masks_in_their_order(form: str) -> None:
    segments = given_segments(FORMS[form](masks()), HEIGHT, WIDTH)
    assert [segment.id for segment in segments] == ["0", "1", "2"]
    for segment, mask in zip(segments, masks(), strict=True):
        assert segment.rle is not None
        np.testing.assert_array_equal(decode_rle(segment.rle, HEIGHT, WIDTH), mask)
        assert (segment.area_px, segment.bbox_xywh_px) == (mask.sum(), box_of(mask))
        assert (segment.class_id, segment.name, segment.iscrowd) == (None, None, False)


def emptied() -> NDArray[np.bool_]:
    given = masks()
    given[1] = False
    return given


REFUSED: dict[str, tuple[Any, str]] = {
    "none": ([], "masks holds no mask"),
    "none in an array": (np.zeros((0, HEIGHT, WIDTH), bool), "masks holds no mask"),
    "empty": (emptied(), "mask 1 is empty; a mask without pixels cannot be named"),
    "empty RLE": ([rle(np.zeros((HEIGHT, WIDTH), bool))], "mask 0 is empty"),
    "size": (masks()[:, 1:], "mask 0 is 9 x 5 px, but the image is 9 x 6 px. Give masks of the very image"),
    "size of one": ([masks()[0], masks()[1].T], "mask 1 is 6 x 9 px, but the image is 9 x 6 px"),
    "size of RLE": ([rle(masks()[0].T)], "mask 0 is 6 x 9 px, but the image is 9 x 6 px"),
    "numbers": (masks().astype(np.uint8), r"mask 0 is uint8\[6, 9\]. Give bool.* a threshold, as in masks > 0"),
    "floats of torch": (torch.rand(2, HEIGHT, WIDTH), r"mask 0 is float32\[6, 9\]. Give bool.* threshold"),
    "one mask": (masks()[0], r"masks is bool\[6, 9\]. .* one mask alone is masks\[None\]"),
    "channels": (masks()[None], r"masks is bool\[1, 3, 6, 9\]"),
    "nothing": (None, "masks is of type NoneType"),
    "text": ("masks.json", "masks is of type str"),
    "one RLE": (rle(masks()[0]), "masks is of type dict"),
    "nested lists": (masks().tolist(), "mask 0 is of type list"),
    "no RLE": ([{"counts": [54]}], "mask 0 has a segmentation of an unknown form"),
    "broken RLE": ([{"size": [HEIGHT, WIDTH], "counts": "5"}], "mask 0 has RLE runs that add up to 5"),
    "RLE of other bytes": ([{"size": [HEIGHT, WIDTH], "counts": b"\xff"}], "mask 0 has compressed RLE counts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_named_is_one_clear_error(case: str) -> None:
    given, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        given_segments(given, HEIGHT, WIDTH)
