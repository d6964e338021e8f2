import json
import re

import pytest

from osm_lightning.shard_index import ShardIndex, ShardInfo, SplitInfo, read_index, write_index

SHARD = ShardInfo("val-00000.tar", "0" * 64, bytes=10, num_samples=2, num_masks=5)
INDEX = ShardIndex("mine", "coco", {"val": SplitInfo((SHARD, SHARD), {1: 7, 10: 3})})


def write_changed(folder, change):
    write_index(folder, INDEX)
    content = json.loads((folder / "index.json").read_text())
    change(content, content["splits"]["val"], content["splits"]["val"]["shards"][0])
    (folder / "index.json").write_text(json.dumps(content))


def test_what_is_written_is_read(tmp_path):
    write_index(tmp_path, INDEX)
    assert read_index(tmp_path) == INDEX
    assert [path.name for path in tmp_path.iterdir()] == ["index.json"]


def test_totals_are_the_sum_over_shards():
    split = INDEX.splits["val"]
    assert (split.num_samples, split.num_masks) == (4, 10)


def test_missing_index_names_folder_and_command(tmp_path):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path)) + r".*osm shards build"):
        read_index(tmp_path)


@pytest.mark.parametrize("file", ["../val.tar", "/etc/passwd", "a/b.tar", "..", "", "a\\b.tar", "val.tar\n", 3])
def test_no_file_name_leads_out_of_the_folder(tmp_path, file):
    write_changed(tmp_path, lambda content, split, shard: shard.update(file=file))
    with pytest.raises(ValueError, match="plain name"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content, split, shard: content.update(schema=2), "schema 2"),
        (lambda content, split, shard: content.update(vocabulary="../x.tsv"), "vocabulary"),
        (lambda content, split, shard: content.update(splits=[]), "AttributeError"),
        (lambda content, split, shard: split.pop("shards"), "shards"),
        (lambda content, split, shard: split.update(num_masks=11), "11 masks, but its shards add up to 4 and 10"),
        (lambda content, split, shard: split["masks_per_class"].update(x=1), "'x'"),
        (lambda content, split, shard: shard.update(bytes="10"), "bytes is '10'"),
        (lambda content, split, shard: shard.update(num_samples=-1), "num_samples is -1"),
        (lambda content, split, shard: shard.update(num_samples=True), "num_samples is True"),
        (lambda content, split, shard: shard.update(sha256="abc"), "64 hexadecimal"),
        (lambda content, split, shard: shard.pop("sha256"), "sha256"),
        (lambda content, split, shard: shard.update(comment=""), "comment"),
    ],
)
def test_a_broken_entry_is_named(tmp_path, change, reason):
    write_changed(tmp_path, change)
    with pytest.raises(ValueError, match=r"index\.json is not a shard index.*" + re.escape(reason)):
        read_index(tmp_path)


def test_text_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "index.json").write_bytes(b"\xff{")
    with pytest.raises(ValueError, match="not a shard index"):
        read_index(tmp_path)
