"""The set that ships: is it whole, is it what its card says, and does its builder do what it promises?"""

from __future__ import annotations

import csv
import hashlib
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from osm_lightning import record as records
from osm_lightning.record import Record
from osm_lightning.shard_index import ShardIndex, read_index
from osm_lightning.vocabulary import Vocabulary, load_vocabulary

DATA_SHARDS = Path(__file__).parents[1] / "data_shards"
SCENES = DATA_SHARDS / "scenes"
LEAST_MASKS = {"train": 8, "val": 3}


@pytest.fixture(scope="module")
def index() -> ShardIndex:
    return read_index(SCENES)


@pytest.fixture(scope="module")
def vocabulary(index: ShardIndex) -> Vocabulary:
    assert index.vocabulary is not None
    return load_vocabulary(str(SCENES / index.vocabulary))


@pytest.fixture(scope="module")
def shards(index: ShardIndex) -> dict[str, list[Record]]:
    """The records of every shard file."""
    return {shard.file: read_shard(SCENES / shard.file) for split in index.splits.values() for shard in split.shards}


@pytest.fixture(scope="module")
def splits(index: ShardIndex, shards: dict[str, list[Record]]) -> dict[str, list[Record]]:
    return {name: [r for shard in split.shards for r in shards[shard.file]] for name, split in index.splits.items()}


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    sys.path.insert(0, str(DATA_SHARDS))
    try:
        import build_scenes
    finally:
        sys.path.remove(str(DATA_SHARDS))
    return build_scenes


def read_shard(path: Path) -> list[Record]:
    members: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for entry in tar:
            key, ending = entry.name.split(".", 1)
            file = tar.extractfile(entry)
            assert file is not None
            members.setdefault(key, {})[ending] = file.read()
    return [records.decode(key, files) for key, files in members.items()]


def test_shards_are_those_of_the_index(index: ShardIndex, shards: dict[str, list[Record]]) -> None:
    assert set(index.splits) == {"train", "val"}
    assert sorted(shards) == sorted(path.name for path in SCENES.glob("*.tar"))
    for split in index.splits.values():
        for shard in split.shards:
            data = (SCENES / shard.file).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
            assert len(shards[shard.file]) == shard.num_samples
            assert sum(len(record.segments) for record in shards[shard.file]) == shard.num_masks


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_class_has_masks(
    split: str, index: ShardIndex, splits: dict[str, list[Record]], vocabulary: Vocabulary
) -> None:
    counts = Counter(segment.class_id for record in splits[split] for segment in record.segments)
    assert set(counts) == set(vocabulary.by_id)
    assert len(counts) >= 150
    assert min(counts.values()) >= LEAST_MASKS[split]
    assert counts == index.splits[split].masks_per_class


@pytest.mark.parametrize("split", ["train", "val"])
def test_segments_are_their_pixels(split: str, splits: dict[str, list[Record]]) -> None:
    for record in splits[split]:
        segment_map = record.segment_map()
        assert segment_map is not None
        assert 1 < len(record.segments) < 10
        for position, segment in enumerate(record.segments):
            mask = record.mask(position, segment_map)
            assert mask.sum() == segment.area_px >= 400, record.key
            assert records.box_of(mask) == segment.bbox_xywh_px, record.key


def test_pictures_decode(splits: dict[str, list[Record]]) -> None:
    for record in [*splits["train"], *splits["val"]][::20]:
        assert np.asarray(record.image()).std() > 10, record.key  # something is painted


def test_val_shows_no_artist_of_train(splits: dict[str, list[Record]], builder: ModuleType) -> None:
    artists = {split: set[str]() for split in splits}
    for split, found in splits.items():
        for record in found:
            artists[split] |= {source.partition("/")[0] for source in record.source["drawings"]}
    assert artists == {split: set(sets) for split, (_, sets) in builder.SPLITS.items()}
    assert artists["train"].isdisjoint(artists["val"])


def test_segments_show_their_class(splits: dict[str, list[Record]]) -> None:
    lines = (SCENES / "vocabulary.tsv").read_text(encoding="utf-8").splitlines()
    rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    class_of = {name: int(row["id"]) for row in rows for name in row["drawings"].split("|")}
    for record in [*splits["train"], *splits["val"]]:
        shown = [class_of[source.partition("/")[2]] for source in record.source["drawings"]]
        assert shown == [segment.class_id for segment in record.segments], record.key


def test_no_name_stands_for_two_classes(vocabulary: Vocabulary) -> None:
    names = Counter(name for entry in vocabulary for name in entry.names)
    assert names.most_common(1)[0][1] == 1


