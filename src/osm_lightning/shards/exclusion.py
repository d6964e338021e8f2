"""Images that a build leaves out because another dataset is validated on them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from osm_lightning.shards.conversion import RawSplit


def exclude_lvis_val(split: RawSplit, json_path: Path) -> RawSplit:
    """Leaves out the images that LVIS is validated on: it divided COCO's training images anew (paper, Sec. 4).

    Args:
        split: images of COCO, whose keys are their ids.
        json_path: `lvis_v1_val.json`.

    Returns:
        The others; those left out are in its notes.

    Raises:
        ValueError: the file is not LVIS's.
    """
    try:
        held_out = {image["id"] for image in json.loads(json_path.read_bytes())["images"]}
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"--exclude-lvis-val {json_path} has no list of images ({type(error).__name__}: {error}). Give "
            "lvis_v1_val.json, out of lvis_v1_val.json.zip."
        ) from error
    kept = []
    for image in split.images:
        if image.key.isdecimal() and int(image.key) in held_out:
            split.notes.add(f"images of {json_path.name}, left out", image.key)
        else:
            kept.append(image)
    if len(kept) == len(split):
        split.notes.add("--exclude-lvis-val had no effect: no image of the split is in", json_path.name)
    return replace(split, images=kept)
