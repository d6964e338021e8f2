"""A file is there whole or not at all."""

import os

import pytest

from osm_lightning.whole_file import write_whole


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
