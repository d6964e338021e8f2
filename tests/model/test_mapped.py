"""Folders of weights: shards of both formats, what breaks them, and memory that is given back."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.models.eva import Eva
from torch import Tensor, nn

from osm_lightning.model.frozen import fingerprint, freeze, place
from osm_lightning.model.mapped import give_back, read_file, read_folder

FIRST = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.float16)}
SECOND = {"c": torch.zeros(1, dtype=torch.int64)}


class Code:
    """A pickle that wants to run something."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("exit 1",)


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


def sharded(folder: Path, stem: str, ending: str) -> Path:
    index = {name: f"{stem}-{number}{ending}" for number, part in enumerate((FIRST, SECOND)) for name in part}
    for number, part in enumerate((FIRST, SECOND)):
        write(folder / f"{stem}-{number}{ending}", part)
    (folder / f"{stem}{ending}.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


FORMATS = [("model", ".safetensors"), ("pytorch_model", ".bin")]


@pytest.mark.parametrize(("stem", "ending"), FORMATS)
def test_shards_and_single_files_are_read_as_they_are(tmp_path: Path, stem: str, ending: str) -> None:
    sharded(tmp_path, stem, ending)
    (tmp_path / "single").mkdir()
    write(tmp_path / "single" / f"{stem}{ending}", FIRST | SECOND)
    for folder in (tmp_path, tmp_path / "single"):
        tensors = read_folder(folder)
        assert tensors.keys() == {"a", "b", "c"}
        for name, tensor in (FIRST | SECOND).items():
            assert tensors[name].dtype == tensor.dtype
            assert torch.equal(tensors[name], tensor)


@pytest.mark.parametrize(("stem", "ending"), FORMATS)
def test_a_file_that_is_cut_off_is_named(tmp_path: Path, stem: str, ending: str) -> None:
    path = tmp_path / f"{stem}{ending}"
    write(path, {"a": torch.zeros(100_000)})
    for share in (0.999, 0.5, 0.0):
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=rf"{path.name} cannot be read: .*download it again"):
            read_folder(tmp_path)
        path.write_bytes(whole)


def test_code_in_a_file_of_weights_is_not_run(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1), "b": Code()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"more than tensors.*posix\.system.*never done"):
        read_folder(tmp_path)


def test_what_is_no_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no weights"):
        read_folder(tmp_path)
    torch.save([1, 2], tmp_path / "list.bin")
    torch.save({"a": 1}, tmp_path / "number.bin")
    for name in ("list.bin", "number.bin"):
        with pytest.raises(ValueError, match=f"{name} is no file of weights"):
            read_file(tmp_path / name)


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path: Path) -> None:
    index = sharded(tmp_path, "model", ".safetensors") / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    for change, message in (
        ({"d": "model-1.safetensors"}, "1 tensors that its files lack, d among them"),
        ({"d": "model-2.safetensors"}, r"model-2\.safetensors, but .* has no such file"),
        ({"d": "../model-1.safetensors"}, "not in its folder"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map | change}))
        with pytest.raises(ValueError, match=message):
            read_folder(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="is no index of shards"):
        read_folder(tmp_path)


def resident_mb() -> float:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_pages_that_are_given_back_are_free_and_can_be_read_again(tmp_path: Path, ending: str) -> None:
    values = torch.randn(8_000_000)
    write(tmp_path / f"w{ending}", {"w": values})
    mapped = read_file(tmp_path / f"w{ending}")["w"]
    before = resident_mb()
    total = float(mapped.sum())
    touched = resident_mb()
    assert touched > before + 20
    give_back([mapped])
    assert resident_mb() < touched - 20
    assert float(mapped.sum()) == total


def test_memory_that_is_no_file_s_is_left_alone() -> None:
    own = torch.ones(4_000_000)
    give_back([own])
    assert bool((own == 1).all())


class Block(nn.Module):
    """A linear layer, and a number that is computed and not saved, as the frequencies of rotary embeddings are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("frequency", torch.tensor([1 / 3]), persistent=False)
        self.register_buffer("scale", torch.tensor([1 / 3]))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(3, 2)
        self.head.weight = nn.Parameter(torch.randn(2, 3))


def test_placing_converts_what_was_loaded_and_leaves_what_was_computed() -> None:
    model = freeze(Two())
    identity = fingerprint(model)
    seen: list[nn.Module] = []
    assert place(model, model.blocks, torch.bfloat16, seen.append) == identity
    assert seen == list(model.blocks)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.blocks[0].scale.dtype == torch.bfloat16
    assert model.blocks[0].frequency.dtype == torch.float32
    assert float(model.blocks[1].frequency) == pytest.approx(1 / 3, abs=1e-7)
    assert fingerprint(model) == identity


def test_a_computed_bias_goes_along_with_the_weights_that_it_is_added_to() -> None:
    """timm's EVA, of which EVA01-g-14 is one: its keys have a bias of zeros that is no weight."""
    torch.manual_seed(0)
    model = freeze(Eva(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=0))
    pixels = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        exact = model(pixels)
        place(model, model.blocks, torch.bfloat16, None)
        rough = model(pixels.bfloat16())
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, atol=0.1, rtol=0)
