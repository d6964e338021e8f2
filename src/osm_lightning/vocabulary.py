"""A set of classes and their names: reading one, and deciding whether a generated name is right.

The rules of matching are the released protocol's (`docs/evaluation.md`). Turning a name from outside the vocabulary
into a class is another matter and lives in `evaluation/`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Literal, cast, get_args

Kind = Literal["thing", "stuff", "any"]


@dataclass(frozen=True, slots=True)
class Class:
    """One class: its id in the dataset's annotations, its kind, and its names, of which the first is trained on."""

    id: int
    kind: Kind
    names: tuple[str, ...]


@dataclass(frozen=True)
class Vocabulary:
    """The classes of one dataset, in the order of their file."""

    key: str
    classes: tuple[Class, ...]

    @cached_property
    def by_id(self) -> dict[int, Class]:
        """From class id to class."""
        return {entry.id: entry for entry in self.classes}

    @cached_property
    def names(self) -> frozenset[str]:
        """All names of all classes, lower case; what NIV is measured against."""
        return frozenset(name.lower() for entry in self.classes for name in entry.names)

    @cached_property
    def accepted(self) -> dict[int, frozenset[str]]:
        """From class id to every text that counts as right: its names and their naive plurals and singulars."""
        return {entry.id: frozenset(naive_forms(entry.names)) for entry in self.classes}

    def __len__(self) -> int:
        return len(self.classes)

    def __iter__(self) -> Iterator[Class]:
        return iter(self.classes)

    def __contains__(self, class_id: object) -> bool:
        return class_id in self.by_id

    def is_right(self, prediction: str, class_id: int) -> bool:
        """Whether a name is one of the class's names, or a naive plural or singular of one (released protocol)."""
        return normalise(prediction) in self.accepted[class_id]

    def is_first_name(self, prediction: str, class_id: int) -> bool:
        """Whether a name is the very one that the class is trained on; no synonym, no plural."""
        return normalise(prediction) == self.by_id[class_id].names[0].lower()

    def knows(self, prediction: str) -> bool:
        """Whether a name is any class's name, without plurals; a prediction that is not counts as NIV."""
        return normalise(prediction) in self.names


def normalise(name: str) -> str:
    """Lower case, no white space around: how names are compared."""
    return name.strip().lower()


def naive_forms(names: Iterable[str]) -> Iterator[str]:
    """The names, lower case, with the plurals and singulars of the released protocol.

    The rules look at letters only, so that "bus" also yields "bu" and "buss": they are kept as they are, because
    scores are compared with published ones.
    """
    for raw in names:
        name = raw.lower()
        yield name
        yield name + "s"
        yield name + "es"
        for ending, replacement in (("y", "ies"), ("f", "ves"), ("fe", "ves")):
            if name.endswith(ending):
                yield name[: -len(ending)] + replacement
        for ending, replacement in (("s", ""), ("es", ""), ("ies", "y"), ("ves", "f"), ("ves", "fe")):
            if name.endswith(ending):
                yield name[: -len(ending)] + replacement


def shipped_vocabularies() -> list[str]:
    """Keys of the vocabularies that come with the package."""
    folder = files("osm_lightning") / "vocabularies"
    return sorted(entry.name.removesuffix(".tsv") for entry in folder.iterdir() if entry.name.endswith(".tsv"))


def load_vocabulary(source: str) -> Vocabulary:
    """Reads a vocabulary by the key of a shipped one, or from a TSV file.

    The file has a header with at least the columns `id`, `kind` and `names` (names separated by `|`).

    Raises:
        ValueError: no such vocabulary or file, or a row that breaks the format; every broken row is counted and up to
            five are shown.
    """
    shipped = files("osm_lightning") / "vocabularies" / f"{source}.tsv"
    if "/" not in source and shipped.is_file():
        return _parse(source, shipped.read_text(encoding="utf-8"))
    path = Path(source)
    if not path.is_file():
        raise ValueError(
            f"vocabulary {source!r} is neither a file nor one of those that come with the package "
            f"({', '.join(shipped_vocabularies())}). Give the path of a TSV with the columns id, kind, names."
        )
    try:
        return _parse(path.stem, path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"vocabulary {source} is not UTF-8 text ({error}). Save it as UTF-8.") from error


def _parse(key: str, text: str) -> Vocabulary:
    rows = csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    missing = {"id", "kind", "names"} - set(rows.fieldnames or ())
    if missing:
        raise ValueError(f"vocabulary {key}: the header lacks {sorted(missing)}; it must have id, kind and names.")
    classes: dict[int, Class] = {}
    problems = []
    for line, row in enumerate(rows, start=2):
        names = tuple(name.strip() for name in (row["names"] or "").split("|") if name.strip())
        if not (row["id"] or "").isdecimal():  # no sign: -1 is batch.FREE_TEXT
            problems.append(f"line {line}: id {row['id']!r} is not a whole number from 0")
        elif int(row["id"]) in classes:
            problems.append(f"line {line}: id {row['id']} stands twice")
        elif row["kind"] not in get_args(Kind):
            problems.append(f"line {line}: kind {row['kind']!r} is not one of {', '.join(get_args(Kind))}")
        elif not names:
            problems.append(f"line {line}: class {row['id']} has no name")
        else:
            classes[int(row["id"])] = Class(int(row["id"]), cast("Kind", row["kind"]), names)
    if problems:
        shown = "; ".join(problems[:5])
        raise ValueError(f"vocabulary {key}: {len(problems)} broken rows ({shown}). Mend them and try again.")
    if not classes:
        raise ValueError(f"vocabulary {key}: no class follows the header. Add a row for each class.")
    return Vocabulary(key, tuple(classes.values()))
