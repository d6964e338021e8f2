"""Masks that are at hand in memory: arrays, tensors or COCO RLE, as another program's segmenter gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from osm_lightning.evaluation.segments.stored import segment_of_rle
from osm_lightning.record import Segment
from osm_lightning.rle import encode_rle, to_rle

GivenMask = NDArray[np.bool_] | Tensor | Mapping[str, object]
"""bool[H, W], or COCO RLE: an object with `size` and `counts` (text, bytes or a list)."""

GivenMasks = NDArray[np.bool_] | Tensor | Sequence[GivenMask]
"""bool[M, H, W], or a list of masks, of one or several kinds."""

ACCEPTED = 'bool[masks, height, width], or a list of bool[height, width] or of COCO RLE {"size": ..., "counts": ...}'


def given_segments(masks: GivenMasks, height_px: int, width_px: int) -> tuple[Segment, ...]:
    """Checks masks, and packs each; its id is its position.

    Args:
        masks: of one image.
        height_px: height of the image.
        width_px: width of the image.

    Raises:
        ValueError: there is none, or one is of another type or size, empty or broken.
    """
    if isinstance(masks, Tensor):
        masks = masks.detach().cpu().numpy()
    if isinstance(masks, np.ndarray) and masks.ndim != 3:
        raise ValueError(f"masks is {_kind(masks)}. Give {ACCEPTED}; one mask alone is masks[None].")
    if not isinstance(masks, np.ndarray | Sequence) or isinstance(masks, str | bytes):
        raise ValueError(f"masks is {_kind(masks)}. Give {ACCEPTED}.")
    if len(masks) == 0:
        raise ValueError("masks holds no mask. Give at least one to name.")
    return tuple(_segment(position, mask, height_px, width_px) for position, mask in enumerate(masks))


def _segment(position: int, mask: object, height_px: int, width_px: int) -> Segment:
    where = f"mask {position}"
    if isinstance(mask, Mapping):
        try:
            counts = to_rle(_with_text(mask), height_px, width_px)
        except ValueError as error:
            raise ValueError(f"{where} {error}.") from error
        return segment_of_rle(str(position), counts, height_px, where)
    array = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else mask
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype != np.bool_:
        threshold = " Turn numbers into bool by a threshold, as in masks > 0." if isinstance(array, np.ndarray) else ""
        raise ValueError(f"{where} is {_kind(array)}. Give {ACCEPTED}.{threshold}")
    if array.shape != (height_px, width_px):
        raise ValueError(
            f"{where} is {array.shape[1]} x {array.shape[0]} px, but the image is {width_px} x {height_px} px. Give "
            "masks of the very image that was encoded."
        )
    return segment_of_rle(str(position), encode_rle(array), height_px, where)


def _with_text(rle: Mapping[str, object]) -> Mapping[str, object]:
    """The same with counts as text; from pycocotools they come as bytes."""
    counts = rle.get("counts")
    return {**rle, "counts": counts.decode("latin-1")} if isinstance(counts, bytes) else rle


def _kind(value: object) -> str:
    """What a message calls a value: dtype[shape] of an array, else its type."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    return f"of type {type(value).__name__}"
