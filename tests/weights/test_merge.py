"""Adapters folded into the LLM: the folder names as the checkpoint did, needs nothing of it, and says what it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from tiny_checkpoint import MODES, write_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from osm_lightning import OSM, NamedMask
from osm_lightning.commands import weights
from osm_lightning.model.config import LoraConfig
from osm_lightning.model.lora import is_adapter, plain_name
from osm_lightning.weights import own_tokenizers
from osm_lightning.weights.checkpoint import read_checkpoint

SAME = 1e-4
"""How near log probabilities are: set before any was measured."""
LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.1)
OF_QFORMER = LoraConfig(rank=2, alpha=8.0, targets=["query", "key", "value", "output", "inner"])


def merge(ckpt: Path, out: Path) -> None:
    assert weights.main(["merge", "--ckpt", str(ckpt), "--out", str(out)]) == 0


def named(ckpt: Path) -> list[NamedMask]:
    """Names of some boxes, in all modes."""
    rng = np.random.default_rng(0)
    pixels: NDArray[np.uint8] = rng.integers(0, 256, (100, 120, 3), dtype=np.uint8)
    masks = np.zeros((6, 100, 120), dtype=bool)
    for mask in masks:
        y, x = rng.integers(0, 60, size=2)
        mask[y : y + 40, x : x + rng.integers(10, 60)] = True
    return OSM.from_pretrained(ckpt, device="cpu").encode(pixels).name(masks, modes=MODES)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint with adapters, and the folder that was merged of it and moved, beside nothing else of the run."""
    folder = tmp_path_factory.mktemp("merge")
    (folder / "run").mkdir()
    ckpt = write_checkpoint(folder / "run", qformer={"lora": OF_QFORMER}, lora=LORA)
    merge(ckpt, folder / "merged")
    return ckpt, (folder / "merged").rename(folder / "moved")


def test_merged_names_and_probabilities_are_those_of_the_adapted_model(made: tuple[Path, Path]) -> None:
    wanted, found = map(named, made)
    for one, other in zip(wanted, found, strict=True):
        for mode in MODES:
            assert other.answers[mode].token_ids == one.answers[mode].token_ids
            assert other.answers[mode].name == one.answers[mode].name
            assert other.answers[mode].logprob == pytest.approx(one.answers[mode].logprob, abs=SAME)


@pytest.mark.parametrize("part", ["language", "qformer"])
def test_the_adapters_of_either_part_are_felt(made: tuple[Path, Path], part: str) -> None:
    """Else the above shows nothing."""
    content = torch.load(made[0], weights_only=True)
    content["state_dict"] = {
        name if ".llm." in name else (name if part == "language" else plain_name(name)): tensor
        for name, tensor in content["state_dict"].items()
        if not (is_adapter(name) and name.startswith(f"osm.{part}."))
    }
    config = yaml.safe_load(content["osm"]["config"])
    config["model"][part]["lora"] = None
    content["osm"]["config"] = yaml.safe_dump(config)
    ckpt = made[0].with_name(f"without-{part}.ckpt")
    torch.save(content, ckpt)
    gaps = [
        abs(one.answers[mode].logprob - other.answers[mode].logprob)
        for one, other in zip(named(made[0]), named(ckpt), strict=True)
        for mode in MODES
    ]
    assert max(gaps) > 100 * SAME


def test_it_holds_the_llm_and_what_was_trained_beside_it(made: tuple[Path, Path]) -> None:
    before, after = map(read_checkpoint, made)
    wanted = {plain_name(name): tensor for name, tensor in before.tensors.items() if not is_adapter(name)}
    assert after.tensors.keys() == wanted.keys() != before.tensors.keys()
    changed = {name for name, tensor in after.tensors.items() if not torch.equal(tensor, wanted[name])}
    besides = {plain_name(name) for name in before.tensors if name.endswith(".base_layer.weight")}
    assert changed == besides
    assert after.frozen["vision"] == before.frozen["vision"]
    assert after.frozen["language"] != before.frozen["language"]
    model = yaml.safe_load(after.config)["model"]
    assert model["language"]["name"] == str(made[1] / "language")
    assert model["language"]["lora"] is model["qformer"]["lora"] is None
    assert "own:language" in (made[1] / "config.yaml").read_text()
    card = (made[1] / "README.md").read_text()
    assert "The LLM is in this folder, with the adapters folded in" in card
    assert f"| language | `language/` in this folder | `{after.frozen['language']}` |" in card


