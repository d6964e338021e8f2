"""Reading vocabularies, the ones that ship, and the rules by which names are compared."""

import os
from collections import Counter
from pathlib import Path

import pytest

from osm_lightning.datasets import DATASETS
from osm_lightning.vocabulary import Vocabulary, load_vocabulary, naive_forms, normalise, shipped_vocabularies

NUM_CLASSES = {
    "a847": 847,
    "ade20k": 150,
    "cityscapes": 19,
    "coco": 133,
    "lvis": 1203,
    "partimagenet_part": 40,
    "partimagenet_whole": 158,
    "pascal_part": 269,
    "pc459": 459,
    "v3det": 13204,
}


def written(folder: Path, text: str, encoding: str = "utf-8") -> str:
    path = folder / "own.tsv"
    path.write_bytes(text.encode(encoding))
    return str(path)


def shared_names(vocabulary: Vocabulary) -> set[str]:
    owners = Counter(name for entry in vocabulary for name in set(entry.names))
    return {name for name, count in owners.items() if count > 1}


def test_every_vocabulary_that_ships_is_expected() -> None:
    assert shipped_vocabularies() == sorted(NUM_CLASSES)


@pytest.mark.parametrize("key", NUM_CLASSES)
def test_shipped_vocabulary(key: str) -> None:
    vocabulary = load_vocabulary(key)
    assert vocabulary.key == key
    assert len(vocabulary) == len(vocabulary.by_id) == NUM_CLASSES[key]
    for entry in vocabulary:
        assert entry.id >= 0  # negative ids mean something else in a batch
        assert len(set(entry.names)) == len(entry.names)
        assert all(name == normalise(name) != "" for name in entry.names)
        assert "" not in vocabulary.accepted[entry.id], f"an empty answer would be right for class {entry.id}"


@pytest.mark.parametrize(
    ("key", "class_id", "kind", "first"),
    [
        ("coco", 1, "thing", "person"),
        ("coco", 90, "thing", "toothbrush"),
        ("ade20k", 0, "stuff", "wall"),
        ("cityscapes", 7, "stuff", "road"),
        ("a847", 0, "any", "wall"),
        ("pc459", 430, "any", "unknown"),
    ],
)
def test_ids_are_the_datasets_own(key: str, class_id: int, kind: str, first: str) -> None:
    entry = load_vocabulary(key).by_id[class_id]
    assert (entry.kind, entry.names[0]) == (kind, first)


def test_every_dataset_has_its_vocabulary() -> None:
    for dataset in DATASETS.values():
        assert dataset.vocabulary in NUM_CLASSES


def test_45_names_belong_to_several_classes_of_a847() -> None:
    vocabulary = load_vocabulary("a847")
    shared = shared_names(vocabulary)
    assert len(shared) == 45
    for name in shared:
        assert sum(vocabulary.is_right(name, entry.id) for entry in vocabulary) >= 2


@pytest.mark.parametrize("key", ["coco", "ade20k", "cityscapes", "lvis"])
def test_names_of_other_joint_datasets_are_unambiguous(key: str) -> None:
    assert shared_names(load_vocabulary(key)) == set()


@pytest.mark.skipif("OSM_SHARED_DATA" not in os.environ, reason="needs OSM_SHARED_DATA, the folder of shared data")
@pytest.mark.parametrize("key", NUM_CLASSES)
def test_shipped_vocabulary_equals_the_shared_class_list(key: str) -> None:
    shared = Path(os.environ["OSM_SHARED_DATA"]) / "vocabularies" / f"{key}.tsv"
    assert load_vocabulary(str(shared)) == load_vocabulary(key)


