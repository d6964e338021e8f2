import io
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import webdataset
from tiny_shards import make_record, write_sizes, write_split

from osm_lightning import shard_tar
from osm_lightning.data import stream as stream_module
from osm_lightning.data.stream import ShardSet, Share, epoch_order, stream
from osm_lightning.record import decode
from osm_lightning.shard_tar import read_table

SCENES = Path(__file__).parents[2] / "data_shards" / "scenes"
ALONE = Share(0, 1)
SIZES = ([7], [3, 4], [1, 5, 2], [2, 2, 2, 2], [4, 1, 3, 2, 5])


def order(shards, share=ALONE, seed=0, epoch=0):
    return list(epoch_order(shards, seed, epoch, share))


def keys(shards, count, share=ALONE, seed=0, epoch=0):
    return [shards.read(*where).key for _, where in islice(stream(shards, seed, epoch, share), count)]


def positions(sizes):
    return [(shard, sample) for shard, size in enumerate(sizes) for sample in range(size)]


def test_reading_by_offset_is_webdatasets_own_reading():
    shards = ShardSet(SCENES, "val")
    position = 0
    for shard in shards.shards:
        dataset = webdataset.WebDataset(str(SCENES / shard.file), shardshuffle=False)
        for sample in dataset:
            members = {ending: data for ending, data in sample.items() if not ending.startswith("__")}
            assert shards[position] == decode(sample["__key__"], members)
            position += 1
    assert position == len(shards) == shards.index.splits["val"].num_samples


def test_positions_go_shard_by_shard(tmp_path):
    shards = ShardSet(write_sizes(tmp_path, [2, 0, 3]), "train")
    assert len(shards) == 5
    assert [shards[position].key for position in range(5)] == [f"train-{n}" for n in range(5)]
    assert shards[3] == make_record("train-3")
    assert shards.read(2, 1) == shards[3]
    with pytest.raises(IndexError):
        shards[5]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_readers_together_read_every_sample_once(tmp_path, sizes):
    shards = ShardSet(write_sizes(tmp_path, sizes), "train")
    for count in range(1, 8):
        for epoch in range(3):
            shares = [order(shards, Share(index, count), epoch=epoch) for index in range(count)]
            assert sorted(pair for share in shares for pair in share) == positions(sizes)
            if count <= len(sizes):  # every reader has shards of its own
                read = Counter(shard for share in shares for shard in {shard for shard, _ in share})
                assert set(read.values()) == {1}
            else:
                assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_no_reader_is_left_with_empty_shards_only(tmp_path):
    shards = ShardSet(write_sizes(tmp_path, [0, 4, 0, 3]), "train")
    for epoch in range(10):
        shares = [order(shards, Share(index, 2), epoch=epoch) for index in range(2)]
        assert sorted(map(len, shares)) == [3, 4]


@pytest.mark.parametrize("count", [1, 3, 7])
def test_the_order_depends_on_seed_and_epoch_alone(tmp_path, count):
    sizes = [9, 8, 7, 6, 5]
    first = ShardSet(write_sizes(tmp_path / "a", sizes), "train")
    again = ShardSet(write_sizes(tmp_path / "b", sizes), "train")
    share = Share(0, count)
    assert order(first, share, 1, 2) == order(again, share, 1, 2)
    assert order(first, share, 1, 2) != order(first, share, 1, 3)
    assert order(first, share, 1, 2) != order(first, share, 2, 2)
    assert order(first, share) != sorted(order(first, share))


def test_samples_of_several_shards_are_mixed(tmp_path):
    shards = ShardSet(write_sizes(tmp_path, [20, 20]), "train")
    changes = sum(a[0] != b[0] for a, b in zip(order(shards), order(shards)[1:], strict=False))
    assert changes > 5  # 19 on average; one after the other would be 1


def test_a_window_of_shards_is_finished_before_the_next_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_module, "SHARDS_AT_ONCE", 2)
    shards = ShardSet(write_sizes(tmp_path, [3, 3, 3, 3, 3]), "train")
    visited = [shard for shard, _ in order(shards)]
    assert [len(set(visited[start : start + 6])) for start in (0, 6, 12)] == [2, 2, 1]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_stream_goes_on_with_passes_in_new_orders(tmp_path, count):
    shards = ShardSet(write_sizes(tmp_path, [6, 6, 6]), "train")
    share = Share(0, count)
    length = len(order(shards, share))
    passes = [place.number for place, _ in islice(stream(shards, 0, 0, share), 3 * length)]
    assert passes[:length] == [0] * length
    assert set(passes) >= {0, 1, 2}
    read = keys(shards, 2 * length, share)
    assert read[:length] != read[length:]
    if count == 1:
        assert sorted(read[:length]) == sorted(read[length:])