def test_its_llm_is_one_of_transformers(made: tuple[Path, Path]) -> None:
    llm = AutoModelForCausalLM.from_pretrained(made[1] / "language")
    assert not [name for name in llm.state_dict() if "lora" in name or "base_layer" in name]
    assert len(AutoTokenizer.from_pretrained(made[1] / "language")) == 512
    assert json.loads((made[1] / "language" / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_llm_of_a_folder_with_tied_embeddings_is_left_as_it_was(tmp_path: Path, dtype: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(1)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=512, tie_word_embeddings=True, initializer_range=0.2, **sizes))
    base.save_pretrained(tmp_path / "base")
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    ckpt = write_checkpoint(tmp_path, lora=LORA, architecture=None, name=str(tmp_path / "base"), dtype=dtype)
    merge(ckpt, tmp_path / "merged")
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    shutil.rmtree(tmp_path / "base")
    assert len(named(tmp_path / "merged")) == 6, "the identity is that of the LLM in the folder"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "language", dtype="auto")
    assert loaded.dtype == getattr(torch, dtype)


def test_where_the_q_former_alone_has_adapters_the_llm_stays_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    ckpt = write_checkpoint(tmp_path / "run", qformer={"lora": OF_QFORMER})
    merge(ckpt, tmp_path / "merged")
    assert not (tmp_path / "merged" / "language" / "config.json").exists()
    assert read_checkpoint(tmp_path / "merged").frozen == read_checkpoint(ckpt).frozen
    for one, other in zip(named(ckpt), named(tmp_path / "merged"), strict=True):
        for mode in MODES:
            assert other.answers[mode].token_ids == one.answers[mode].token_ids
            assert other.answers[mode].logprob == pytest.approx(one.answers[mode].logprob, abs=SAME)
    # And the plain folder is what a Q-Former without adapters is opened with, and what one with new ones begins from.
    settings = {"model.qformer.lora": {"rank": 2, "targets": ["query"]}}
    with pytest.warns(UserWarning, match="no LoRA adapters of the qformer part"):
        again = OSM.from_pretrained(tmp_path / "merged", device="cpu", settings=settings)
    assert again.model.qformer.config.lora is not None


def test_adapters_beside_eight_bits_are_folded_into_what_these_were_made_of(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).save_pretrained(tmp_path / "base")
    plain = {"architecture": None, "name": str(tmp_path / "base")}
    ckpt = write_checkpoint(tmp_path, lora=LORA, quantize="8bit", **plain)
    merge(ckpt, tmp_path / "merged")
    language = OSM.from_pretrained(tmp_path / "merged", device="cpu").model.language
    assert language.config.quantize is None
    adapted = OSM.from_pretrained(ckpt, device="cpu", settings={"model.language.quantize": None}).model.language
    inputs = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(language.hidden(inputs), adapted.hidden(inputs), atol=1e-5, rtol=0)


def test_what_cannot_be_merged_is_said_and_nothing_is_left(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"no LoRA adapters, so that there is nothing to merge"):
        merge(made[1], tmp_path / "again")
    with pytest.raises(ValueError, match=r"moved exists\. Remove it"):
        merge(made[0], made[1])
    monkeypatch.setattr(own_tokenizers, "USUAL_FILES", ())  # so that the copy of the tokenizer lacks files
    with pytest.raises(ValueError, match="tokenizer"):
        merge(made[0], tmp_path / "half")
    assert not list(tmp_path.iterdir()), "not even a hidden folder"


def test_the_released_format_has_no_place_for_adapters(made: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has LoRA adapters.*`osm weights merge` first"):
        weights.main(["export", "--ckpt", str(made[0]), "--released", "--out", str(tmp_path / "osm_final.pt")])


def test_an_exported_checkpoint_keeps_its_adapters(made: tuple[Path, Path], tmp_path: Path) -> None:
    assert weights.main(["export", "--ckpt", str(made[0]), "--out", str(tmp_path / "out")]) == 0
    assert "| LoRA | rank 4 beside the LLM's q_proj, v_proj; folded" in (tmp_path / "out" / "README.md").read_text()
    for one, other in zip(named(made[0]), named(tmp_path / "out"), strict=True):
        assert other.answers == one.answers
