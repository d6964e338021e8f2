"""`osm shards inspect`: counts are those of the data, pictures show them, and contradicting names are found."""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from osm_lightning.commands import shards_inspect
from osm_lightning.record import Record, Segment, encode
from osm_lightning.shard_index import ShardIndex, ShardInfo, SplitInfo, read_index, write_index
from osm_lightning.shards.inspect import (
    Sizes,
    count_classes,
    draw_histograms,
    histograms,
    measure,
    open_splits,
)
from osm_lightning.shards.label_conflicts import Conflict, Labels, Use, compare, shared_names
from osm_lightning.vocabulary import Class, Vocabulary, load_vocabulary

SCENES = Path(__file__).parents[2] / "data_shards" / "scenes"


def segment(number: int, area_px: int, class_id: int | None = 1, **facts) -> Segment:
    return Segment(f"s{number}", class_id, area_px=area_px, **facts)


def record(key: str, *segments: Segment, size_px: tuple[int, int] = (100, 50)) -> Record:
    """No pixel of it can be decoded: whatever counts must not need them."""
    return Record(key, b"no image", "jpg", size_px[1], size_px[0], segments, b"no map" if segments else None)


def write_folder(folder: Path, records: Sequence[Record], split="train", dataset="mine", vocabulary="coco") -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{split}-00000.tar"
    with tarfile.open(path, "w") as tar:
        for entry in records:
            for ending, data in encode(entry).items():
                member = tarfile.TarInfo(f"{entry.key}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    masks = [s for entry in records for s in entry.segments if not s.iscrowd and s.area_px > 0]
    per_class = {s.class_id: sum(m.class_id == s.class_id for m in masks) for s in masks if s.class_id is not None}
    data = path.read_bytes()
    info = ShardInfo(path.name, hashlib.sha256(data).hexdigest(), len(data), len(records), len(masks))
    others = read_index(folder).splits if (folder / "index.json").exists() else {}
    write_index(folder, ShardIndex(dataset, vocabulary, {**others, split: SplitInfo((info,), per_class)}))
    return folder


def run(*folders: Path, out: Path | None = None, split: str | None = None) -> int:
    return shards_inspect.run(argparse.Namespace(folders=list(folders), out=out, split=split))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


RECORDS = [
    record("a", segment(0, 50), segment(1, 500, 3), segment(2, 0), segment(3, 900, 1, iscrowd=True)),
    record("b", segment(0, 1, 1), segment(1, 9, 999), segment(2, 7, None, name="free"), size_px=(10, 10)),
    record("c"),
]


def test_sizes_are_those_of_masks_and_need_no_pixels(tmp_path):
    (split,) = open_splits(write_folder(tmp_path, RECORDS), None)
    seen: list[None] = []
    sizes = measure(split, lambda: seen.append(None))
    assert sizes.area_px_M.tolist() == [50, 500, 1, 9, 7]
    np.testing.assert_allclose(sizes.share_M, [0.01, 0.1, 0.01, 0.09, 0.07])
    assert sizes.masks_I.tolist() == [2, 3, 0]
    assert sizes.free_text == {"free": 1}
    assert len(seen) == 3


def test_classes_from_most_masks_to_none(tmp_path):
    (split,) = open_splits(write_folder(tmp_path, RECORDS), None)
    counts = [
        (count.class_id, count.name, count.num_masks) for count in count_classes(split, measure(split, int).free_text)
    ]
    assert counts[:4] == [
        (1, "person", 2),
        (3, "car", 1),
        (None, "free", 1),
        (999, "not in the vocabulary", 1),
    ]
    assert len(counts) == len(load_vocabulary("coco")) + 2
    assert {num_masks for _, _, num_masks in counts[4:]} == {0}


def test_what_ships_measures_as_its_index_says():
    for split in open_splits(SCENES, None):
        sizes = measure(split, int)
        assert sizes.masks_I.sum() == sizes.area_px_M.size == split.info.num_masks
        assert sizes.masks_I.size == split.info.num_samples
        assert sum(count.num_masks for count in count_classes(split, sizes.free_text)) == split.info.num_masks


def sizes_of(area_px: Sequence[int], share: Sequence[float], masks: Sequence[int]) -> Sizes:
    return Sizes(np.array(area_px, np.int64), np.array(share, np.float64), np.array(masks, np.int64), {})


def test_ranges_begin_at_their_first_number():
    sizes = sizes_of([9, 10, 29, 30, 300_000, 10**9], [0.0, 0.0099, 0.01, 1.0], [0, 1, 2, 3, 4, 5, 64, 65, 65_000])
    share, area, masks = ({r: n for r, n in zip(h.ranges, h.counts_B, strict=True) if n} for h in histograms(sizes))
    assert share == {"under 0.001": 1, "0.3-1": 1, "1-3": 1, "30 or more": 1}
    assert area == {"under 10": 1, "10-30": 2, "30-100": 1, "300k or more": 2}
    assert masks == {"0": 1, "1": 1, "2": 1, "3-4": 2, "5-8": 1, "33-64": 1, "65 or more": 2}


def test_the_longer_bar_has_the_higher_count():
    panels = histograms(sizes_of([10] * 30 + [100] * 90 + [1_000] * 60, [0.5], [1]))
    picture = np.asarray(draw_histograms("title", panels[1:2]))
    bars = (picture == (0x4C, 0x78, 0xA8)).all(axis=2).sum(axis=0)
    heights = sorted(set(bars[bars > 20].tolist()))
    assert len(heights) == 3
    np.testing.assert_allclose(heights, [heights[2] / 3, heights[2] * 2 / 3, heights[2]], atol=2)
    assert heights[2] > 150


@pytest.mark.parametrize("num", [0, 1, 7, 1_270_141])
def test_pictures_of_any_counts_have_one_panel_each(num):
    panels = histograms(sizes_of([50] * min(num, 1), [0.5] * min(num, 1), [num] * min(num, 1)))
    one, three = draw_histograms("title", panels[:1]), draw_histograms("title", panels)
    assert isinstance(three, Image.Image)
    assert three.mode == "RGB"
    assert three.height > 2 * one.height


A = Vocabulary("a", (Class(1, "thing", ("tv", "Television")), Class(2, "any", ("cat",)), Class(3, "any", ("sofa",))))
B = Vocabulary("b", (Class(7, "any", ("television ", "tv", "set")), Class(8, "any", ("cat", "kitten"))))
C = Vocabulary("c", (Class(0, "any", ("kitten",)), Class(5, "any", ("monitor", "tv"))))
LABELS = [Labels("a", A, {1: 10, 2: 5}), Labels("b", B, {7: 4}), Labels("c", C, {0: 6, 5: 1})]
TV = {
    "a": Use("a", 1, "tv", 10),
    "b": Use("b", 7, "television", 4),
    "c": Use("c", 5, "monitor", 1),
}


def test_shared_names_contradictions_first():
    shared = shared_names(LABELS)
    assert [(entry.name, entry.num_masks, bool(entry.opposites)) for entry in shared] == [
        ("tv", 15, True),
        ("television", 14, True),
        ("kitten", 6, True),
        ("cat", 5, False),
    ]
    assert shared[0].uses == (TV["a"], TV["b"], TV["c"])


def test_one_meaning_with_two_first_names():
    ab, ac, bc = compare(shared_names(LABELS), ["a", "b", "c"])
    assert (ab.left, ab.right, ab.num_shared_names, ab.num_same_first_names) == ("a", "b", 3, 1)
    assert ab.conflicts == (Conflict(TV["a"], TV["b"], ("television", "tv")),)
    assert ab.num_masks_in_conflict == (10, 4)
    assert ac.conflicts == (Conflict(TV["a"], TV["c"], ("tv",)),)
    assert [conflict.names for conflict in bc.conflicts] == [("tv",), ("kitten",)]  # 1 and 4 masks before 0 and 6
    assert bc.num_masks_in_conflict == (4, 7)


def test_a_class_in_several_conflicts_counts_once():
    two = Vocabulary("two", (Class(0, "any", ("a", "x")), Class(1, "any", ("b", "x"))))
    one = Vocabulary("one", (Class(5, "any", ("x",)),))
    (pair,) = compare(shared_names([Labels("two", two, {0: 1, 1: 2}), Labels("one", one, {5: 9})]), ["two", "one"])
    assert len(pair.conflicts) == 2
    assert pair.num_masks_in_conflict == (3, 9)


def test_names_within_one_vocabulary_are_no_conflict():
    twice = Vocabulary("a", (Class(0, "any", ("x", "y")), Class(1, "any", ("y",))))
    assert shared_names([Labels("a", twice, {})]) == []


def test_the_conflicts_of_the_shipped_vocabularies():
    labels = [Labels(key, load_vocabulary(key), {}) for key in ("coco", "ade20k")]
    (pair,) = compare(shared_names(labels), ["coco", "ade20k"])
    names = {(conflict.left.first_name, conflict.right.first_name) for conflict in pair.conflicts}
    assert ("tv", "television receiver") in names
    assert not any(left == right for left, right in names)


def test_everything_is_printed_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    other = tmp_path / "other"
    write_folder(other, [record("x", segment(0, 5, 64))], vocabulary="classes.tsv")
    (other / "classes.tsv").write_text("id\tkind\tnames\n64\tany\t[red]screen[/]|tv\n5\tany\tplane\n")
    folders = [write_folder(tmp_path / "first", RECORDS), other]
    write_folder(folders[0], [record("y", segment(0, 1, 72))], split="val")
    assert run(*folders, out=tmp_path / "out") == 0
    printed = capsys.readouterr().out
    for text in ("first", "other", "2 of 133", "never seen: airplane", "[red]screen[/] (1)", "tv (1)", "median 9 px"):
        assert text in printed
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    tables = ["classes.tsv", "label_conflicts.tsv", "shared_names.tsv"]
    assert files == [*tables, "sizes-first-train.png", "sizes-first-val.png", "sizes-other-train.png", "sizes.tsv"]
    assert {
        "split": "train",
        "folder": "first",
        "class_id": "1",
        "kind": "thing",
        "name": "person",
        "masks": "2",
    } in rows(tmp_path / "out" / "classes.tsv")
    conflicts = rows(tmp_path / "out" / "label_conflicts.tsv")
    assert [(row["left_first_name"], row["right_first_name"], row["names_in_common"]) for row in conflicts] == [
        ("tv", "[red]screen[/]", "tv")
    ]
    sizes = rows(tmp_path / "out" / "sizes.tsv")
    assert sum(int(row["count"]) for row in sizes if row["folder"] == "first" and "absolute" in row["histogram"]) == 6
    with Image.open(tmp_path / "out" / "sizes-first-train.png") as picture:
        picture.load()


def test_one_folder_has_no_conflicts(tmp_path, capsys):
    assert run(write_folder(tmp_path / "first", RECORDS), out=tmp_path / "out") == 0
    assert "vocabularies" not in capsys.readouterr().out
    assert not (tmp_path / "out" / "label_conflicts.tsv").exists()


def test_free_text_without_a_vocabulary(tmp_path, capsys):
    named = record("x", segment(0, 5, None, name="a thing"), segment(1, 5, None, name="bad\x1b[2J"))
    assert run(write_folder(tmp_path / "free", [named], vocabulary=None)) == 0
    printed = capsys.readouterr().out
    assert "a thing" in printed
    assert "\x1b[2J" not in printed


def test_what_cannot_be_inspected(tmp_path):
    folder = write_folder(tmp_path / "set", RECORDS)
    with pytest.raises(ValueError, match="no split called val; it has train"):
        run(folder, split="val")
    with pytest.raises(ValueError, match="two folders are called 'set'"):
        run(folder, folder)
    with pytest.raises(ValueError, match=r"no readable index\.json"):
        run(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--out .* cannot be written"):
        run(folder, out=tmp_path / "file" / "out")
    path = folder / "train-00000.tar"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ValueError, match=r"train-00000\.tar cannot be read"):
        run(folder)
    write_index(folder, ShardIndex("mine", "coco", {}))
    with pytest.raises(ValueError, match="no split; it has none"):
        run(folder)
