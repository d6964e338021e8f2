"""The table of datasets that the project knows by name: one row each, and nowhere else a dataset's name in code.

A dataset of your own needs no row here: name a vocabulary file in the data source's entry of the config.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Family = Literal["panoptic", "instance", "semantic"]


@dataclass(frozen=True, slots=True)
class Dataset:
    """What is fixed about a dataset, whoever uses it."""

    key: str
    family: Family
    """How its annotations are laid out, and with it which converter reads them."""
    vocabulary: str
    """Key of its vocabulary."""
    ignored_ids: tuple[int, ...] = ()
    """Class ids that stand for "no class": not trained on, not counted."""
    quota: int = 4
    """Masks per step and GPU in the paper's joint recipe (Sec. 4, released flags)."""


DATASETS = {
    row.key: row
    for row in (
        Dataset("coco", "panoptic", "coco", quota=8),
        Dataset("lvis", "instance", "lvis", quota=16),
        Dataset("ade20k", "panoptic", "ade20k", quota=4),
        Dataset("cityscapes", "panoptic", "cityscapes", quota=2),
        Dataset("a847", "semantic", "a847", ignored_ids=(65535,), quota=4),
        Dataset("pc459", "semantic", "pc459", ignored_ids=(430, 65535), quota=2),
    )
}


def ignored_ids(dataset: str) -> tuple[int, ...]:
    """Class ids that a dataset ignores; none for a dataset that is not in the table."""
    return DATASETS[dataset].ignored_ids if dataset in DATASETS else ()
