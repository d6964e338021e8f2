"""PC-459 from PASCAL-Context's download: one MATLAB file per image of VOC 2010, with a map of 459 classes.

The maps count classes from 1, and 0 is no class; ids here count from 0, as in prepare_pascal_ctx_full_sem_seg.py of
ODISE and FC-CLIP. The split is VOC 2010's own: 4998 images to train on, 5105 to validate on.
"""

from __future__ import annotations

import io
import re
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from osm_lightning.datasets import ignored_ids
from osm_lightning.picture import MAX_IMAGE_PIXELS
from osm_lightning.record import Segment
from osm_lightning.shards.conversion import RawSplit
from osm_lightning.shards.id_maps import IdMap, MappedImage, existing_folders, ids_in, raw_split
from osm_lightning.vocabulary import Vocabulary

LISTS = ("pascalcontext_{split}.txt", "ImageSets/SegmentationContext/{split}.txt", "ImageSets/Main/{split}.txt")
"""Where a split's list may lie, as OVSeg, mmsegmentation and VOC 2010 itself put it; the first that exists is read."""

MAX_MAT_BYTES = 1_000_000
"""Twice an uncompressed map of VOC's largest pictures (500 x 500 px). A small bound, because zlib can make a thousand
times as much of a file that means harm."""

_SHORT_SPLIT = {"training": "train", "validation": "val"}
_VARIABLE = "LabelMap"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,80}")


def read(src: Path, split: str, vocabulary: Vocabulary) -> RawSplit:
    """Reads a split's list. No picture and no map is opened yet.

    Args:
        src: the folder VOCdevkit/VOC2010, with `JPEGImages` and, out of trainval.tar.gz, `trainval` in it.
        split: `train` or `val`.
        vocabulary: the 459 classes, whose ids are the map's values less 1.

    Raises:
        ValueError: a folder or the list is missing, or the list is none.
    """
    archives = {"JPEGImages": "VOCtrainval_03-May-2010.tar", "trainval": "trainval.tar.gz of PASCAL-Context"}
    images, maps = existing_folders(src, archives)
    lists = [src / name.format(split=_SHORT_SPLIT.get(split, split)) for name in LISTS]
    list_path = next((path for path in lists if path.is_file()), None)
    if list_path is None:
        raise ValueError(
            f"--src {src} has no list of split {split}: none of {', '.join(str(path) for path in lists)} exists. Check "
            "--split, or unpack ImageSets out of VOCtrainval_03-May-2010.tar."
        )
    read_map = partial(_read_map, num_classes=len(vocabulary), ignored=ignored_ids("pc459"))
    return raw_split(
        list_path,
        (MappedImage(images / f"{name}.jpg", (maps / f"{name}.mat",), read_map) for name in _names(list_path)),
    )


def _names(path: Path) -> list[str]:
    """Names of images, one a line."""
    try:
        names = path.read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no list of images ({error}). Download it again.") from error
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{path} names an image {name[:99]!r}, which is no name of VOC's. Download the list again."
            )
    return names


def _read_map(path: Path, *, num_classes: int, ignored: tuple[int, ...]) -> IdMap:
    """Reads one map of classes; of the ignored ones no segments are made."""
    ids = _read_mat(path)
    values = ids_in(ids)
    if values[-1] > num_classes:
        raise ValueError(f"{path} has a class {values[-1]}, but PASCAL-Context has {num_classes}")
    classes = {value: value - 1 for value in values if value > 0 and value - 1 not in ignored}
    return IdMap(ids, {value: Segment(id=str(class_id), class_id=class_id) for value, class_id in classes.items()})


def _read_mat(path: Path) -> NDArray[np.uint16]:
    """uint16[H, W], the map of classes in a MATLAB file. No code can hide in one, but any nonsense can.

    Raises:
        ValueError: it is too large, no MATLAB file of version 4 to 7, or has no such map.
    """
    from scipy.io import loadmat, whosmat  # half a second, which other datasets need not wait for

    if path.stat().st_size > MAX_MAT_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes; maps of VOC's pictures stay below {MAX_MAT_BYTES:,}"
        )
    data = path.read_bytes()
    try:
        described = {name: (shape, kind) for name, shape, kind in whosmat(io.BytesIO(data))}
        shape, kind = described.get(_VARIABLE, ((), "missing"))
        if kind == "uint16" and len(shape) == 2 and 0 < shape[0] * shape[1] <= MAX_IMAGE_PIXELS:
            ids = loadmat(io.BytesIO(data), variable_names=[_VARIABLE])[_VARIABLE]
            return np.ascontiguousarray(ids, dtype=np.uint16)
    except NotImplementedError as error:
        raise ValueError(
            f"{path} is a MATLAB file of version 7.3 (HDF5), but PASCAL-Context's are older. Unpack the original"
        ) from error
    except Exception as error:  # scipy raises whatever the bytes lead it to
        raise ValueError(f"{path} is no MATLAB file that can be read ({type(error).__name__}: {error})") from error
    size = " x ".join(str(length) for length in shape)
    raise ValueError(f"{path}: {_VARIABLE} is {kind} {size}".rstrip() + ", but must be uint16 [height, width]")
