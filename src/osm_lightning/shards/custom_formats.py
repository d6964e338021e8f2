"""The formats that your own data may have: what files a split consists of, who reads them, whence its classes come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from osm_lightning.record import Record
from osm_lightning.shards.class_folders import class_names, read_class_folders
from osm_lightning.shards.conversion import RawImage, RawSplit
from osm_lightning.shards.instance import read_instances
from osm_lightning.shards.own_vocabulary import from_categories, from_names
from osm_lightning.shards.panoptic import PanopticLayout, read_split
from osm_lightning.shards.semantic import read_label_maps
from osm_lightning.shards.source import Findings
from osm_lightning.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class OwnSplit:
    """What is to be read."""

    paths: Mapping[str, Path]
    """Files and folders by their keys in the YAML."""
    vocabulary: Vocabulary | None
    """Classes; None for free-text names."""
    ignored_ids: tuple[int, ...] = ()
    """Ids of label maps that stand for no class."""


@dataclass(frozen=True, slots=True)
class Format:
    """One way in which masks are stored."""

    files: tuple[str, ...]
    """Keys of a split's entry that name files."""
    folders: tuple[str, ...]
    """Those that name folders."""
    read: Callable[[OwnSplit], RawSplit]
    classes: Callable[[Sequence[Path]], Vocabulary] | None
    """Classes that `annotations` of one or all splits speak of; None where they name none."""
    annotations: str
    """Key of a split's entry that names these."""
    all_splits: bool = False
    """Whether the annotations of all splits are needed to number the classes."""


def _read_instances(own: OwnSplit) -> RawSplit:
    return read_instances(own.paths["annotations"], [own.paths["images"]], own.vocabulary)


def _read_panoptic(own: OwnSplit) -> RawSplit:
    # The layout's paths are templates.
    annotations, maps, images = (
        str(own.paths[key]).replace("{", "{{").replace("}", "}}") for key in ("annotations", "segment_maps", "images")
    )
    layout = PanopticLayout(annotations, (maps,), images)
    if own.vocabulary is not None:
        return read_split(layout, Path(), "", own.vocabulary)
    categories = from_categories(own.paths["annotations"])
    raw = read_split(layout, Path(), "", categories)
    names = {entry.id: entry.names[0] for entry in categories}
    return replace(raw, images=[_FreelyNamed(image, names) for image in raw.images])


def _read_label_maps(own: OwnSplit) -> RawSplit:
    assert own.vocabulary is not None
    return read_label_maps(own.paths["images"], own.paths["label_maps"], own.vocabulary, own.ignored_ids)


def _read_class_folders(own: OwnSplit) -> RawSplit:
    return read_class_folders(own.paths["images"], own.paths["masks"], own.vocabulary)


def _classes_of_json(annotations: Sequence[Path]) -> Vocabulary:
    (json_path,) = annotations
    return from_categories(json_path)


def _classes_of_folders(annotations: Sequence[Path]) -> Vocabulary:
    return from_names(sorted({name for folder in annotations for name in class_names(folder)}), annotations[0])


FORMATS = {
    "coco_instance": Format(("annotations",), ("images",), _read_instances, _classes_of_json, "annotations"),
    "coco_panoptic": Format(
        ("annotations",), ("images", "segment_maps"), _read_panoptic, _classes_of_json, "annotations"
    ),
    "label_maps": Format((), ("images", "label_maps"), _read_label_maps, None, "label_maps"),
    "class_folders": Format(
        (), ("images", "masks"), _read_class_folders, _classes_of_folders, "masks", all_splits=True
    ),
}


@dataclass(frozen=True, slots=True)
class _FreelyNamed:
    """An image whose segments take their classes' names as free text."""

    image: RawImage
    names: Mapping[int, str]

    @property
    def key(self) -> str:
        return self.image.key

    def convert(self, errors: Findings, notes: Findings) -> Record | None:
        """See `RawImage`."""
        record = self.image.convert(errors, notes)
        if record is None:
            return None
        segments = (
            replace(segment, class_id=None, name=self.names[segment.class_id])
            for segment in record.segments
            if segment.class_id is not None
        )
        return replace(record, segments=tuple(segments))