def test_folder_is_small_and_says_whose_it_is(index: ShardIndex, builder: ModuleType) -> None:
    assert sum(path.stat().st_size for path in SCENES.rglob("*") if path.is_file()) <= 10_000_000
    attribution = (SCENES / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for _, sets in builder.SPLITS.values():
        for key in sets:
            package = sys.modules["scene_drawings"].PACKAGES[key]
            assert f"`{key}`" in attribution
            assert f"`{package.name}` {package.version}" in attribution


def test_card_gives_the_figures_of_the_index(index: ShardIndex, vocabulary: Vocabulary) -> None:
    card = (SCENES / "CARD.md").read_text(encoding="utf-8")
    for name, split in index.splits.items():
        least, most = min(split.masks_per_class.values()), max(split.masks_per_class.values())
        megabytes = sum(shard.bytes for shard in split.shards) / 1e6
        figures = (name, split.num_samples, f"{split.num_masks:,}", len(vocabulary), f"{least}-{most}")
        assert f"| {' | '.join(map(str, figures))} | {len(split.shards)} | {megabytes:.2f} MB |" in card


def toy_drawings(builder: ModuleType, sides_px: dict[int, int]) -> dict[int, list[object]]:
    """One plain square per class."""
    return {
        class_id: [
            builder.Drawing(class_id, f"toy/{class_id}", Image.new("RGBA", (side, side), (200, class_id, 0, 255)))
        ]
        for class_id, side in sides_px.items()
    }


def test_same_seed_same_bytes(builder: ModuleType) -> None:
    def members(seed: int) -> list[dict[str, bytes]]:
        drawings = toy_drawings(builder, dict.fromkeys(range(1, 12), 90))
        return [records.encode(r) for r in builder.scenes("toy", 3, drawings, np.random.default_rng(seed))]

    assert members(0) == members(0)
    assert members(0) != members(1)


def test_classes_take_turns(builder: ModuleType) -> None:
    drawings = toy_drawings(builder, dict.fromkeys(range(1, 6), 60))
    made = builder.scenes("toy", 10, drawings, np.random.default_rng(0))
    counts = Counter(segment.class_id for record in made for segment in record.segments)
    assert set(counts) == set(drawings)
    assert max(counts.values()) - min(counts.values()) <= 2


def test_enough_of_each_object_stays_visible(builder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares of one size, not tilted: what is visible of each can be said in pixels."""
    side = 190
    monkeypatch.setattr(builder, "MAX_TILT_DEGREES", 0.0)
    monkeypatch.setattr(builder, "OBJECT_SIDE_PX", (float(side), float(side)))
    drawings = [options[0] for options in toy_drawings(builder, dict.fromkeys(range(1, 10), side)).values()]
    hidden = 0
    for seed in range(5):
        scene = builder.compose(drawings, np.random.default_rng(seed))
        assert {*scene.placed, *scene.left_over} == set(drawings)
        visible_px = np.bincount(scene.segment_map.ravel())[1:]
        assert len(visible_px) == len(scene.placed) > 1
        assert visible_px.min() >= builder.MIN_VISIBLE_SHARE * side**2
        hidden += (visible_px < side**2).sum()
        for position, drawing in enumerate(scene.placed, start=1):
            pixels = np.asarray(scene.picture)[scene.segment_map == position]
            assert (pixels == (200, drawing.class_id, 0)).all()
    assert hidden > 0  # else nothing was tried


def test_object_without_room_waits(builder: ModuleType) -> None:
    """A drawing too slight to be seen at any size is left over, and leaves no trace in the map."""
    slight = builder.Drawing(1, "toy/slight", Image.new("RGBA", (300, 1), (255, 0, 0, 255)))
    square = toy_drawings(builder, {2: 100})[2][0]
    scene = builder.compose([slight, square], np.random.default_rng(0))
    assert scene.placed == (square,)
    assert scene.left_over == (slight,)
    assert set(np.unique(scene.segment_map)) == {0, 1}


def test_another_package_than_the_pinned_one_is_refused(builder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def pack(command: list[str], **_: object) -> None:
        (Path(command[-1]) / "other.tgz").write_bytes(b"not what was pinned")

    monkeypatch.setattr(subprocess, "run", pack)
    with pytest.raises(ValueError, match=r"@iconify-json/noto@1\.2\.9 has sha512 .* is pinned"):
        builder.read_drawings({1: ["cat"]}, ["noto"])
