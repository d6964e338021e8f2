import hashlib
import io
import os
import re
import resource
import tarfile
from contextlib import suppress
from dataclasses import replace
from threading import Thread

import numpy as np
import pytest
import webdataset
from PIL import Image

from osm_lightning.record import Record, Segment, decode, encode, encode_segment_map
from osm_lightning.shard_index import read_index
from osm_lightning.shards.lock import exclusive
from osm_lightning.shards.write import ShardWriter


def make_record(key, ending="jpg", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    image = io.BytesIO()
    Image.fromarray(pixels).save(image, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[ending])
    segment_map = np.zeros((6, 9), np.uint16)
    segment_map[:2], segment_map[2:4] = 1, 2
    segments = (
        Segment("7", class_id=3, area_px=18, bbox_xywh_px=(0, 0, 9, 2)),
        Segment("8", class_id=3, iscrowd=True, area_px=18, bbox_xywh_px=(0, 2, 9, 2)),
        Segment("9", class_id=4),
    )
    return Record(key, image.getvalue(), ending, 6, 9, segments, encode_segment_map(segment_map), {"n": seed})


def build(folder, records, split="train", **options):
    with ShardWriter(folder, dataset="mine", split=split, vocabulary="coco", **options) as writer:
        for record in records:
            writer.write(record)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


RECORDS = [make_record(f"{i:03}", ending, seed=i) for i, ending in enumerate(["jpg", "png", "webp"] * 3)]
TWO_PER_SHARD = 9_000


def test_webdataset_reads_back_what_was_written(tmp_path):
    build(tmp_path, RECORDS, max_shard_bytes=TWO_PER_SHARD)
    shards = [shard.file for shard in read_index(tmp_path).splits["train"].shards]
    assert len(shards) == 5
    samples = webdataset.WebDataset([str(tmp_path / shard) for shard in shards], shardshuffle=False)
    read = [decode(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in samples]
    assert read == RECORDS


def test_members_keep_the_order_of_the_record(tmp_path):
    build(tmp_path, RECORDS)
    with tarfile.open(tmp_path / "train-00000.tar") as tar:
        assert tar.getnames() == [f"{record.key}.{ending}" for record in RECORDS for ending in encode(record)]


def test_shards_stay_below_the_limit_unless_a_record_is_larger(tmp_path):
    build(tmp_path / "small", RECORDS, max_shard_bytes=TWO_PER_SHARD)
    sizes = [shard.num_samples for shard in read_index(tmp_path / "small").splits["train"].shards]
    assert sizes == [2, 2, 2, 2, 1]
    build(tmp_path / "tiny", RECORDS, max_shard_bytes=1)
    assert len(read_index(tmp_path / "tiny").splits["train"].shards) == len(RECORDS)


def test_index_describes_the_files(tmp_path):
    build(tmp_path, RECORDS, max_shard_bytes=TWO_PER_SHARD)
    index = read_index(tmp_path)
    assert (index.dataset, index.vocabulary) == ("mine", "coco")
    for shard in index.splits["train"].shards:
        data = (tmp_path / shard.file).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    split = index.splits["train"]
    # Of each record's three segments one is a crowd and one has no pixels.
    assert (split.num_samples, split.num_masks, split.masks_per_class) == (9, 9, {3: 9})


def test_same_records_give_the_same_bytes(tmp_path, monkeypatch):
    build(tmp_path / "a", RECORDS)
    monkeypatch.setattr("time.time", lambda: 1e9)
    build(tmp_path / "b", RECORDS)
    assert names(tmp_path / "a") == names(tmp_path / "b")
    for name in names(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_splits_share_a_folder(tmp_path):
    build(tmp_path, RECORDS, split="train")
    build(tmp_path, RECORDS[:1], split="val")
    assert {name: split.num_samples for name, split in read_index(tmp_path).splits.items()} == {"train": 9, "val": 1}


@pytest.mark.filterwarnings("error")
def test_an_exception_leaves_nothing(tmp_path):
    def interrupted():
        yield from RECORDS[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, interrupted(), max_shard_bytes=TWO_PER_SHARD)
    assert names(tmp_path) == []


@pytest.mark.filterwarnings("error")
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot be written to \(No space left on device\) after [0-9,]{5,} bytes"):
        build(tmp_path, RECORDS)
    assert names(tmp_path) == []


@pytest.mark.filterwarnings("error")
def test_a_disk_that_ends_within_a_shard_leaves_the_index_as_it_was(tmp_path):
    """A real limit of the kernel, met in the middle of a file."""
    build(tmp_path, RECORDS[:2], split="val")
    before = (tmp_path / "index.json").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=rf"{re.escape(str(tmp_path))} cannot be written to \(File too large\)"):
            build(tmp_path, RECORDS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "index.json").read_bytes() == before
    assert names(tmp_path) == ["index.json", "val-00000.tar"]


def test_leftovers_of_a_killed_build_are_removed(tmp_path):
    (tmp_path / ".train-00007.tar.partial").write_bytes(b"half")
    (tmp_path / "train-00007.tar").write_bytes(b"put in place, but killed before the index")
    (tmp_path / "train-more-00007.tar").write_bytes(b"of another split")
    build(tmp_path, RECORDS)
    assert names(tmp_path) == ["index.json", "train-00000.tar", "train-more-00007.tar"]


def test_a_split_is_replaced_only_on_demand_and_only_as_a_whole(tmp_path):
    build(tmp_path, RECORDS, max_shard_bytes=TWO_PER_SHARD)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    with pytest.raises(ValueError, match=r"already has a split train.*--overwrite"):
        build(tmp_path, RECORDS)
    with pytest.raises(ValueError, match="stands twice"):
        build(tmp_path, [RECORDS[0], RECORDS[0]], overwrite=True)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before
    build(tmp_path, RECORDS[:1], overwrite=True)
    assert names(tmp_path) == ["index.json", "train-00000.tar"]
    assert read_index(tmp_path).splits["train"].num_samples == 1


def test_while_shards_are_replaced_the_index_does_not_name_them(tmp_path, monkeypatch):
    build(tmp_path, RECORDS, split="val")
    build(tmp_path, RECORDS)
    seen = []
    replace_file = type(tmp_path).replace

    def spy(path, target):
        if target.suffix == ".tar":
            seen.append(set(read_index(tmp_path).splits))
        return replace_file(path, target)

    monkeypatch.setattr(type(tmp_path), "replace", spy)
    build(tmp_path, RECORDS, overwrite=True)
    assert seen == [{"val"}]


@pytest.mark.parametrize("key", ["a.b", "../a", "a/b", "", "a b", "ä", "x" * 81, "a\n"])
def test_keys_must_be_plain(tmp_path, key):
    with pytest.raises(ValueError, match=r"sample key is .* first dot"):
        build(tmp_path, [replace(RECORDS[0], key=key)])
    assert names(tmp_path) == []


def test_longest_key_fits_into_a_tar(tmp_path):
    build(tmp_path, [replace(RECORDS[0], key="x" * 80)])
    with tarfile.open(tmp_path / "train-00000.tar") as tar:
        assert tar.getnames()[-1] == "x" * 80 + ".seg.png"


def test_a_split_without_samples_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no samples"):
        build(tmp_path, [])
    assert names(tmp_path) == []


def test_a_folder_has_one_dataset_and_one_vocabulary(tmp_path):
    build(tmp_path, RECORDS)
    with pytest.raises(ValueError, match="dataset is 'mine', not 'other'"):
        ShardWriter(tmp_path, dataset="other", split="val", vocabulary="coco")
    with pytest.raises(ValueError, match="vocabulary is 'coco', not None"):
        ShardWriter(tmp_path, dataset="mine", split="val", vocabulary=None)


@pytest.mark.parametrize("split", ["../val", "a/b", "v.al", ""])
def test_split_names_must_be_plain(tmp_path, split):
    with pytest.raises(ValueError, match="split is"):
        ShardWriter(tmp_path, dataset="mine", split=split, vocabulary=None)


# Going on behind what an earlier writer kept


def new_writer(folder):
    return ShardWriter(
        folder, dataset="mine", split="train", vocabulary="coco", max_shard_bytes=TWO_PER_SHARD, overwrite=True
    )


def interrupt(folder):
    """Writes some records and is interrupted; two shards of two records are kept."""
    with suppress(KeyboardInterrupt), new_writer(folder) as writer:
        for record in RECORDS[:5]:
            writer.write(record)
        writer.keep()
        raise KeyboardInterrupt
    return writer.finished


def test_a_resumed_split_has_the_bytes_of_an_uninterrupted_one(tmp_path):
    build(tmp_path / "whole", RECORDS, max_shard_bytes=TWO_PER_SHARD)
    finished = interrupt(tmp_path / "halves")
    assert names(tmp_path / "halves") == [".train-00000.tar.partial", ".train-00001.tar.partial"]
    assert (finished.num_samples, finished.num_masks, finished.masks_per_class) == (4, 4, {3: 4})
    with new_writer(tmp_path / "halves") as writer:
        writer.resume(finished, [record.key for record in RECORDS[:4]])
        with pytest.raises(ValueError, match="stands twice"):
            writer.write(RECORDS[0])
        for record in RECORDS[4:]:
            writer.write(record)
    assert names(tmp_path / "whole") == names(tmp_path / "halves")
    for name in names(tmp_path / "whole"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "halves" / name).read_bytes()


def test_a_shard_that_is_not_as_it_was_left_is_not_resumed(tmp_path):
    finished = interrupt(tmp_path)
    partial = tmp_path / ".train-00001.tar.partial"
    content = partial.read_bytes()
    for changed in (content[:-1], b"x" + content[1:]):
        partial.write_bytes(changed)
        with new_writer(tmp_path) as writer:
            with pytest.raises(ValueError, match=r"00001\.tar\.partial (is not as it was left|has changed)"):
                writer.resume(finished, [])
            writer.write(RECORDS[0])  # it goes on with an empty split
        assert read_index(tmp_path).splits["train"].num_samples == 1
        finished = interrupt(tmp_path)


def test_one_writer_at_a_time_for_a_split(tmp_path):
    with new_writer(tmp_path) as writer:
        writer.write(RECORDS[0])
        with (
            pytest.raises(ValueError, match=r"split train of .* is being built by another process"),
            new_writer(tmp_path),
        ):
            pass
        build(tmp_path, RECORDS[:1], split="val")
    assert names(tmp_path) == ["index.json", "train-00000.tar", "val-00000.tar"]
    assert set(read_index(tmp_path).splits) == {"train", "val"}


def test_a_split_that_was_built_while_a_writer_waited_is_not_replaced(tmp_path):
    writer = ShardWriter(tmp_path, dataset="mine", split="train", vocabulary="coco")
    build(tmp_path, RECORDS)
    with pytest.raises(ValueError, match="already has a split train"), writer:
        pass
    assert names(tmp_path) == ["index.json", "train-00000.tar"]


def test_a_lock_lets_one_in_and_leaves_no_file(tmp_path):
    """Holders remove the file, so that waiting ones may hold a lock on a file that is no more."""
    counter = tmp_path / "counter"
    counter.write_text("0")

    def count():
        for _ in range(100):
            with exclusive(tmp_path / "lock", wait=True):
                counter.write_text(str(int(counter.read_text()) + 1))

    threads = [Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.read_text() == "400"
    assert names(tmp_path) == ["counter"]
