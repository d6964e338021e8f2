"""Shard folders on disks and behind commands. What a network does to them is in faults/test_remote_shards.py."""

import hashlib
import os
import pickle
import re
import time
from pathlib import Path

import pytest

from osm_lightning import shard_folder
from osm_lightning.shard_folder import Patience, open_folder
from osm_lightning.shard_index import ShardIndex, ShardInfo, SplitInfo, write_index

SHARD = b"not a tar, but nobody looks into it here" * 1000
NO_WAIT = Patience(attempts=2, stall_s=20.0, sleep=lambda duration_s: None)


def info_of(content: bytes, file: str = "val-00000.tar") -> ShardInfo:
    return ShardInfo(file, hashlib.sha256(content).hexdigest(), len(content), num_samples=1, num_masks=1)


def fill(folder: Path, content: bytes = SHARD, info: ShardInfo | None = None) -> ShardInfo:
    """Writes a folder of one shard, which may be another one than the index says."""
    info = info or info_of(content)
    folder.mkdir(exist_ok=True)
    (folder / info.file).write_bytes(content)
    write_index(folder, ShardIndex("mine", None, {"val": SplitInfo((info,), {})}))
    return info


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """A folder that commands may read."""
    monkeypatch.setenv("OSM_ALLOW_PIPE", "1")
    folder = tmp_path / "source of shards"
    fill(folder)
    return folder


def command(source: Path, before: str = "true") -> str:
    """Notes every file that it is asked for, then does something, then gives the file."""
    return f"pipe:cd '{source}' && echo {{file}} >> ../asked && {before} && cat {{file}}"


def asked(tmp_path: Path) -> list[str]:
    return (tmp_path / "asked").read_text().split()


# Local folders


@pytest.mark.parametrize("form", ["{}", "file:{}", "file://{}", "file://localhost{}"])
def test_a_local_folder_is_used_where_it_is(tmp_path, form):
    info = fill(tmp_path / "shards")
    (tmp_path / "shards" / "names.tsv").write_text("id\n")
    folder = open_folder(form.format(tmp_path / "shards"), cache=tmp_path / "cache")
    assert folder.index.splits["val"].shards == (info,)
    assert folder.path(info) == tmp_path / "shards" / info.file
    assert folder.side_file("names.tsv") == tmp_path / "shards" / "names.tsv"
    assert folder.side_file("coco") is None
    assert not (tmp_path / "cache").exists()


def test_a_file_url_may_be_quoted(tmp_path):
    info = fill(tmp_path / "two words")
    folder = open_folder((tmp_path / "two words").as_uri())
    assert folder.path(info).read_bytes() == SHARD


def test_a_local_folder_may_have_a_colon_in_its_name(tmp_path):
    info = fill(tmp_path / "coco:2017")
    assert open_folder(str(tmp_path / "coco:2017")).path(info).is_file()


@pytest.mark.parametrize("location", ["gs://bucket/coco", "file://server/coco", "https:///coco", "http:coco", "s3:x"])
def test_other_urls_are_refused_with_a_way_out(location):
    with pytest.raises(ValueError, match=re.escape(location) + r" is neither .* 'pipe:COMMAND \{file\}'"):
        open_folder(location)


# The cache


def test_a_shard_is_fetched_once_and_kept_whole(source, tmp_path):
    folder = open_folder(command(source), tmp_path / "cache", NO_WAIT)
    info = folder.index.splits["val"].shards[0]
    path = folder.path(info)
    assert path.read_bytes() == SHARD
    assert path.is_relative_to(tmp_path / "cache")
    assert folder.path(info) == path
    assert open_folder(command(source), tmp_path / "cache", NO_WAIT).path(info) == path
    assert asked(tmp_path) == ["index.json", "val-00000.tar", "index.json"], "the index is always fetched anew"
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_cache_comes_from_the_environment(source, tmp_path, monkeypatch):
    monkeypatch.setenv("OSM_CACHE", str(tmp_path / "elsewhere"))
    folder = open_folder(command(source), patience=NO_WAIT)
    assert folder.path(folder.index.splits["val"].shards[0]).is_relative_to(tmp_path / "elsewhere")


def test_two_locations_do_not_share_a_folder(source, tmp_path):
    one, two = (open_folder(command(source, before), tmp_path / "cache", NO_WAIT) for before in ("true", "true 1"))
    assert one.folder != two.folder


def test_a_pickled_folder_fetches_too(source, tmp_path):
    folder = pickle.loads(pickle.dumps(open_folder(command(source), tmp_path / "cache")))
    assert folder.path(folder.index.splits["val"].shards[0]).read_bytes() == SHARD


def test_a_changed_shard_is_another_file_and_the_old_one_stays(source, tmp_path):
    before = open_folder(command(source), tmp_path / "cache", NO_WAIT)
    old = before.path(before.index.splits["val"].shards[0])
    changed = fill(source, SHARD[::-1])  # of the same name and size
    after = open_folder(command(source), tmp_path / "cache", NO_WAIT)
    assert after.path(changed).read_bytes() == SHARD[::-1]
    assert before.path(before.index.splits["val"].shards[0]).read_bytes() == SHARD
    assert old.read_bytes() == SHARD


