"""Tokenizers travel in the exported folder: the very files, named by the folder's own config, wherever it is moved."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from osm_lightning.checkpoint_words import with_checkpoint
from osm_lightning.data.text import builtin_tokenizer, load_tokenizer
from osm_lightning.weights import own_tokenizers
from osm_lightning.weights.checkpoint import Checkpoint, read_checkpoint, write_folder
from osm_lightning.weights.export import export
from osm_lightning.weights.own_tokenizers import pointed


def config(language: dict[str, object], instruction: str | None) -> str:
    vision = {"name": "vit", "pretrained": None, "architecture": None, "image_size_px": 448, "window_size_px": 224}
    model = {"vision": vision, "qformer": {"instruction_tokenizer": instruction}}
    model |= {"language": {"name": "llm", "architecture": None, **language}, "modes": ["coco"]}
    return yaml.safe_dump({"trainer": {"precision": "32"}, "model": model, "data": {"sources": {"coco": {}}}})


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Tokenizers as an LLM's folder and a Q-Former's have them, among files that are none, and an exported folder."""
    for name, size in (("llm", 300), ("bert", 310)):
        builtin_tokenizer(size).save_pretrained(tmp_path / name)
        (tmp_path / name / "LICENSE.txt").write_text("free")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    text = config({"name": str(tmp_path / "llm"), "tokenizer": None}, str(tmp_path / "bert"))
    write_folder(Checkpoint({}, text, {}), tmp_path / "plain", "card")
    export(str(tmp_path / "plain"), tmp_path / "out")
    return tmp_path


def named(folder: Path) -> tuple[str, str]:
    model = yaml.safe_load(read_checkpoint(folder).config)["model"]
    return model["language"]["tokenizer"], model["qformer"]["instruction_tokenizer"]


def test_the_files_are_copied_with_their_licence_and_nothing_else(made: Path) -> None:
    for source, copy in (("llm", "tokenizer"), ("bert", "qformer_tokenizer")):
        files = {path.name: path.read_bytes() for path in (made / "out" / copy).iterdir()}
        assert files == {
            path.name: path.read_bytes() for path in (made / source).iterdir() if path.suffix != ".safetensors"
        }
        assert {"tokenizer.json", "tokenizer_config.json", "LICENSE.txt"} <= files.keys()


def test_they_are_found_wherever_the_folder_is_moved(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "own:tokenizer" in (made / "out" / "config.yaml").read_text()
    for source in ("llm", "bert", "plain"):
        shutil.rmtree(made / source)
    (made / "elsewhere").mkdir()
    (made / "out").rename(made / "elsewhere" / "moved")
    monkeypatch.chdir(made / "elsewhere")
    language, instruction = named(Path("moved"))
    monkeypatch.chdir("/")  # what was read does not depend on where one is
    assert [len(load_tokenizer(name)) for name in (language, instruction)] == [300, 310]


def test_exporting_again_copies_them_again(made: Path) -> None:
    export(str(made / "out"), made / "again")
    first, again = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (made / "out", made / "again")
    )
    del first[Path("README.md")], again[Path("README.md")]
    assert first == again


def test_a_new_run_from_its_config_finds_them(made: Path) -> None:
    folder = made / "out"
    for words in (["--config", f"{folder}/config.yaml"], [f"--config={folder}/config.yaml"]):
        argv = with_checkpoint(["fit", *words, "--model.weights", str(folder)])
        (text,) = (word.removeprefix("--config=") for word in argv if "model:" in word)
        assert yaml.safe_load(text)["model"]["language"]["tokenizer"] == str(folder / "tokenizer")
    plain = ["fit", "--config", str(made / "plain" / "config.yaml")]
    assert with_checkpoint(plain) == plain


def test_built_in_ones_need_no_file_and_leave_the_config_alone() -> None:
    text = config({"tokenizer": "builtin:300"}, "builtin:310")
    assert pointed(text) == (text, {})
    text = config({"tokenizer": "builtin:300"}, None)
    assert pointed(text) == (text, {})


def test_one_that_is_not_here_is_named_and_left_out(made: Path) -> None:
    text = config({"tokenizer": "./gone"}, str(made / "bert"))
    with pytest.warns(UserWarning, match=r"'\./gone'.*no such folder.*left out.*model\.language\.tokenizer"):
        found, copied = pointed(text)
    assert copied == {"qformer_tokenizer": str(made / "bert")}
    assert yaml.safe_load(found)["model"]["language"]["tokenizer"] == "./gone"


def test_the_card_says_where_they_are(made: Path) -> None:
    card = (made / "out" / "README.md").read_text()
    assert "Tokenizers: the LLM's is in `tokenizer/`; MaskQ-Former's is in `qformer_tokenizer/`." in card


def test_a_folder_without_them_is_refused(made: Path) -> None:
    shutil.rmtree(made / "out" / "tokenizer")
    with pytest.raises(ValueError, match=r"no checkpoint \(model\.language\.tokenizer is 'own:tokenizer', and there"):
        read_checkpoint(made / "out")


@pytest.mark.parametrize("name", ["own:../llm", "own:", "own:qformer_tokenizer"])
def test_a_foreign_config_points_nowhere_else(made: Path, name: str) -> None:
    path = made / "out" / "config.yaml"
    path.write_text(path.read_text().replace("own:tokenizer", f"'{name}'"))
    with pytest.raises(ValueError, match=r"is no checkpoint \(model\.language\.tokenizer is 'own:"):
        read_checkpoint(made / "out")


def test_a_copy_that_lacks_a_file_leaves_no_folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without tokenizer_config.json the copy knows no special tokens."""
    monkeypatch.setattr(own_tokenizers, "USUAL_FILES", ())
    before = sorted(made.iterdir())
    with pytest.raises(ValueError, match="tokenizer"):
        export(str(made / "plain"), made / "half")
    assert sorted(made.iterdir()) == before, "not even a hidden one"
