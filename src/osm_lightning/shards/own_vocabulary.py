"""The classes of a dataset of your own, made from what its annotations say, and their file in the shard folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from osm_lightning.shard_index import INDEX_FILE
from osm_lightning.shards.coco_json import MALFORMED, read_categories
from osm_lightning.shards.names import spoken
from osm_lightning.shards.source import Findings
from osm_lightning.vocabulary import Class, Kind, Vocabulary, load_vocabulary
from osm_lightning.whole_file import write_whole

VOCABULARY_FILE = "vocabulary.tsv"
"""Name in the shard folder, whatever it is called where it comes from."""
_KINDS: dict[object, Kind] = {0: "stuff", 1: "thing"}


def from_categories(json_path: Path) -> Vocabulary:
    """Classes from the `categories` of a COCO JSON: `id`, `name`, and where they are there `synonyms` and `isthing`.

    Raises:
        ValueError: the JSON can't be read, or its categories are not such a list.
    """
    try:
        classes = [
            Class(
                id=row["id"],
                kind=_KINDS.get(row.get("isthing"), "any"),
                names=tuple(dict.fromkeys(map(spoken, (row["name"], *row.get("synonyms", ()))))),
            )
            for row in read_categories(json_path)
        ]
    except MALFORMED as error:
        raise ValueError(
            f"{json_path}: its categories can't be read ({type(error).__name__}: {error}). Each needs an id and a name."
        ) from error
    return _checked(classes, json_path)


def from_names(names: Sequence[str], source: Path) -> Vocabulary:
    """Classes from a list of names, numbered from 0.

    Raises:
        ValueError: a name is empty, stands twice, or can't be written; the message names `source`.
    """
    return _checked([Class(number, "any", (spoken(name),)) for number, name in enumerate(names)], source)


def from_file(path: Path) -> Vocabulary:
    """Classes from a TSV (`vocabulary.py`), or from a text file with a name on each line, numbered from 0.

    Raises:
        ValueError: the file is missing or broken.
    """
    if path.suffix != ".txt":
        return load_vocabulary(str(path))
    try:
        return from_names(path.read_text(encoding="utf-8-sig").splitlines(), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} can't be read ({error}). It must be a text in UTF-8 with a class on each line."
        ) from error


def to_tsv(vocabulary: Vocabulary) -> str:
    """Text of a file that `load_vocabulary` reads."""
    rows = (f"{entry.id}\t{entry.kind}\t{'|'.join(entry.names)}\n" for entry in vocabulary)
    return "".join(("id\tkind\tnames\n", *rows))


def write_vocabulary(vocabulary: Vocabulary, out_dir: Path) -> None:
    """Puts a vocabulary into a shard folder, which is made where it does not exist.

    Raises:
        ValueError: the folder holds shards whose classes are others.
    """
    path, text = out_dir / VOCABULARY_FILE, to_tsv(vocabulary)
    if path.exists():
        if path.read_text(encoding="utf-8") == text:
            return
        if (out_dir / INDEX_FILE).exists():
            raise ValueError(
                f"{path} holds other classes than {vocabulary.key}, and the shards beside it are numbered by them. All "
                "splits of a folder share one vocabulary: name a TSV in the YAML, and build all splits in a new folder."
            )
    out_dir.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def _checked(classes: Iterable[Class], source: Path) -> Vocabulary:
    problems = Findings()
    by_id: dict[int, Class] = {}
    id_of_name: dict[str, int] = {}
    for entry in classes:
        if not isinstance(entry.id, int) or isinstance(entry.id, bool) or entry.id < 0:
            problems.add("ids that are not whole numbers from 0", repr(entry.id))
            continue
        if entry.id in by_id:
            problems.add("ids that stand twice", str(entry.id))
        if entry.names[0] in id_of_name:
            problems.add("names of two classes", f"{entry.names[0]} of {id_of_name[entry.names[0]]} and {entry.id}")
        for name in entry.names:
            if not name or "|" in name or not name.isprintable():
                problems.add("names that are empty, or hold | or a control character", f"{name!r} of {entry.id}")
        by_id[entry.id] = entry
        id_of_name[entry.names[0]] = entry.id
    if problems.counts or not by_id:
        lines = "; ".join(problems.lines()) or "there is none"
        raise ValueError(f"{source}: its classes can't be a vocabulary ({lines}). Mend them, or name a TSV instead.")
    return Vocabulary(source.stem, tuple(by_id.values()))
