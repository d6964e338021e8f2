"""Your own data, described by a YAML: which of four formats it has, what its classes are, where each split lies.

The YAML and what it names are read as if a stranger had written them: every key and type is checked, and nothing is
read that lies outside the data's folder, whatever links point there. docs/own_data.md shows one YAML for each format.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from osm_lightning.datasets import DATASETS
from osm_lightning.shards.conversion import RawSplit
from osm_lightning.shards.custom_formats import FORMATS, Format, OwnSplit
from osm_lightning.shards.own_vocabulary import VOCABULARY_FILE, from_file
from osm_lightning.shards.source import stays_inside
from osm_lightning.vocabulary import Vocabulary, load_vocabulary, shipped_vocabularies

_MAX_BYTES = 1_000_000
"""Larger files are no description of data."""
_FROM_ANNOTATIONS, _FREE_TEXT = "annotations", "none"


@dataclass(frozen=True, slots=True)
class CustomSplit:
    """One split of your own data, checked as far as its tables and file names go."""

    dataset: str
    """Key of the dataset."""
    vocabulary: Vocabulary | None
    """Its classes; None where masks have free-text names."""
    is_shipped: bool
    """Whether the vocabulary comes with the package. Others go into the shard folder, by `write_vocabulary`."""
    split: RawSplit

    @property
    def index_vocabulary(self) -> str | None:
        """What the index of the shard folder calls the vocabulary."""
        return None if self.vocabulary is None else self.vocabulary.key if self.is_shipped else VOCABULARY_FILE


def read_custom(yaml_path: Path, src: Path | None, split: str) -> CustomSplit:
    """Reads a YAML and the tables of one split that it describes.

    Args:
        yaml_path: the YAML.
        src: folder that its paths are relative to; None for the YAML's own.
        split: name of the split.

    Raises:
        ValueError: the YAML is broken, a key is unknown or missing, a path is missing or leads out of the folder, the
            classes can't be told, or the tables are not of the format.
    """
    root = yaml_path.parent if src is None else src
    content = _load(yaml_path)
    try:
        spec = _Spec.read(content)
        if split not in spec.splits:
            raise ValueError(f"there is no split {split}; there is {', '.join(spec.splits)}")
        own = OwnSplit(spec.paths(root, split), _vocabulary(spec, root, split), spec.ignored_ids)
    except ValueError as error:
        raise ValueError(f"{yaml_path}: {str(error).removesuffix('.')}.") from error
    raw = spec.format.read(own)
    return CustomSplit(spec.dataset, own.vocabulary, spec.vocabulary in shipped_vocabularies(), raw)


def _vocabulary(spec: _Spec, root: Path, split: str) -> Vocabulary | None:
    """The classes, from wherever the YAML says."""
    if spec.format.classes is None and spec.vocabulary in {_FROM_ANNOTATIONS, _FREE_TEXT}:
        raise ValueError(
            f"vocabulary is {spec.vocabulary!r}, but pixels of label maps are bare ids: name a TSV, or a text file "
            "with a class on each line"
        )
    if spec.vocabulary == _FREE_TEXT:
        return None
    if spec.vocabulary == _FROM_ANNOTATIONS:
        assert spec.format.classes is not None
        splits = spec.splits if spec.format.all_splits else [split]
        return spec.format.classes([spec.paths(root, name)[spec.format.annotations] for name in splits])
    if spec.vocabulary.endswith((".tsv", ".txt")):
        return from_file(_path(root, "vocabulary", spec.vocabulary, Path.is_file))
    if spec.vocabulary not in shipped_vocabularies():
        raise ValueError(
            f"vocabulary is {spec.vocabulary!r}; it must be {_FROM_ANNOTATIONS}, {_FREE_TEXT}, a file that ends in "
            f".tsv or .txt, or one that comes with the package ({', '.join(shipped_vocabularies())})"
        )
    return load_vocabulary(spec.vocabulary)


# What the YAML says


class _Loader(yaml.SafeLoader):
    """Plain data only, and no key twice: YAML would take the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


