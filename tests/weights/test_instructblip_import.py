"""`osm weights import`: what is read of an InstructBLIP, whoever wrote it; what is reported, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fabricate
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from osm_lightning.__main__ import main
from osm_lightning.data.text import TextCodec
from osm_lightning.datasets import DATASETS
from osm_lightning.instructions import TEST_QUESTION
from osm_lightning.weights.checkpoint import read_checkpoint
from osm_lightning.weights.instructblip_import import import_model


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fabricate.instructblip(tmp_path_factory.mktemp("hub") / "instructblip")


@pytest.fixture(scope="module")
def state(hub: Path) -> dict[str, Tensor]:
    return fabricate.released(hub)


@pytest.fixture
def folder(hub: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(hub, tmp_path / "copy"))


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for shard in folder.glob("model*.safetensors") for name, t in load_file(shard).items()}


# What is read


def test_both_file_formats_give_the_same(hub: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
    older = fabricate.instructblip(tmp_path / "older", "bin")
    assert list(older.glob("pytorch_model-*.bin"))
    assert not list(older.glob("*.safetensors"))
    path = fabricate.save_released(state, tmp_path / "osm_final.pt")
    one = import_model(str(hub), tmp_path / "one", path).checkpoint
    two = import_model(str(older), tmp_path / "two", path).checkpoint
    assert one.frozen == two.frozen
    assert one.tensors.keys() == two.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(two.tensors[name], tensor)


def test_without_a_released_checkpoint_training_starts_from_instructblip(hub: Path, tmp_path: Path) -> None:
    theirs = weights_of(hub)
    made = import_model(str(hub), tmp_path / "start", seed=3)
    tensors = read_checkpoint(tmp_path / "start").tensors
    for name in ("qformer.mask_query_QD", "qformer.context_query_QD"):
        assert torch.equal(tensors[name], theirs["query_tokens"][0])
    assert torch.equal(tensors["projection.weight"], theirs["language_projection.weight"])
    query = theirs["qformer.encoder.layer.2.crossattention.attention.query.weight"]
    assert torch.equal(tensors["qformer.layers.2.cross_attention.query.weight"], query)
    assert tensors["vision.position_NE"].shape == (25 * 17, fabricate.VISION_WIDTH)
    assert tensors["vision.position_NE"].std().item() == pytest.approx(1, abs=0.05)
    assert tensors["modes.query"].std().item() == pytest.approx(0.02, abs=0.005)
    model = yaml.safe_load((tmp_path / "start" / "config.yaml").read_text())["model"]
    assert model["modes"] == list(DATASETS)
    assert model["vision"]["image_size_px"] == 5 * fabricate.WINDOW
    assert model["qformer"]["mask_rule"] == "touched", "nothing depends on the released rule yet"
    assert "seed 3" in (tmp_path / "start" / "README.md").read_text()

    again = import_model(str(hub), tmp_path / "again", seed=3).checkpoint.tensors
    other = import_model(str(hub), tmp_path / "other", seed=4).checkpoint.tensors
    for name in ("vision.position_NE", "modes.query", "modes.embedding"):
        assert torch.equal(again[name], made.checkpoint.tensors[name])
        assert not torch.equal(other[name], made.checkpoint.tensors[name])


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As writers name them that keep the model below its head."""
    return {
        name.removeprefix("language_model.") if "lm_head" in name else f"model.{name}": tensor
        for name, tensor in tensors.items()
    }


def below_its_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("language_model.model.", "language_model."): tensor for name, tensor in tensors.items()}


