"""A file is there whole or not at all."""

import os

import pytest

from osm_lightning.whole_file import open_whole, write_whole


def test_texts_and_bytes_replace_what_was_there(tmp_path):
    path = tmp_path / ".facts.json"
    for content in ('{"ü": 1}', b"\x00\xff"):
        write_whole(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [path.name for path in tmp_path.iterdir()] == [".facts.json"]


def test_what_was_there_outlives_a_failure(tmp_path, monkeypatch):
    path = tmp_path / "facts.json"
    write_whole(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]


def test_a_file_that_grows_is_seen_when_it_is_whole(tmp_path):
    path = tmp_path / "lines"
    write_whole(path, "old")
    with open_whole(path) as file:
        file.write(b"one\n")
        assert path.read_text() == "old"
        file.write(b"two\n")
    assert path.read_text() == "one\ntwo\n"


def test_a_file_that_is_given_up_leaves_the_old_one(tmp_path):
    path = tmp_path / "lines"
    write_whole(path, "old")

    def interrupted() -> None:
        with open_whole(path) as file:
            file.write(b"one\n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["lines"]