def test_epochs_of_a_stream_differ_and_repeat(tmp_path):
    shards = ShardSet(write_sizes(tmp_path, [10, 10]), "train")
    assert keys(shards, 20, epoch=4) == keys(shards, 20, epoch=4)
    assert len({tuple(keys(shards, 20, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6


def test_a_missing_split_names_those_that_are_there(tmp_path):
    write_sizes(write_sizes(tmp_path, [1], "train"), [1], "val")
    with pytest.raises(ValueError, match="no split 'test'; it has train, val"):
        ShardSet(tmp_path, "test")


def test_a_missing_shard_is_named(tmp_path):
    shards = ShardSet(write_sizes(tmp_path, [1, 1]), "train")
    (tmp_path / "train-00001.tar").unlink()
    assert shards[0].key == "train-0"
    with pytest.raises(ValueError, match=r"train-00001\.tar cannot be read"):
        shards[1]


def test_a_shard_that_goes_missing_later_is_named(tmp_path):
    shards = ShardSet(write_sizes(tmp_path, [2]), "train")
    assert shards[0].key == "train-0"
    (tmp_path / "train-00000.tar").unlink()
    with pytest.raises(ValueError, match=r"train-00000\.tar cannot be read"):
        shards[1]


def test_a_shard_that_is_cut_off_is_named_wherever_it_ends(tmp_path):
    folder = write_sizes(tmp_path, [3])
    path = folder / "train-00000.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        members = list(tar)
    last = members[-1]
    inside = [
        0,
        100,
        512,
        members[2].offset,
        members[2].offset + 20,
        members[3].offset_data + 5,
        last.offset,
        last.offset_data,
    ]
    for length in (*inside, last.offset_data + last.size - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"train-00000\.tar (cannot be read|holds [0-2] samples)|sample train-\d"):
            [ShardSet(folder, "train")[position] for position in range(3)]
    path.write_bytes(whole[: last.offset_data + last.size + 512])  # only the end marker is missing: nothing is lost
    assert [ShardSet(folder, "train")[position].key for position in range(3)] == ["train-0", "train-1", "train-2"]


def test_a_shard_that_shrinks_while_it_is_read_is_named(tmp_path):
    shards = ShardSet(write_sizes(tmp_path, [2]), "train")
    assert shards[0].key == "train-0"
    path = tmp_path / "train-00000.tar"
    path.write_bytes(path.read_bytes()[:-12_000])
    with pytest.raises(ValueError, match=r"train-00000\.tar ends within sample train-1"):
        shards[1]


@pytest.mark.parametrize("content", [b"", b"\x00" * 5000, b"PK\x03\x04" * 500])
def test_a_file_that_is_no_tar_is_named(tmp_path, content):
    shards = ShardSet(write_sizes(tmp_path, [1]), "train")
    (tmp_path / "train-00000.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00000\.tar (cannot be read|holds 0 samples)"):
        shards[0]


def test_a_count_that_differs_from_the_index_is_named(tmp_path):
    shards = ShardSet(write_sizes(tmp_path / "two", [2]), "train")
    other = write_sizes(tmp_path / "three", [3])
    (other / "train-00000.tar").replace(tmp_path / "two" / "train-00000.tar")
    with pytest.raises(ValueError, match=r"train-00000\.tar holds 3 samples, but index\.json says 2"):
        shards[0]


def test_a_member_that_is_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    shards = ShardSet(write_sizes(tmp_path, [1]), "train")
    monkeypatch.setattr(shard_tar, "MAX_MEMBER_BYTES", 100)
    with pytest.raises(ValueError, match=r"train-0\.json has [\d,]+ bytes; more than 100 are refused"):
        shards[0]


def test_a_sample_that_lacks_a_member_is_named(tmp_path):
    record = make_record("half")
    folder = write_split(tmp_path, [[record]])
    path = folder / "train-00000.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("half.png")
        info.size = len(record.image_bytes)
        tar.addfile(info, io.BytesIO(record.image_bytes))
    with pytest.raises(ValueError, match=r"sample half: it holds \['png'\]"):
        ShardSet(folder, "train")[0]


def test_folders_and_links_in_a_tar_are_no_samples(tmp_path):
    path = tmp_path / "links.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in [("folder", tarfile.DIRTYPE), ("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.LNKTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("c.jpg"), io.BytesIO())
    assert [entry.key for entry in read_table(path)] == ["c"]


@pytest.mark.parametrize("sizes", [[2], [1, 1]])
def test_too_few_images_for_the_readers(tmp_path, sizes):
    shards = ShardSet(write_sizes(tmp_path, sizes), "train")
    with pytest.raises(ValueError, match=r"'train' has 2 images for 3 readers.*num_workers"):
        next(stream(shards, 0, 0, Share(2, 3)))
    assert keys(shards, 1, Share(1, 2))


def test_places_of_only_so_many_shards_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_module, "MAX_TABLES", 2)
    opened = []
    read = stream_module.read_table
    monkeypatch.setattr(stream_module, "read_table", lambda path: opened.append(path.name) or read(path))
    shards = ShardSet(write_sizes(tmp_path / "shards", [1, 1, 1]), "train")
    for shard in (0, 1, 0, 2, 1, 0):
        assert shards.read(shard, 0).key == f"train-{shard}"
    assert opened == [f"train-{shard:05d}.tar" for shard in (0, 1, 2, 0)]
