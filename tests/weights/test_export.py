from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from osm_lightning.commands import weights
from osm_lightning.evaluation.naming import ScoreRow
from osm_lightning.weights.checkpoint import Checkpoint, read_checkpoint
from osm_lightning.weights.export import export, model_card

CONFIG = """\
model:
  vision: {name: weights/mini/vision, pretrained: null, architecture: null, image_size_px: 448, window_size_px: 224}
  language: {name: weights/mini/language, tokenizer: "builtin:512", architecture: null}
  modes: [coco, ade20k]
data:
  sources: {coco: {shards: data_shards/coco}, extra: {shards: data_shards/extra}}
"""
TENSORS = {"projection.weight": torch.ones(2, 3), "modes.query": torch.zeros(3, 4, dtype=torch.bfloat16)}
FROZEN = {"vision": "0123456789abcdef", "language": "fedcba9876543210"}


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    content = {"state_dict": {f"osm.{k}": v for k, v in TENSORS.items()}, "osm": {"config": CONFIG, "frozen": FROZEN}}
    torch.save({**content, "optimizer_states": [torch.zeros(10_000)]}, path)
    return path


def test_export_keeps_what_was_trained_and_leaves_the_optimizer(ckpt: Path, tmp_path: Path) -> None:
    out = tmp_path / "models" / "mine"
    assert weights.main(["export", "--ckpt", str(ckpt), "--out", str(out)]) == 0
    read = read_checkpoint(out)
    assert read.config == CONFIG
    assert read.frozen == FROZEN
    assert read.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read.tensors[name].dtype == tensor.dtype
        assert torch.equal(read.tensors[name], tensor)
    assert sum(path.stat().st_size for path in out.iterdir()) < 5_000


def test_exporting_again_changes_nothing_but_the_path_in_the_card(ckpt: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    export(str(ckpt), first)
    export(str(first), second)
    for path in first.iterdir():
        if path.name != "README.md":
            assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_card_says_what_it_is_and_how_it_is_used() -> None:
    card = model_card(Checkpoint(TENSORS, CONFIG, FROZEN), Path("models/mine"))
    assert card.startswith("# mine\n")
    assert "18 parameters, 48 bytes" in card
    assert "agnostic, coco, ade20k" in card
    assert "coco, extra" in card
    assert "| vision | `weights/mini/vision` | `0123456789abcdef` |" in card
    assert "| language | `weights/mini/language` | `fedcba9876543210` |" in card
    assert "osm predict --ckpt models/mine --images IMAGES --masks MASKS --modes agnostic,coco,ade20k --out" in card
    assert 'OSM.from_pretrained("models/mine").encode("photo.jpg")' in card
    assert 'scene.name(masks, modes=["agnostic", "coco", "ade20k"])' in card
    assert "Tokenizers: the LLM's is made by osm_lightning (`builtin:512`)." in card
    assert "optim" not in card


def test_card_says_where_an_open_clip_tower_and_random_parts_come_from() -> None:
    config = yaml.safe_load(CONFIG)
    config["model"]["vision"] |= {"name": "EVA01-g-14", "pretrained": "weights/eva.safetensors"}
    config["model"]["language"]["architecture"] = {"hidden_size": 64}
    card = model_card(Checkpoint(TENSORS, yaml.safe_dump(config), FROZEN), Path("two words"))
    assert "| vision | `EVA01-g-14`, `weights/eva.safetensors` |" in card
    assert "| language | random" in card
    assert "weights/mini/language" not in card
    assert "--ckpt 'two words'" in card


@pytest.mark.parametrize("config", ["", "model: {modes: []}", "model: 5"])
def test_a_config_that_is_not_a_runs_is_refused(ckpt: Path, tmp_path: Path, config: str) -> None:
    torch.save({"state_dict": {}, "osm": {"config": config, "frozen": {}}}, ckpt)
    with pytest.raises(ValueError, match=r"last\.ckpt: its config is not that of a run"):
        export(str(ckpt), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(ckpt: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out exists"):
        export(str(ckpt), tmp_path / "out")


def test_last_is_the_newest_run(ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="'last' does not exist"):
        export("last", tmp_path / "out")
    Path("runs").mkdir()
    ckpt.rename("runs/last.ckpt")
    assert export("last", tmp_path / "out").config == CONFIG


def test_help_teaches_and_does_not_import_torch() -> None:
    code = (
        "import sys\n"
        "from osm_lightning.commands.weights import main\n"
        "try: main(['export', '--help'])\n"
        "finally: print([name for name in ('torch', 'safetensors') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "osm weights export --ckpt last --out models/mine" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_half_keeps_every_tensor_in_two_bytes(ckpt: Path, tmp_path: Path) -> None:
    export(str(ckpt), tmp_path / "half", half=True)
    tensors = read_checkpoint(tmp_path / "half").tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert torch.equal(tensors["projection.weight"], TENSORS["projection.weight"].half())


def test_card_carries_the_scores_of_the_run(tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    path = checkpoints / "last.ckpt"
    torch.save({"state_dict": {}, "osm": {"config": CONFIG, "frozen": FROZEN}}, path)
    export(str(path), tmp_path / "without")
    assert "Scores" not in (tmp_path / "without" / "README.md").read_text()
    row = ScoreRow(
        "coco",
        "agnostic",
        num_masks=541,
        num_right=135,
        num_outside=0,
        acc=0.25,
        acc_strict=0.2,
        acc_balanced=0.1,
        niv=0.0,
        majority=0.3,
    )
    (tmp_path / "run" / "scores.json").write_text(json.dumps({"step": 375, "scores": [asdict(row)]}))
    export(str(path), tmp_path / "with")
    card = (tmp_path / "with" / "README.md").read_text()
    assert "after 375 steps" in card
    assert "| coco | agnostic | 541 | 0.2500 | 0.2000 | 0.1000 | 0.0000 |" in card
