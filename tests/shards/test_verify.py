"""`osm shards verify`: every fault is found, by its own name and no other, and a clean copy has what is good."""

from __future__ import annotations

import argparse
import hashlib
import io
import struct
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from osm_lightning.commands import shards_verify
from osm_lightning.record import Record, Segment, box_of, encode, encode_segment_map
from osm_lightning.rle import encode_rle
from osm_lightning.shard_index import ShardIndex, ShardInfo, SplitInfo, read_index, write_index
from osm_lightning.shard_tar import read_record, read_table
from osm_lightning.shards import verify as module
from osm_lightning.shards.inspect import open_splits
from osm_lightning.shards.verify import Verification, verify

HEIGHT, WIDTH = 20, 30
CLASSES = (1, 3, 18)
"""Of the shipped COCO vocabulary."""


def encoded(array: NDArray, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, form)
    return out.getvalue()


def noise(seed: int = 0, form: str = "PNG") -> bytes:
    return encoded(np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8), form)


def stripes(num: int = 3) -> NDArray[np.uint16]:
    """uint16[H, W], `num` segments of about equal area, row by row."""
    return (np.arange(HEIGHT * WIDTH) * num // (HEIGHT * WIDTH) + 1).astype(np.uint16).reshape(HEIGHT, WIDTH)


def good(key: str, num: int = 3, *, as_rle: bool = False) -> Record:
    segment_map = stripes(num)
    masks = [segment_map == number for number in range(1, num + 1)]
    segments = tuple(
        Segment(
            f"s{number}",
            CLASSES[number % 3],
            area_px=int(mask.sum()),
            bbox_xywh_px=box_of(mask),
            rle=encode_rle(mask) if as_rle else None,
        )
        for number, mask in enumerate(masks)
    )
    image = noise(sum(key.encode()))
    return Record(key, image, "png", HEIGHT, WIDTH, segments, None if as_rle else encode_segment_map(segment_map))


def with_segment(record: Record, place: int, **changes) -> Record:
    segments = list(record.segments)
    segments[place] = replace(segments[place], **changes)
    return replace(record, segments=tuple(segments))


def write_folder(folder: Path, shards: Sequence[Sequence[Record]], split="train", dataset="mine", vocabulary="coco"):
    """Writes shards as they are given, and the index that belongs to them."""
    folder.mkdir(exist_ok=True)
    infos = []
    for number, records in enumerate(shards):
        path = folder / f"{split}-{number:05d}.tar"
        with tarfile.open(path, "w") as tar:
            for record in records:
                for ending, data in encode(record).items():
                    member = tarfile.TarInfo(f"{record.key}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        masks = [s for record in records for s in record.segments if not s.iscrowd and s.area_px > 0]
        data = path.read_bytes()
        infos.append(ShardInfo(path.name, hashlib.sha256(data).hexdigest(), len(data), len(records), len(masks)))
    others = read_index(folder).splits if (folder / "index.json").exists() else {}
    write_index(folder, ShardIndex(dataset, vocabulary, {**others, split: SplitInfo(tuple(infos), {})}))
    return folder


def check(folder: Path, split: str | None = None, workers: int = 1) -> Verification:
    return verify(open_splits(folder, split), workers, lambda num: None)


def found(folder: Path, split: str | None = None) -> dict[str, int]:
    return dict(check(folder, split).findings.counts)


def run(folder: Path, *, fix: Path | None = None, split: str | None = None, workers: int = 1) -> int:
    return shards_verify.run(argparse.Namespace(folder=folder, split=split, fix=fix, workers=workers))


def records_of(folder: Path, split: str = "train") -> dict[str, Record]:
    paths = [folder / shard.file for shard in read_index(folder).splits[split].shards]
    return {entry.key: read_record(path, entry) for path in paths for entry in read_table(path)}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_nothing_is_wrong_with_a_sound_folder(tmp_path, capsys):
    crowd = with_segment(good("crowd"), 0, iscrowd=True, class_id=None)
    write_folder(tmp_path / "set", [[good("map"), good("rle", as_rle=True)], [good("many", num=300), crowd]])
    calls: list[int] = []
    assert not verify(open_splits(tmp_path / "set", None), 1, calls.append).findings.counts
    assert sum(calls) == 4
    assert run(tmp_path / "set") == 0
    assert "nothing is wrong in 4 images" in capsys.readouterr().out


BROKEN_RECORDS = {
    "JPEG that breaks off": (
        replace(good("x"), image_bytes=noise(form="JPEG")[:-150], image_ending="jpg"),
        {"images that cannot be decoded": 1},
    ),
    "image that is no image": (replace(good("x"), image_bytes=b"GIF89a"), {"images that cannot be decoded": 1}),
    "image of another size": (
        replace(good("x"), image_bytes=encoded(np.zeros((WIDTH, HEIGHT, 3), np.uint8))),
        {"images of another size than recorded": 1},
    ),
    "record of a bomb's size": (replace(good("x"), width_px=10**9), {"samples that cannot be read": 1}),
    "map in colours": (
        replace(good("x"), segment_map_png=encoded(np.zeros((HEIGHT, WIDTH, 3), np.uint8))),
        {"segment maps that do not fit": 1},
    ),
    "map of another size": (
        replace(good("x"), segment_map_png=encode_segment_map(stripes().T.copy())),
        {"segment maps that do not fit": 1},
    ),
    "map that points at no segment": (
        replace(good("x"), segment_map_png=encode_segment_map(stripes(4))),
        {"segment maps that do not fit": 1},
    ),
    "map that points at the wrong segments": (
        replace(good("x"), segment_map_png=encode_segment_map(np.maximum(stripes(4), 2) - 1)),
        {"segments of another area": 3, "segments with another box": 3},
    ),
    "16 bits cut to 8": (
        replace(good("x", 300), segment_map_png=encoded(stripes(300).astype(np.uint8))),
        {"segment maps cut from 16 bits to 8": 1},
    ),
    "16 bits clipped to 8": (
        replace(good("x", 300), segment_map_png=encoded(stripes(300).clip(0, 255).astype(np.uint8))),
        {"segment maps cut from 16 bits to 8": 1},
    ),
    "class that does not exist": (
        with_segment(good("x"), 1, class_id=12),
        {"segments of a class that the vocabulary lacks": 1},
    ),
    "two classes that do not exist": (
        with_segment(with_segment(good("x"), 0, class_id=0), 2, class_id=-1),
        {"segments of a class that the vocabulary lacks": 2},
    ),
    "neither class nor name": (with_segment(good("x"), 1, class_id=None), {"segments without class or name": 1}),
    "segment without pixels": (
        replace(good("x"), segments=(*good("x").segments, Segment("none", 1))),
        {"segments without pixels": 1},
    ),
    "RLE without pixels": (
        with_segment(good("x", as_rle=True), 1, rle=encode_rle(np.zeros((HEIGHT, WIDTH), bool)), area_px=0),
        {"segments without pixels": 1},
    ),
    "RLE that breaks off": (with_segment(good("x", as_rle=True), 1, rle="o"), {"segments with broken RLE": 1}),
    "RLE of another size": (
        with_segment(good("x", as_rle=True), 1, rle=encode_rle(np.ones((3, 3), bool))),
        {"segments with broken RLE": 1},
    ),
    "wrong area": (with_segment(good("x", as_rle=True), 1, area_px=7), {"segments of another area": 1}),
    "wrong box": (with_segment(good("x"), 1, bbox_xywh_px=(0, 0, 1, 1)), {"segments with another box": 1}),
    "ids that stand twice": (with_segment(good("x"), 1, id="s0"), {"samples that cannot be read": 1}),
}
MENDED = {
    "map that points at the wrong segments",
    "segment without pixels",
    "RLE without pixels",
    "wrong area",
    "wrong box",
}


@pytest.mark.parametrize("fault", BROKEN_RECORDS)
def test_a_broken_sample_is_found_and_never_copied_as_it_is(tmp_path, capsys, fault):
    broken, expected = BROKEN_RECORDS[fault]
    write_folder(tmp_path / "set", [[good("before"), broken, good("after")]])
    before = contents(tmp_path / "set")
    assert found(tmp_path / "set") == expected
    assert run(tmp_path / "set", fix=tmp_path / "clean") == 1
    out = capsys.readouterr().out
    assert next(iter(expected)) in out
    assert "sample x" in out
    assert f"samples {'mended' if fault in MENDED else 'left out'}: 1 (train-00000.tar, sample x)" in out
    assert contents(tmp_path / "set") == before
    assert found(tmp_path / "clean") == {}
    copied = records_of(tmp_path / "clean")
    assert set(copied) == ({"before", "x", "after"} if fault in MENDED else {"before", "after"})
    assert copied["before"] == good("before")


def test_a_bomb_is_not_decoded(tmp_path):
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    png = bytearray(noise())
    png[12:33] = header + struct.pack(">I", zlib.crc32(header))
    write_folder(tmp_path, [[replace(good("x"), image_bytes=bytes(png))]])
    findings = check(tmp_path).findings
    assert dict(findings.counts) == {"images that cannot be decoded": 1}
    assert "bomb" in findings.examples["images that cannot be decoded"][0]


def test_mending_drops_empty_segments_and_keeps_every_pixel_of_the_others(tmp_path):
    segments = good("x").segments
    holey = replace(good("x"), segments=(segments[0], Segment("none", 1, area_px=5), *segments[1:]))
    pixels = stripes() + (stripes() > 1)
    write_folder(tmp_path / "set", [[replace(holey, segment_map_png=encode_segment_map(pixels))]])
    assert found(tmp_path / "set") == {"segments without pixels": 1}
    run(tmp_path / "set", fix=tmp_path / "clean")
    mended = records_of(tmp_path / "clean")["x"]
    assert mended.segments == segments
    np.testing.assert_array_equal(mended.segment_map(), stripes())


def test_mending_measures_anew(tmp_path):
    wrong = with_segment(good("x"), 1, area_px=7, bbox_xywh_px=(1, 2, 3, 4))
    write_folder(tmp_path / "set", [[wrong]])
    run(tmp_path / "set", fix=tmp_path / "clean")
    assert records_of(tmp_path / "clean")["x"] == good("x")


def test_ignored_classes_are_no_fault(tmp_path):
    record = with_segment(good("x"), 1, class_id=65535)
    write_folder(tmp_path / "known", [[record]], dataset="pc459", vocabulary="pc459")
    write_folder(tmp_path / "other", [[record]], dataset="mine", vocabulary="pc459")
    assert found(tmp_path / "known") == {}
    assert found(tmp_path / "other") == {"segments of a class that the vocabulary lacks": 1}


def test_free_text_needs_a_name(tmp_path):
    record = replace(good("x"), segments=tuple(replace(s, class_id=None, name="a thing") for s in good("x").segments))
    write_folder(tmp_path, [[record, with_segment(replace(record, key="y"), 0, name=" ")]], vocabulary=None)
    assert found(tmp_path) == {"segments without class or name": 1}


def test_a_truncated_tar_gives_what_stands_before_the_cut(tmp_path, capsys):
    write_folder(tmp_path / "set", [[good("a"), good("b"), good("c")]])
    path = tmp_path / "set" / "train-00000.tar"
    last = read_table(path)[-1].members[0]
    path.write_bytes(path.read_bytes()[: last.offset + last.num_bytes // 2])
    assert found(tmp_path / "set") == {
        "shards of another size": 1,
        "shards that break off": 1,
        "samples that cannot be read": 1,
    }
    assert run(tmp_path / "set", fix=tmp_path / "clean") == 1
    assert "train: 2 of 3 images" in capsys.readouterr().out
    assert set(records_of(tmp_path / "clean")) == {"a", "b"}


def test_a_tar_that_ends_early_but_whole_is_miscounted(tmp_path):
    write_folder(tmp_path, [[good("a"), good("b")]])
    path = tmp_path / "train-00000.tar"
    path.write_bytes(path.read_bytes()[: read_table(path)[-1].members[0].offset - 512])
    assert found(tmp_path) == {"shards of another size": 1, "shards that index.json miscounts": 1}


def test_no_tar_at_all(tmp_path):
    write_folder(tmp_path, [[good("a")]])
    path = tmp_path / "train-00000.tar"
    path.write_bytes(b"x" * path.stat().st_size)
    assert found(tmp_path) == {"shards of another sha256 than index.json says": 1, "shards that break off": 1}


def test_a_flipped_byte(tmp_path):
    write_folder(tmp_path, [[good("a")]])
    path = tmp_path / "train-00000.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")  # of the padding, which no reader looks at
    assert found(tmp_path) == {"shards of another sha256 than index.json says": 1}


def test_missing_shards_and_unlisted_tars(tmp_path, capsys):
    folder = write_folder(tmp_path / "set", [[good("a")], [good("b")]])
    write_folder(folder, [[good("c")]], split="val")
    (folder / "train-00000.tar").rename(folder / "train-00007.tar")
    (folder / "other.tar").touch()
    assert found(folder) == {"shards that are missing": 1, "tars that index.json does not list": 2}
    assert found(folder, split="train") == {"shards that are missing": 1, "tars that index.json does not list": 1}
    assert found(folder, split="val") == {}
    run(folder, fix=tmp_path / "clean")
    out = capsys.readouterr().out
    assert "missing shards, left out: 1 (train-00000.tar with 1 samples)" in out
    assert "splits written: 2 (train: 1 of 2 images, val: 1 of 1 images)" in out
    assert set(records_of(tmp_path / "clean")) == {"b"}


@pytest.mark.parametrize("shards", [[[good("a"), good("b"), good("a")]], [[good("a"), good("b")], [good("a")]]])
def test_keys_that_stand_twice(tmp_path, shards):
    write_folder(tmp_path / "set", shards)
    assert found(tmp_path / "set") == {"sample keys that stand twice in a split": 1}
    assert run(tmp_path / "set", fix=tmp_path / "clean") == 1
    assert list(records_of(tmp_path / "clean")) == ["a", "b"]


def test_equal_keys_next_to_each_other_are_two_samples(tmp_path):
    write_folder(tmp_path, [[good("a"), good("a")]])
    assert found(tmp_path) == {"sample keys that stand twice in a split": 1}


def test_a_key_may_stand_in_two_splits(tmp_path):
    write_folder(tmp_path, [[good("a")]])
    write_folder(tmp_path, [[good("a")]], split="val")
    assert found(tmp_path) == {}


def test_the_index_miscounts_masks(tmp_path):
    write_folder(tmp_path, [[good("a")]])
    index = read_index(tmp_path)
    shard = replace(index.splits["train"].shards[0], num_masks=2)
    write_index(tmp_path, replace(index, splits={"train": SplitInfo((shard,), {})}))
    assert found(tmp_path) == {"shards that index.json miscounts": 1}


def test_a_member_larger_than_any_sample_ends_the_reading(tmp_path, monkeypatch):
    write_folder(tmp_path, [[good("a")]])
    monkeypatch.setattr(module, "MAX_MEMBER_BYTES", 10)
    assert found(tmp_path) == {"shards that break off": 1}


def test_processes_find_the_same(tmp_path):
    broken = [record for record, _ in BROKEN_RECORDS.values()]
    write_folder(tmp_path, [[good("a")], *([replace(r, key=f"x{i}")] for i, r in enumerate(broken[:4])), [good("a")]])
    alone, together = check(tmp_path), check(tmp_path, workers=2)
    assert together == alone
    assert alone.findings.counts.total() > 4


def test_whatever_bytes_change_it_is_found_and_nothing_is_raised(tmp_path):
    write_folder(tmp_path, [[good("a"), good("b", as_rle=True)]])
    path = tmp_path / "train-00000.tar"
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        changed = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 30)):
            changed[place] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        assert found(tmp_path)["shards of another sha256 than index.json says"] == 1


def test_what_a_library_raises_is_the_samples_fault(tmp_path, monkeypatch):
    def trips(data, name):
        raise struct.error("unpack requires a buffer of 4 bytes")

    write_folder(tmp_path, [[good("a")]])
    monkeypatch.setattr(module, "decode_image", trips)
    verification = check(tmp_path)
    assert dict(verification.findings.counts) == {"samples that cannot be decoded": 1}
    assert verification.shards["train"][0].usable == {}


def test_five_examples_with_their_keys_and_no_control_characters(tmp_path, capsys):
    wrong = [with_segment(good(f"k{i}"), 0, area_px=1, id="\x1b[31m" + "z" * 1000) for i in range(7)]
    write_folder(tmp_path, [wrong])
    assert run(tmp_path) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "another area" in line]
    assert line.count("sample k") == 5
    assert "segments of another area: 7" in line
    assert "\x1b" not in line
    assert len(line) < 2000