def test_a_cached_shard_of_another_size_is_fetched_again(source, tmp_path):
    folder = open_folder(command(source), tmp_path / "cache", NO_WAIT)
    info = folder.index.splits["val"].shards[0]
    folder.path(info).write_bytes(SHARD[:-1])
    assert folder.path(info).read_bytes() == SHARD


def test_side_files_are_fetched_anew_and_keys_are_not_asked_for(source, tmp_path):
    folder = open_folder(command(source), tmp_path / "cache", NO_WAIT)
    for text in ("id\n", "id\tnames\n"):
        (source / "names.tsv").write_text(text)
        path = folder.side_file("names.tsv")
        assert path is not None
        assert path.read_text() == text
    for name in ("coco", "../names.tsv", "/etc/host.conf", ".hidden.tsv", "-v.tsv", "a b.tsv"):
        assert folder.side_file(name) is None
    assert asked(tmp_path) == ["index.json", "names.tsv", "names.tsv"]


def test_a_broken_index_names_the_location(source, tmp_path):
    (source / "index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json that pipe:.* gave is broken.*KeyError"):
        open_folder(command(source), tmp_path / "cache", NO_WAIT)


def test_an_index_without_end_is_cut_off(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_folder, "MAX_SMALL_BYTES", 100)
    with pytest.raises(ValueError, match=r"index\.json could not be fetched in 1 .*more than 100 bytes"):
        open_folder(command(source), tmp_path / "cache", NO_WAIT)


# Commands


def test_commands_run_only_where_they_are_allowed(source, tmp_path, monkeypatch):
    for value in (None, "0", "yes"):
        monkeypatch.delenv("OSM_ALLOW_PIPE") if value is None else monkeypatch.setenv("OSM_ALLOW_PIPE", value)
        with pytest.raises(ValueError, match="OSM_ALLOW_PIPE=1"):
            open_folder(command(source), tmp_path / "cache", NO_WAIT)
        monkeypatch.setenv("OSM_ALLOW_PIPE", "1")
    assert not (tmp_path / "asked").exists()


def test_a_command_says_where_the_name_goes(source):
    with pytest.raises(ValueError, match=r"lacks \{file\}"):
        open_folder(f"pipe:cat '{source}/index.json'")


def test_a_failing_command_is_quoted_and_tried_again(source, tmp_path):
    with pytest.raises(ValueError, match=r"in 2 of at most 2 attempts, because .* code 3: no such bucket"):
        open_folder(command(source, "{ echo no such bucket >&2; exit 3; }"), tmp_path / "cache", NO_WAIT)
    assert asked(tmp_path) == ["index.json"] * 2


def test_a_command_that_fails_after_its_last_byte_has_failed(source, tmp_path):
    with pytest.raises(ValueError, match="ended with code 4"):
        open_folder(f"{command(source)}; exit 4", tmp_path / "cache", NO_WAIT)


def test_a_stalled_command_is_killed_with_its_children(source, tmp_path):
    patience = Patience(attempts=1, stall_s=0.3)
    with pytest.raises(ValueError, match=r"sent nothing for 0\.3 s"):
        open_folder(command(source, "{ sleep 60 & echo $! > ../child; wait; }"), tmp_path / "cache", patience)
    child = Path("/proc") / (tmp_path / "child").read_text().strip() / "stat"
    deadline_s = time.monotonic() + 5
    while child.exists() and child.read_text().split()[2] != "Z":  # killed, perhaps not yet reaped by init
        assert time.monotonic() < deadline_s, "the child lives on"
        time.sleep(0.01)


def test_endless_output_is_cut_off_at_the_stated_size(source, tmp_path):
    endless = "if [ {file} != index.json ]; then yes; fi"
    folder = open_folder(command(source, endless), tmp_path / "cache", NO_WAIT)
    with pytest.raises(ValueError, match=r"in 1 of .*more than the 40,000 bytes that index\.json states"):
        folder.path(folder.index.splits["val"].shards[0])
    assert not [path for path in folder.folder.iterdir() if path.stat().st_size >= len(SHARD)]


def test_a_name_never_becomes_an_option(source, tmp_path):
    info = fill(source, info=info_of(SHARD, file="-e.tar"))
    folder = open_folder(command(source), tmp_path / "cache", NO_WAIT)
    with pytest.raises(ValueError, match="option"):
        folder.path(info)
    assert asked(tmp_path) == ["index.json"]


def test_pauses_double_and_differ():
    pauses_s: list[float] = []
    patience = Patience(pause_s=2.0, sleep=pauses_s.append)
    for attempt in (1, 2, 3, 4) * 5:
        patience.pause(attempt)
    for number, pause_s in enumerate(pauses_s):
        assert 1.0 <= pause_s / 2 ** (number % 4) <= 2.0
    assert len(set(pauses_s)) == len(pauses_s)


def test_a_cache_that_cannot_be_written_says_what_to_do(source, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match=r"cannot be written to the cache .*OSM_CACHE") as caught:
        open_folder(command(source), tmp_path / "cache", NO_WAIT)
    assert isinstance(caught.value.__cause__, OSError)
    assert os.fspath(tmp_path / "cache") in str(caught.value)
