"""The released format both ways: every tensor bit for bit, modes by their key, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import fabricate
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from osm_lightning.commands import weights
from osm_lightning.weights.checkpoint import read_checkpoint
from osm_lightning.weights.released import read_released


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fabricate.instructblip(tmp_path_factory.mktemp("hub") / "instructblip")


@pytest.fixture(scope="module")
def state(folder: Path) -> dict[str, Tensor]:
    return fabricate.released(folder)


def bring_in(folder: Path, released: Path, out: Path, *words: str) -> Path:
    argv = ["import", "--instructblip", folder, "--released", released, "--out", out, *words]
    assert weights.main([str(word) for word in argv]) == 0
    return out


def bring_out(ckpt: Path, out: Path) -> dict[str, Tensor]:
    assert weights.main(["export", "--ckpt", str(ckpt), "--released", "--out", str(out)]) == 0
    content = torch.load(out, weights_only=True)
    assert content.keys() == {"model_state_dict"}
    return content["model_state_dict"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_round_trip_changes_no_bit(
    folder: Path, state: dict[str, Tensor], tmp_path: Path, wrapped: bool, dtype: torch.dtype
) -> None:
    given = {name: tensor.to(dtype) for name, tensor in state.items()}
    path = tmp_path / "osm_final.pt"
    if wrapped:
        fabricate.save_released(given, path)
    else:
        torch.save(given, path)
    back = bring_out(bring_in(folder, path, tmp_path / "model"), tmp_path / "back" / "osm_final.pt")
    assert back.keys() == given.keys()
    for name, tensor in given.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        assert torch.equal(back[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    assert back["base_model.query_tokens"].data_ptr() == back["context_query"].data_ptr(), "one parameter, as it was"


def test_the_file_goes_around_once_more(folder: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
    first = bring_in(folder, fabricate.save_released(state, tmp_path / "a.pt"), tmp_path / "first")
    bring_out(first, tmp_path / "b.pt")
    second = bring_in(folder, tmp_path / "b.pt", tmp_path / "second")
    for name, tensor in read_checkpoint(first).tensors.items():
        assert torch.equal(read_checkpoint(second).tensors[name], tensor)


def test_modes_go_by_their_key_and_not_by_their_place(folder: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
    shuffled = dict(sorted(state.items(), key=lambda item: hash(item[0][::-1]) % 97))
    checkpoint = read_checkpoint(bring_in(folder, fabricate.save_released(shuffled, tmp_path / "a.pt"), tmp_path / "m"))
    modes = checkpoint.modes
    assert set(modes) == {"agnostic", *fabricate.RELEASED_MODES} - {"any"}
    assert modes[0] == "agnostic"
    for row, mode in enumerate(modes):
        key = "any" if mode == "agnostic" else mode
        assert torch.equal(checkpoint.tensors["modes.query"][row], state[f"qformer_mode_query.{key}"][0, 0])
        assert torch.equal(checkpoint.tensors["modes.embedding"][row], state[f"mode_query.{key}"][0, 0])


def test_a_checkpoint_of_our_own_goes_out_in_the_released_format(
    folder: Path, state: dict[str, Tensor], tmp_path: Path
) -> None:
    assert weights.main(["import", "--instructblip", str(folder), "--modes", "a,b", "--out", str(tmp_path / "m")]) == 0
    back = bring_out(tmp_path / "m", tmp_path / "out.pt")
    assert back.keys() - state.keys() == {
        "mode_query.a",
        "mode_query.b",
        "qformer_mode_query.a",
        "qformer_mode_query.b",
    }
    with pytest.raises(ValueError, match=r"out\.pt exists"):
        bring_out(tmp_path / "m", tmp_path / "out.pt")


def test_a_model_that_the_format_has_no_place_for_is_refused(folder: Path, tmp_path: Path) -> None:
    assert weights.main(["import", "--instructblip", str(folder), "--out", str(tmp_path / "m")]) == 0
    path = tmp_path / "m" / "model.safetensors"
    tensors = dict(read_checkpoint(tmp_path / "m").tensors)
    for lost, more in (("qformer.context_query_QD", {}), (None, {"qformer.unheard_of.weight": torch.zeros(1)})):
        save_file({name: t.clone() for name, t in (tensors | more).items() if name != lost}, path)
        with pytest.raises(ValueError, match="released format has no place"):
            bring_out(tmp_path / "m", tmp_path / "out.pt")
        assert not list(tmp_path.glob("*out.pt*"))


def test_what_it_takes_to_resume_is_known(folder: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
    path = fabricate.save_released(state, tmp_path / "a.pt")
    read = read_released(path)
    assert read.extras == ["epoch", "optimizer_state_dict", "lr_scheduler_state_dict"]
    assert not read.strangers
    content = torch.load(path, weights_only=True)
    content["model_state_dict"]["module.base_model.qformer.embeddings.position_ids"] = torch.arange(64)[None]
    torch.save(content, path)
    bring_in(folder, path, tmp_path / "m")
    torch.save(content | {"teacher": 5}, path)
    with pytest.raises(ValueError, match="1 unexpected: teacher"):
        bring_in(folder, path, tmp_path / "n")


def test_context_queries_under_two_names_must_be_the_same(
    folder: Path, state: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(state | {"base_model.query_tokens": state["context_query"] + 1}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"context_query and base_model\.query_tokens.*differ"):
        bring_in(folder, tmp_path / "a.pt", tmp_path / "m")
    one = {name: tensor for name, tensor in state.items() if name != "base_model.query_tokens"}
    torch.save(one, tmp_path / "b.pt")
    read = read_checkpoint(bring_in(folder, tmp_path / "b.pt", tmp_path / "n"))
    assert torch.equal(read.tensors["qformer.context_query_QD"], state["context_query"][0])


def test_the_imported_config_carries_the_released_rules(folder: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
    ours = bring_in(folder, fabricate.save_released(state, tmp_path / "a.pt"), tmp_path / "m")
    model = yaml.safe_load((ours / "config.yaml").read_text())["model"]
    assert model["qformer"]["mask_rule"] == "nearest"
    assert model["qformer"]["context"] == 0.5
    assert model["max_new_tokens"] == 12
    assert (model["vision"]["image_size_px"], model["vision"]["window_size_px"]) == (fabricate.SIDE, fabricate.WINDOW)
    assert model["vision"]["dtype"] == model["language"]["dtype"] == "float16"