@pytest.mark.parametrize(
    ("name", "forms"),
    [
        ("cat", {"cat", "cats", "cates"}),
        ("Cat", {"cat", "cats", "cates"}),
        ("puppy", {"puppy", "puppys", "puppyes", "puppies"}),
        ("leaf", {"leaf", "leafs", "leafes", "leaves"}),
        ("knife", {"knife", "knifes", "knifees", "knives"}),
        ("bus", {"bus", "buss", "buses", "bu"}),
        ("boxes", {"boxes", "boxess", "boxeses", "boxe", "box"}),
        ("puppies", {"puppies", "puppiess", "puppieses", "puppie", "puppi", "puppy"}),
        ("leaves", {"leaves", "leavess", "leaveses", "leave", "leav", "leaf", "leafe"}),
        ("traffic light", {"traffic light", "traffic lights", "traffic lightes"}),
    ],
)
def test_naive_forms(name: str, forms: set[str]) -> None:
    assert set(naive_forms([name])) == forms


def test_questions_about_a_name(tmp_path: Path) -> None:
    vocabulary = load_vocabulary(written(tmp_path, "id\tkind\tnames\n4\tthing\tCat|kitten\n9\tstuff\tgrass\n"))
    assert vocabulary.names == {"cat", "kitten", "grass"}
    assert 4 in vocabulary
    assert 5 not in vocabulary
    assert [entry.id for entry in vocabulary] == [4, 9]
    assert vocabulary.is_right(" KITTENS ", 4)
    assert not vocabulary.is_right("kitten", 9)
    assert vocabulary.is_first_name("cat", 4)
    assert not vocabulary.is_first_name("kitten", 4)
    assert vocabulary.knows("Kitten")
    assert not vocabulary.knows("kittens")


def test_own_file_may_have_more_columns_and_any_order(tmp_path: Path) -> None:
    text = 'names\tcomment\tid\tkind\n"quoted" name| two \t"\t0\tany\n'
    vocabulary = load_vocabulary(written(tmp_path, text))
    assert vocabulary.key == "own"
    assert vocabulary.by_id[0].names == ('"quoted" name', "two")


def test_byte_order_mark_is_no_part_of_the_header(tmp_path: Path) -> None:
    assert len(load_vocabulary(written(tmp_path, "id\tkind\tnames\n1\tany\tcat\n", "utf-8-sig"))) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"own: the header lacks \['id', 'kind', 'names'\]"),
        ("id\tnames\n1\tcat\n", r"own: the header lacks \['kind'\]"),
        ("id,kind,names\n1,any,cat\n", "own: the header lacks"),
        ("id\tkind\tnames\n", "own: no class"),
        ("id\tkind\tnames\none\tany\tcat\n", "own: 1 broken rows .*line 2: id 'one' is not a whole number"),
        ("id\tkind\tnames\n1.0\tany\tcat\n", "id '1.0' is not a whole number"),
        ("id\tkind\tnames\n²\tany\tcat\n", "id '²' is not a whole number"),
        ("id\tkind\tnames\n--1\tany\tcat\n", "id '--1' is not a whole number"),
        ("id\tkind\tnames\n-1\tany\tcat\n", "id '-1' is not a whole number"),
        ("id\tkind\tnames\n1\tany\tcat\n1\tany\tdog\n", "line 3: id 1 stands twice"),
        ("id\tkind\tnames\n1\tanimal\tcat\n", "line 2: kind 'animal' is not one of thing, stuff, any"),
        ("id\tkind\tnames\n1\tany\t | \n", "line 2: class 1 has no name"),
        ("id\tkind\tnames\n1\tany\n", "line 2: class 1 has no name"),
        ("id\tkind\tnames\n1\n", "line 2: kind None"),
    ],
)
def test_broken_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_vocabulary(written(tmp_path, text))


def test_all_broken_rows_are_counted_and_five_shown(tmp_path: Path) -> None:
    rows = "".join(f"x{row}\tany\tcat\n" for row in range(8))
    with pytest.raises(ValueError, match="8 broken rows") as caught:
        load_vocabulary(written(tmp_path, f"id\tkind\tnames\n{rows}"))
    assert [f"'x{row}'" in str(caught.value) for row in range(8)] == [True] * 5 + [False] * 3


def test_file_that_is_not_utf8_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"own\.tsv is not UTF-8"):
        load_vocabulary(written(tmp_path, "id\tkind\tnames\n1\tany\tcafé\n", "latin-1"))


def test_unknown_key_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"vocabulary 'cocoo' .*a847, ade20k, .*TSV"):
        load_vocabulary("cocoo")