@dataclass(frozen=True, slots=True)
class _Spec:
    """What a YAML says, checked but for its paths."""

    dataset: str
    format: Format
    vocabulary: str
    splits: Mapping[str, Mapping[str, str]]
    ignored_ids: tuple[int, ...]

    @classmethod
    def read(cls, content: object) -> _Spec:
        top = _mapping("the file", content)
        maps_only = ("ignored_ids",) if top.get("format") == "label_maps" else ()
        _check_keys("the file", top, ("dataset", "format", "vocabulary", "splits"), maps_only)
        dataset, vocabulary = _text("dataset", top["dataset"]), _text("vocabulary", top["vocabulary"])
        if dataset in DATASETS:
            raise ValueError(f"dataset is {dataset!r}, the key of a dataset with rules of its own; choose another")
        format_name = _text("format", top["format"])
        if format_name not in FORMATS:
            raise ValueError(f"format is {format_name!r}{_meant(format_name, FORMATS)}")
        ignored = top.get("ignored_ids", [])
        if not isinstance(ignored, list) or not all(type(class_id) is int for class_id in ignored):
            raise ValueError(f"ignored_ids is {ignored!r}; it must be a list of whole numbers")
        format_, splits = FORMATS[format_name], {}
        for name, entry in _mapping("splits", top["splits"]).items():
            where = f"splits.{_text('name of a split', name)}"
            _check_keys(where, _mapping(where, entry), (*format_.folders, *format_.files))
            splits[name] = {key: _text(f"{where}.{key}", value) for key, value in entry.items()}
        return cls(dataset, format_, vocabulary, splits, tuple(ignored))

    def paths(self, root: Path, split: str) -> dict[str, Path]:
        """The paths of a split, each of which is there and stays inside."""
        entry, where = self.splits[split], f"splits.{split}"
        files = {key: _path(root, f"{where}.{key}", entry[key], Path.is_file) for key in self.format.files}
        folders = {key: _path(root, f"{where}.{key}", entry[key], Path.is_dir) for key in self.format.folders}
        for folder in folders.values():
            _refuse_links_out(folder, root)
        return files | folders


def _load(yaml_path: Path) -> object:
    try:
        with yaml_path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES:,} bytes")
        return yaml.load(data, _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(
            f"{yaml_path} can't be read as YAML ({error}). docs/own_data.md shows what it holds."
        ) from error


def _mapping(where: str, value: object) -> dict[Any, Any]:
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{where} is {value!r:.60}; it must be keys with values")
    return value


def _text(where: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where} is {value!r:.60}; it must be a text (put it in quotes)")
    return value


def _check_keys(
    where: str, found: Mapping[Any, Any], required: Collection[str], optional: Collection[str] = ()
) -> None:
    for key in found:
        if key not in required and key not in optional:
            raise ValueError(f"{where} has the key {key!r}{_meant(key, (*required, *optional))}")
    missing = [key for key in required if key not in found]
    if missing:
        raise ValueError(f"{where} lacks {' and '.join(missing)}")


def _meant(word: object, known: Collection[str]) -> str:
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; {near[0]} is meant?" if near else f"; it must be one of {', '.join(known)}"


def _path(root: Path, where: str, name: str, is_there: Callable[[Path], bool]) -> Path:
    path = root / name
    if not stays_inside(name) or not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(
            f"{where} is {name!r}, which leads out of {root}. Put all data below one folder, and give that as --src"
        )
    if not is_there(path):
        raise ValueError(f"{where} is {name!r}, but {path} is no {'file' if is_there == Path.is_file else 'folder'}")
    return path


def _refuse_links_out(folder: Path, root: Path) -> None:
    inside = root.resolve()
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise ValueError(
                    f"{path} is a link out of {root}. Put all data below one folder, and give that as --src"
                )
