"""Where raw datasets keep their files: one row for each layout in which a dataset is met, and which reader takes it.

The only place where a converter is chosen by a dataset's name. A dataset may have several layouts (as it is downloaded,
and as other projects prepare it); the first whose files are there is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from osm_lightning.shards import (
    ade20k_challenge,
    ade20k_full,
    cityscapes_fine,
    instance,
    panoptic,
    pascal_context,
    semantic,
)
from osm_lightning.shards.conversion import RawSplit
from osm_lightning.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Layout:
    """One way in which a dataset lies on disk."""

    title: str
    """What it is, for help and errors."""
    paths: tuple[tuple[str, str], ...]
    """Files and folders that it is known by, below --src (`{split}` is the split's name, `{folder}` its folder's), each
    with the archive that holds it. A path may list alternatives, separated by `|`."""
    read: Callable[[Path, str, Vocabulary], RawSplit]
    """Reads the tables of a split: (--src, split, vocabulary)."""
    folders: Mapping[str, str] = field(default_factory=dict)
    """From a split to the name of its folders, where that is another."""

    def missing(self, src: Path, split: str) -> list[str]:
        """What of it is not there, each path with its archive; nothing for a split that can be read."""
        names = {"split": split, "folder": self.folders.get(split, split)}
        lacking = []
        for template, archive in self.paths:
            paths = template.format(**names).split("|")
            if not any((src / path).exists() for path in paths):
                lacking.append(f"{' or '.join(paths)} ({archive})")
        return lacking


def _panoptic(title: str, layout: panoptic.PanopticLayout, archives: tuple[str, str, str]) -> Layout:
    """A row for a dataset in COCO's panoptic format; archives of its JSON, its segment maps and its images."""
    templates = (layout.annotations, "|".join(layout.segment_maps), layout.images)
    read = partial(panoptic.read_split, layout)
    return Layout(title, tuple(zip(templates, archives, strict=True)), read, layout.folders)


def _label_maps(title: str, layout: semantic.LabelMapLayout, archive: str) -> Layout:
    """A row for a dataset of label maps, as a script prepares it."""
    paths = ((layout.images, archive), (layout.label_maps, archive))
    return Layout(title, paths, partial(semantic.read_split, layout), layout.folders)


_TRAINING = {"train": "training", "val": "validation"}
_MASK2FORMER = "prepare_ade20k_pan_seg.py of Mask2Former"
_CITYSCAPES_SCRIPTS = "createPanopticImgs.py of cityscapesScripts"

LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "coco": (
        _panoptic(
            "COCO panoptic, as downloaded",
            panoptic.LAYOUTS["coco"],
            (
                "panoptic_annotations_trainval2017.zip",
                "the archive of PNGs inside panoptic_annotations_trainval2017.zip",
                "train2017.zip or val2017.zip",
            ),
        ),
    ),
    "ade20k": (
        # First what was downloaded: it is what the prepared form was made from.
        Layout(
            "ADEChallengeData2016, as downloaded",
            (
                ("images/{folder}", "ADEChallengeData2016.zip"),
                ("annotations/{folder}", "ADEChallengeData2016.zip"),
                ("annotations_instance/{folder}", "annotations_instance.tar"),
            ),
            ade20k_challenge.read,
            _TRAINING,
        ),
        _panoptic(
            "ADEChallengeData2016, as prepared by Mask2Former or FC-CLIP",
            panoptic.LAYOUTS["ade20k"],
            (_MASK2FORMER, _MASK2FORMER, "ADEChallengeData2016.zip"),
        ),
    ),
    "cityscapes": (
        _panoptic(
            "Cityscapes panoptic, as prepared by cityscapesScripts",
            panoptic.LAYOUTS["cityscapes"],
            (_CITYSCAPES_SCRIPTS, _CITYSCAPES_SCRIPTS, "leftImg8bit_trainvaltest.zip"),
        ),
        Layout(
            "Cityscapes, as downloaded",
            (
                ("leftImg8bit/{split}", "leftImg8bit_trainvaltest.zip"),
                ("gtFine/{split}", "gtFine_trainvaltest.zip"),
            ),
            cityscapes_fine.read,
        ),
    ),
    "lvis": (
        Layout(
            "LVIS v1, beside COCO 2017's images",
            (
                ("|".join(instance.LVIS_JSON), "lvis_v1_train.json.zip or lvis_v1_val.json.zip"),
                ("train2017|coco/train2017", "train2017.zip"),
            ),
            instance.read_lvis,
        ),
    ),
    "a847": (
        _label_maps(
            "ADE20K_2021_17_01, as prepared by MaskFormer or FC-CLIP",
            semantic.A847_PREPARED,
            "prepare_ade20k_full_sem_seg.py of MaskFormer",
        ),
        Layout(
            "ADE20K_2021_17_01, as downloaded",
            (("images/ADE/{folder}", "the full dataset of ADE20K, release 2021_17_01"),),
            ade20k_full.read,
            _TRAINING,
        ),
    ),
    "pc459": (
        _label_maps(
            "pascal_ctx_d2, as prepared by ODISE or FC-CLIP",
            semantic.PC459_PREPARED,
            "prepare_pascal_ctx_full_sem_seg.py of FC-CLIP",
        ),
        _label_maps(
            "VOC2010, as prepared by CAT-Seg (val only)",
            semantic.PC459_IN_VOC,
            "prepare_pascal_context_459.py of CAT-Seg",
        ),
        Layout(
            "VOCdevkit/VOC2010 with PASCAL-Context, as downloaded",
            (("JPEGImages", "VOCtrainval_03-May-2010.tar"), ("trainval", "PASCAL-Context's trainval.tar.gz")),
            pascal_context.read,
        ),
    ),
}
"""From dataset to its layouts, in the order in which they are tried."""


def find_layout(dataset: str, src: Path, split: str) -> Layout:
    """The first layout of a dataset whose files are there.

    Raises:
        ValueError: none is complete; says of each what it lacks, and which archive holds that.
    """
    lacking = {layout.title: layout.missing(src, split) for layout in LAYOUTS[dataset]}
    for layout in LAYOUTS[dataset]:
        if not lacking[layout.title]:
            return layout
    lines = [line for title, paths in lacking.items() for line in (f"{title} lacks", *(f"  {path}" for path in paths))]
    raise ValueError(
        f"--src {src} does not hold split {split} of {dataset}:\n  "
        + "\n  ".join(lines)
        + "\nCheck --src and --split, or unpack what is missing there."
    )
