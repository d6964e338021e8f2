"""Every YAML under configs/ is read by the command's own parser: a key that nothing takes is an error."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from shapes_run import ROOT

from osm_lightning.__main__ import main

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
Parse = Callable[..., dict]
JOINT = ROOT / "configs" / "joint.yaml"


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture
def parse(capsys: pytest.CaptureFixture[str]) -> Parse:
    """Parses words of the command and returns the settings, without building anything."""

    def run(*words: str | Path) -> dict:
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, words), "--print_config"])
        said = capsys.readouterr()
        if stopped.value.code:
            raise ValueError(said.err)
        return yaml.safe_load(said.out)

    return run


def stack(path: Path) -> list[str]:
    """The words that put a config where it belongs: on top of the paper's recipe."""
    return [word for config in dict.fromkeys((JOINT, path)) for word in ("--config", str(config))]


def test_there_are_configs() -> None:
    assert {"configs/joint.yaml", "configs/model/tiny.yaml", "configs/trainer/cpu.yaml"} <= set(map(name, CONFIGS))


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_config_is_understood_and_wins(parse: Parse, path: Path) -> None:
    command = "validate" if "/eval/" in name(path) else "fit"
    parsed = parse(command, *stack(path))
    assert yaml.safe_load(path.read_text()), "an empty config sets nothing"
    for setting, value in leaves(yaml.safe_load(path.read_text())):
        assert look_up(parsed, setting) == value, setting


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_config_begins_by_saying_what_it_is(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert re.match(r"# \w.{19,}", first), f"{name(path)} begins with {first!r}"


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_files_that_a_config_tells_to_stack_exist(path: Path) -> None:
    for mentioned in re.findall(r"configs/[\w/.-]+\.yaml", path.read_text(encoding="utf-8")):
        assert (ROOT / mentioned).is_file(), f"{name(path)} mentions {mentioned}"


@pytest.mark.parametrize("section", ["model", "data", "trainer", "model.vision", "model.qformer", "model.language"])
def test_typo_is_an_error_in_every_section(parse: Parse, tmp_path: Path, section: str) -> None:
    content: object = {"qoutas": 3}
    for part in reversed(section.split(".")):
        content = {part: content}
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="qoutas"):
        parse("fit", *stack(tmp_path / "typo.yaml"))


def test_typo_in_a_source_is_an_error(parse: Parse, tmp_path: Path) -> None:
    (tmp_path / "typo.yaml").write_text("data: {sources: {mine: {shards: data_shards/mine, qouta: 3}}}")
    with pytest.raises(ValueError, match="qouta"):
        parse("fit", *stack(tmp_path / "typo.yaml"))


def test_later_files_and_words_win(parse: Parse, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("data: {masks_per_epoch: 10}\nmodel: {optim: {lr: 1.0}}")
    (tmp_path / "b.yaml").write_text("data: {masks_per_epoch: 20}")
    words = ["--config", tmp_path / "a.yaml", "--config", tmp_path / "b.yaml", "--model.optim.warmup_steps", "7"]
    parsed = parse("fit", "--config", JOINT, *words)
    assert parsed["data"]["masks_per_epoch"] == 20
    assert (parsed["model"]["optim"]["lr"], parsed["model"]["optim"]["warmup_steps"]) == (1.0, 7)
    assert len(parsed["data"]["sources"]) == 6


def test_what_belongs_to_the_model_is_no_setting_of_the_data(parse: Parse) -> None:
    """The links: data follow the model, and cannot be set apart from it."""
    for setting in ("data.image_size_px", "data.tokenizer", "data.modes", "data.seed"):
        with pytest.raises(ValueError, match=re.escape(setting)):
            parse("fit", "--config", JOINT, f"--{setting}", "1")


def leaves(content: dict, prefix: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], object]]:
    """Settings and values of a YAML; tables that are one setting's value count as one."""
    found = []
    for key, value in content.items():
        if isinstance(value, dict) and key not in {"architecture", "sources"}:
            found += leaves(value, (*prefix, key))
        elif key == "sources":
            found += [((*prefix, key, source, k), v) for source, row in value.items() for k, v in row.items()]
        else:
            found.append(((*prefix, key), value))
    return found


def look_up(content: dict, setting: tuple[str, ...]) -> object:
    for key in setting:
        content = content[key]
    return content