def with_old_buffers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    frequencies = {f"language_model.model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in (0, 1)}
    return {**tensors, **frequencies, "qformer.embeddings.position_ids": torch.arange(64)[None]}


@pytest.mark.parametrize("change", [renamed, below_its_head, with_old_buffers])
def test_names_of_other_writers_are_known(hub: Path, folder: Path, tmp_path: Path, change: Callable[..., Any]) -> None:
    fabricate.rewrite(folder, change)
    wanted = import_model(str(hub), tmp_path / "wanted").checkpoint
    made = import_model(str(folder), tmp_path / "made")
    assert made.checkpoint.frozen == wanted.frozen
    assert all(torch.equal(made.checkpoint.tensors[name], tensor) for name, tensor in wanted.tensors.items())
    extras = {name for report in made.reports for name in report.extras}
    assert len(extras) == (3 if change is with_old_buffers else 0)


def test_an_llm_with_tied_embeddings_lacks_nothing(tmp_path: Path) -> None:
    folder = fabricate.instructblip(tmp_path / "tied", tie_word_embeddings=True)
    assert "language_model.lm_head.weight" not in weights_of(folder)
    import_model(str(folder), tmp_path / "out")


def test_the_folder_is_named_so_that_it_is_found_again(hub: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(hub.parent)
    import_model("instructblip", tmp_path / "out")
    model = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["model"]
    assert model["vision"]["name"] == model["language"]["name"] == str(hub)
    assert model["qformer"]["instruction_tokenizer"] == f"{hub}/qformer_tokenizer"


# Tokenizers


def test_the_prompt_is_the_folders_own(hub: Path) -> None:
    codec = TextCodec(str(hub), str(hub / "qformer_tokenizer"))
    text = codec.encode(TEST_QUESTION, "Traffic Light")
    assert text.text_ids[0] == 2
    assert codec.eos_ids == (2,)
    assert text.text_ids[-1] == 2
    assert codec.decode(text.text_ids[text.prompt_tokens :]).strip() == "traffic light"
    assert codec.decode(text.text_ids[: text.prompt_tokens]) == "What is in the segmentation mask? Assistant:"


def test_a_folder_with_sentencepiece_alone(hub: Path, folder: Path) -> None:
    fabricate.only_sentencepiece(folder)
    ours, wanted = TextCodec(str(folder)), TextCodec(str(hub))
    for name in (None, "traffic light", "piñata", "cell phone"):
        assert ours.encode(TEST_QUESTION, name) == wanted.encode(TEST_QUESTION, name)
    assert (
        ours.decode(wanted.encode(TEST_QUESTION, "zebra").text_ids)
        == "What is in the segmentation mask? Assistant: zebra"
    )


# Reports and surprises


def test_the_report_is_printed_and_written(hub: Path, state: dict, tmp_path: Path, capsys: Any) -> None:
    path = fabricate.save_released(state, tmp_path / "osm_final.pt")
    run("weights", "import", "--instructblip", hub, "--released", path, "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    assert f"| trained parts | `{path}` | {len(state)} tensors" in printed
    assert f"| LLM | `{hub}` | 21 tensors" in printed
    assert "| trained parts |" in (tmp_path / "out" / "README.md").read_text()
    content = json.loads((tmp_path / "out" / "load_report.json").read_text())
    by_part = {load["part"]: load for load in content["loads"]}
    assert by_part["trained parts"]["known_extras"] == ["epoch", "optimizer_state_dict", "lr_scheduler_state_dict"]
    assert sum(load["bytes"] for part, load in by_part.items() if part != "trained parts") == sum(
        tensor.nbytes for tensor in weights_of(hub).values()
    ), "every tensor of the folder is accounted for"


def test_surprises_that_are_allowed_leave_things_as_they_were(
    hub: Path, state: dict[str, Tensor], tmp_path: Path
) -> None:
    changed = {name: tensor for name, tensor in state.items() if name != "mode_query.v3det"}
    changed["teacher.weight"] = torch.zeros(2)
    changed["base_model.language_projection.bias"] = torch.zeros(7)
    path = fabricate.save_released(changed, tmp_path / "osm_final.pt")
    with pytest.raises(ValueError, match=r"1 missing: mode_query\.v3det; 1 unexpected: teacher.*; 1 of another shape"):
        import_model(str(hub), tmp_path / "out", path)
    with pytest.raises(ValueError, match=r"osm_final\.pt: 1 unexpected: teacher\.weight\n"):
        import_model(str(hub), tmp_path / "out", path, allow=["mode_query.*", "*bias"])
    assert not (tmp_path / "out").exists()
    tensors = import_model(str(hub), tmp_path / "out", path, allow=["mode_query.*", "*bias", "teacher.*"]).checkpoint
    assert torch.equal(tensors.tensors["projection.bias"], weights_of(hub)["language_projection.bias"])
    assert torch.equal(tensors.tensors["projection.weight"], state["base_model.language_projection.weight"])
    row = tensors.modes.index("v3det")
    assert tensors.tensors["modes.embedding"][row].std().item() == pytest.approx(0.02, abs=0.01), (
        "random, as it started"
    )
    assert torch.equal(tensors.tensors["modes.query"][row], state["qformer_mode_query.v3det"][0, 0])
    assert json.loads((tmp_path / "out" / "load_report.json").read_text())["allowed"]


def test_a_pattern_that_names_nothing_is_told(hub: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"--allow 'mode.*' names nothing"):
        import_model(str(hub), tmp_path / "out", allow=["mode*"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"language_model.extra": torch.zeros(1)}, "LLM of .*1 unexpected: language_model.extra"),
        (lambda t: t | {"extra.weight": torch.zeros(1)}, "queries, projection of .*1 unexpected: extra.weight"),
        (lambda t: without(t, "query_tokens"), "1 missing: query_tokens"),
        (lambda t: without(t, "qformer.embeddings.layernorm.bias"), "1 missing: qformer.embeddings.layernorm.bias"),
        (
            lambda t: t | {"language_projection.bias": torch.zeros(3)},
            r"1 of another shape: language_projection.bias \(3,\) for \(64,\)",
        ),
    ],
)
def test_a_folder_that_surprises_is_refused_unless_it_is_allowed_to(
    folder: Path, tmp_path: Path, change: Callable[..., Any], message: str
) -> None:
    fabricate.rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        import_model(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    tensors = import_model(str(folder), tmp_path / "out", allow=["*"]).checkpoint.tensors
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    assert name in tensors
    return {key: tensor for key, tensor in tensors.items() if key != name}


# Bad input: one clear error, and nothing half-written


def run(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    return int(stopped.value.code or 0)


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: str | Path) -> str:
    """What the command says; it fails with one error, and leaves nothing."""
    before = set(tmp_path.iterdir())
    assert run("weights", "import", *words, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.count("error:") == 1
    assert set(tmp_path.iterdir()) == before
    return said


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("exit 1",)


def test_a_released_checkpoint_that_is_cut_in_half(hub: Path, state: dict, tmp_path: Path, capsys: Any) -> None:
    path = fabricate.save_released(state, tmp_path / "osm_final.pt")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    said = refused(capsys, tmp_path, "--instructblip", hub, "--released", path)
    assert f"{path} cannot be read" in said
    assert "download it again" in said


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_a_shard_of_instructblip_that_is_cut_in_half(tmp_path: Path, capsys: Any, file_format: Any) -> None:
    folder = fabricate.instructblip(tmp_path / "broken", file_format)
    capsys.readouterr()
    shard = sorted(folder.glob("*model-*"))[2]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    assert f"{shard} cannot be read" in refused(capsys, tmp_path, "--instructblip", folder)
    shard.unlink()
    assert f"names {shard.name}, but" in refused(capsys, tmp_path, "--instructblip", folder)


def test_a_released_checkpoint_with_code_in_it(hub: Path, state: dict, tmp_path: Path, capsys: Any) -> None:
    torch.save({"model_state_dict": state, "hook": Code()}, tmp_path / "osm_final.pt")
    said = refused(capsys, tmp_path, "--instructblip", hub, "--released", tmp_path / "osm_final.pt")
    assert "posix.system" in said
    assert "Reading it would run the code in it, which is never done" in said


@pytest.mark.parametrize("part", ["text", "qformer", "vision", "patches"])
def test_a_checkpoint_of_another_instructblip(
    state: dict, tmp_path: Path, capsys: Any, monkeypatch: Any, part: str
) -> None:
    path = fabricate.save_released(state, tmp_path / "osm_final.pt")
    changes = {
        "text": ("LLM_WIDTH", 128, r"another shape: .*\(1, 1, 64\) for \(1, 1, 128\)"),
        "qformer": ("QFORMER_WIDTH", 24, r"another shape: mask_query \(1, 8, 48\) for \(1, 8, 24\)"),
        "vision": ("VISION_WIDTH", 48, r"another shape: window_pos_embed \(1, 68, 32\) for \(1, 68, 48\)"),
        "patches": ("WINDOW", 70, "window_pos_embed has 68 positions, which is no square of windows of 26 tokens"),
    }
    name, value, message = changes[part]
    monkeypatch.setattr(fabricate, name, value)
    other = fabricate.instructblip(tmp_path / "other")
    capsys.readouterr()
    said = refused(capsys, tmp_path, "--instructblip", other, "--released", path)
    assert re.search(message, said), said


def test_a_released_checkpoint_that_lacks_keys(hub: Path, state: dict, tmp_path: Path, capsys: Any) -> None:
    lost = [name for name in state if ".encoder.layer.3." in name]
    path = fabricate.save_released({name: t for name, t in state.items() if name not in lost}, tmp_path / "a.pt")
    said = refused(capsys, tmp_path, "--instructblip", hub, "--released", path)
    assert f"{len(lost)} missing: base_model.qformer.encoder.layer.3." in said
    assert f"and {len(lost) - 5} more" in said
    assert "--allow" in said


def test_a_file_of_another_program(hub: Path, tmp_path: Path, capsys: Any) -> None:
    torch.save({"model_state_dict": {"conv.weight": torch.zeros(2)}}, tmp_path / "a.pt")
    torch.save([1, 2], tmp_path / "b.pt")
    assert "is no checkpoint of OSM: none of" in refused(
        capsys, tmp_path, "--instructblip", hub, "--released", tmp_path / "a.pt"
    )
    assert "it holds a list" in refused(capsys, tmp_path, "--instructblip", hub, "--released", tmp_path / "b.pt")
    assert "no such file" in refused(capsys, tmp_path, "--instructblip", hub, "--released", tmp_path / "c.pt")


def test_a_hub_id_without_a_network(tmp_path: Path, capsys: Any) -> None:
    # Tests are offline (tests/conftest.py).
    said = refused(capsys, tmp_path, "--instructblip", "Salesforce/instructblip-vicuna-7b")
    assert "the hub does not give it" in said
    assert "download it elsewhere and give its folder" in said
    assert "there is no such folder" in refused(capsys, tmp_path, "--instructblip", "./nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "blip-2"}, "is a 'blip-2' by its config.json, but must be an 'instructblip'"),
        ({"text_config": {"model_type": "t5", "d_model": 64}}, "is a t5, which is no decoder-only causal LM"),
        ({"vision_config": {"hidden_size": "wide"}}, "config.json of .* cannot be used"),
        ({"qformer_config": {"hidden_act": "relu"}}, "uses 'relu', but InstructBLIP's uses 'gelu'"),
    ],
)
def test_a_folder_of_another_model(folder: Path, tmp_path: Path, capsys: Any, change: dict, message: str) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    for key, value in change.items():
        content[key] = content[key] | value if isinstance(value, dict) and key != "text_config" else value
    path.write_text(json.dumps(content))
    said = refused(capsys, tmp_path, "--instructblip", folder)
    assert re.search(message, said), said


@pytest.mark.parametrize("lost", ["config.json", "tokenizer.json", "qformer_tokenizer"])
def test_a_folder_that_lacks_a_part(folder: Path, tmp_path: Path, capsys: Any, lost: str) -> None:
    path = folder / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    said = refused(capsys, tmp_path, "--instructblip", folder)
    assert str(folder) in said
    assert ("config.json" if lost == "config.json" else "tokenizer") in said


def test_weights_that_do_not_fit_their_config(folder: Path, tmp_path: Path, capsys: Any) -> None:
    fabricate.rewrite(folder, lambda t: without(t, "language_model.model.norm.weight"))
    said = refused(capsys, tmp_path, "--instructblip", folder)
    assert "the LLM of" in said
    assert "1 missing: language_model.model.norm.weight" in said


def test_an_output_folder_that_exists_is_left_alone(hub: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out exists"):
        import_model(str(hub), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
