"""InstructBLIP's vision tower, Q-Former and LLM, loaded out of its folder, compute what transformers' own do."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from naive_released import CLIP_MEAN, CLIP_STD, NaiveReleased
from PIL import Image
from torch import Tensor
from transformers import InstructBlipForConditionalGeneration

from osm_lightning.batch import MaskBatch, mode_index
from osm_lightning.data.collate import collate
from osm_lightning.data.sample import Labels, View, whole_sample
from osm_lightning.data.text import TextCodec
from osm_lightning.evaluation.segments import read_segments
from osm_lightning.model.config import LanguageConfig, QFormerConfig, VisionConfig
from osm_lightning.model.instructblip import is_instructblip
from osm_lightning.model.language import LanguageModel
from osm_lightning.model.osm import OSM
from osm_lightning.model.vision import VisionEncoder
from osm_lightning.naming.greedy import prompt_embeddings
from osm_lightning.weights.instructblip_import import import_model
from osm_lightning.weights.trained import load_trained

sys.path.insert(0, str(Path(__file__).parents[1] / "weights"))
import fabricate

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fabricate.instructblip(tmp_path_factory.mktemp("hub") / "instructblip")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> InstructBlipForConditionalGeneration:
    return InstructBlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def vision_config(folder: Path, **changes: object) -> VisionConfig:
    sizes = {"image_size_px": fabricate.SIDE, "window_size_px": fabricate.WINDOW, "patch_size_px": fabricate.PATCH}
    return VisionConfig(**{"tower": "instructblip", "name": str(folder), **sizes, **changes})  # type: ignore[arg-type]


def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, fabricate.SIDE, fabricate.SIDE), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def test_the_tower_gives_the_last_hidden_state_of_every_window(
    folder: Path, theirs: InstructBlipForConditionalGeneration
) -> None:
    features = VisionEncoder(vision_config(folder)).features(images())
    of_window, side = fabricate.WINDOW // fabricate.PATCH, fabricate.SIDE // fabricate.PATCH
    grid = features[:, 4:].view(2, side, side, -1)
    pixels = (images().float() / 255 - CLIP_MEAN) / CLIP_STD
    for window in range(4):
        row, column = divmod(window, 2)
        y, x = row * fabricate.WINDOW, column * fabricate.WINDOW
        tokens = theirs.vision_model(pixels[:, :, y : y + fabricate.WINDOW, x : x + fabricate.WINDOW]).last_hidden_state
        here = grid[:, row * of_window : (row + 1) * of_window, column * of_window : (column + 1) * of_window]
        torch.testing.assert_close(features[:, window], tokens[:, 0], **CLOSE)
        torch.testing.assert_close(here.flatten(1, 2), tokens[:, 1:], **CLOSE)


@torch.no_grad()
def test_any_block_and_the_whole_image_at_once(folder: Path, theirs: InstructBlipForConditionalGeneration) -> None:
    pixels = (images().float() / 255 - CLIP_MEAN) / CLIP_STD
    window = VisionEncoder(vision_config(folder, image_size_px=fabricate.WINDOW, hidden_layer=1, norm="none"))
    states = theirs.vision_model(pixels[:, :, : fabricate.WINDOW, : fabricate.WINDOW], output_hidden_states=True)
    features = window.features(images()[:, :, : fabricate.WINDOW, : fabricate.WINDOW])
    torch.testing.assert_close(features, states.hidden_states[1], **CLOSE)
    assert len(list(window.tower.blocks())) == 1
    whole = VisionEncoder(vision_config(folder, use_windows=False)).features(images())
    wanted = theirs.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(whole, wanted, **CLOSE)


@torch.no_grad()
def test_the_llm_says_what_transformers_says(folder: Path, theirs: InstructBlipForConditionalGeneration) -> None:
    assert is_instructblip(str(folder))
    ours = LanguageModel(LanguageConfig(str(folder), dtype="float32"))
    ids = torch.randint(3, 500, (2, 20), generator=torch.Generator().manual_seed(0))
    wanted = theirs.language_model(ids).logits
    torch.testing.assert_close(ours.logits(ours.hidden(ours.embed(ids))), wanted, **CLOSE)
    assert wanted.std() > 0.1, "an LLM that says the same of everything shows nothing"


def test_frozen_parts_are_pages_of_their_file(folder: Path) -> None:
    files = {str(path) for path in folder.glob("*.safetensors")}
    ranges = []
    model = LanguageModel(LanguageConfig(str(folder), dtype="float32"))
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, name = line.split()
        if name in files:
            low, _, high = addresses.partition("-")
            ranges.append((int(low, 16), int(high, 16)))
    for name, parameter in model.llm.named_parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in ranges), f"{name} was copied"


def imported(folder: Path, released: dict[str, Tensor], out: Path) -> OSM:
    path = fabricate.save_released(released, out.with_suffix(".pt"))
    checkpoint = import_model(str(folder), out, path, dtype="float32").checkpoint
    model = yaml.safe_load(checkpoint.config)["model"]
    vision, qformer = VisionConfig(**model["vision"]), QFormerConfig(**model["qformer"])
    osm = OSM(vision, qformer, LanguageConfig(**model["language"]), model["modes"])
    report = load_trained(osm, checkpoint)
    assert not report.surprises
    return osm.eval()


def batch_of(osm: OSM, images_folder: Path, masks_folder: Path) -> MaskBatch:
    config, qformer = osm.vision.config, osm.qformer.config
    view = View(config.image_size_px, config.patch_size_px, qformer.context, mask_rule=qformer.mask_rule)
    codec = TextCodec(osm.language.config.name, qformer.instruction_tokenizer)
    records = read_segments(images_folder, masks_folder)
    return collate([whole_sample(record, Labels("x"), view, codec) for record in records], datasets=("x",))


@torch.no_grad()
def test_what_the_llm_reads_of_a_mask_is_what_transformers_modules_make(folder: Path, tmp_path: Path) -> None:
    """Q-Former with the instruction's text and a mask for every query, projection, mode and prompt."""
    released = fabricate.released(folder)
    osm = imported(folder, released, tmp_path / "model")
    rng = np.random.default_rng(1)
    (tmp_path / "images").mkdir()
    (tmp_path / "masks" / "a").mkdir(parents=True)
    Image.fromarray(rng.integers(0, 256, (70, 100, 3), dtype=np.uint8)).save(tmp_path / "images" / "a.png")
    for name, (y, x, height, width) in {"1": (3, 5, 40, 30), "2": (69, 99, 1, 1), "3": (50, 0, 20, 90)}.items():
        mask = np.zeros((70, 100), dtype=np.uint8)
        mask[y : y + height, x : x + width] = 255
        Image.fromarray(mask).save(tmp_path / "masks" / "a" / f"{name}.png")
    batch = batch_of(osm, tmp_path / "images", tmp_path / "masks")
    naive = NaiveReleased(folder, released, fabricate.SIDE)
    image_NE = naive.image_tokens(naive.pixels(tmp_path / "images" / "a.png"))
    encoded = osm.encode(batch.images_I3SS)
    for mode in ("any", "coco", "cityscapes"):
        ours = prompt_embeddings(osm, encoded, batch.in_mode(mode_index(mode, osm.modes.names)))
        assert len(ours) == 3
        for name, rows_XZ in zip(batch.mask_ids, ours, strict=True):
            mask_SS = naive.mask_on_input(tmp_path / "masks" / "a" / f"{name}.png")
            torch.testing.assert_close(rows_XZ, naive.llm_input(image_NE, mask_SS, mode), **CLOSE)