def test_a_copy_takes_the_vocabulary_along_and_leaves_out_empty_splits(tmp_path, capsys):
    folder = write_folder(tmp_path / "set", [[good("a")]], vocabulary="classes.tsv")
    write_folder(folder, [[BROKEN_RECORDS["image that is no image"][0]]], split="val", vocabulary="classes.tsv")
    (folder / "classes.tsv").write_text("id\tkind\tnames\n1\tthing\tone\n3\tthing\tthree\n18\tthing\tmore\n")
    assert run(folder, fix=tmp_path / "clean") == 1
    assert "splits of which nothing is left: 1 (val)" in capsys.readouterr().out
    assert (tmp_path / "clean" / "classes.tsv").read_bytes() == (folder / "classes.tsv").read_bytes()
    assert list(read_index(tmp_path / "clean").splits) == ["train"]
    assert found(tmp_path / "clean") == {}


def test_a_key_that_no_shard_may_have_is_left_out(tmp_path, capsys):
    write_folder(tmp_path / "set", [[good("a"), good("b c")]])
    assert run(tmp_path / "set", fix=tmp_path / "clean") == 0
    assert "samples left out: 1 (sample key is 'b c'" in capsys.readouterr().out
    assert set(records_of(tmp_path / "clean")) == {"a"}


def test_a_copy_never_goes_where_something_is(tmp_path):
    folder = write_folder(tmp_path / "set", [[good("a")]])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for out in (folder, folder / "clean", tmp_path / "full" / ".." / "set" / "clean"):
        with pytest.raises(ValueError, match=r"--fix .* nothing is changed in place"):
            run(folder, fix=out)
    for out in (tmp_path / "full", tmp_path / "full" / "file"):
        with pytest.raises(ValueError, match=r"--fix .* there already"):
            run(folder, fix=out)


def test_what_cannot_be_asked(tmp_path):
    write_folder(tmp_path, [[good("a")]])
    with pytest.raises(ValueError, match="--workers is 0"):
        run(tmp_path, workers=0)
    with pytest.raises(ValueError, match="no split called val; it has train"):
        run(tmp_path, split="val")
