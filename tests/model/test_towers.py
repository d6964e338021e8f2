"""Every family of transformers' towers against the library's own forward pass, out of a folder as the hub has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from osm_lightning.model.config import VisionConfig
from osm_lightning.model.frozen import fingerprint
from osm_lightning.model.towers import FAMILIES, TransformersTower
from osm_lightning.model.vision import VisionEncoder

BLOCKS, WIDTH, PATCH, WINDOW = 3, 16, 4, 8
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": WINDOW,
    "patch_size": PATCH,
}
REGISTERS = {"num_register_tokens": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "dinov2": SIZES,
    "dinov2_with_registers": {**SIZES, **REGISTERS},
    "dinov3": {**SIZES, **REGISTERS},
    "clip": SIZES,
    "siglip": SIZES,
    "instructblip": SIZES,
}
CLS_TOKENS = {**dict.fromkeys(ARCHITECTURES, 1), "siglip": 0}
TEXT = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 12,
    "max_position_embeddings": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
FOLDERS = ["dinov2", "dinov2_with_registers", "dinov3", "clip", "siglip", "whole clip", "whole siglip"]


def vision_config(tower: str, **changes: Any) -> VisionConfig:
    sizes: dict[str, Any] = {"image_size_px": 2 * WINDOW, "window_size_px": WINDOW, "patch_size_px": PATCH}
    return VisionConfig(**{"tower": tower, "architecture": None, **sizes, **changes})


def vision_model(tower: str) -> Any:
    """The library's own, with random numbers also where it starts with zeros and ones."""
    family = FAMILIES[tower]
    config = getattr(transformers, family.config)(**ARCHITECTURES[tower])
    return randomised(getattr(transformers, family.model)(config))


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def save(what: str, folder: Path) -> Any:
    """Saves a tower's folder, or that of a whole contrastive model; returns the library's tower."""
    tower = what.split()[-1]
    if what == tower:
        model = vision_model(tower)
        model.save_pretrained(folder)
        return model
    kind = {"clip": "CLIP", "siglip": "Siglip"}[tower]
    sizes = {"vision_config": SIZES, "text_config": TEXT}
    whole = randomised(getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes)))
    whole.save_pretrained(folder)
    return whole.vision_model


def random_images(side: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=generator)


def normal(images: Tensor, tower: str) -> Tensor:
    mean, std = {
        "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
        "siglip": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    }.get(tower, ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return (images.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def image_tokens(tokens: Tensor, tower: str) -> Tensor:
    """CLS and patches of the library's tokens; registers lie between them, and SigLIP has no CLS."""
    patches = tokens[:, -((WINDOW // PATCH) ** 2) :]
    cls = tokens[:, :1] if CLS_TOKENS[tower] else patches.mean(1, keepdim=True)
    return torch.cat([cls, patches], 1)


@pytest.mark.parametrize("what", FOLDERS)
def test_every_hidden_state_is_the_librarys(tmp_path: Path, what: str) -> None:
    tower = what.split()[-1]
    model = save(what, tmp_path)
    images = random_images(WINDOW)
    with torch.no_grad():
        states = model(normal(images, tower), output_hidden_states=True).hidden_states
    assert len(states) == BLOCKS + 1
    norm = getattr(model, FAMILIES[tower].final_norm)
    for layer in (1, 2, None):
        wanted = states[BLOCKS if layer is None else layer]
        config = vision_config(tower, name=str(tmp_path), hidden_layer=layer, image_size_px=WINDOW, norm="none")
        features = VisionEncoder(config).features(images)
        torch.testing.assert_close(features, image_tokens(wanted, tower), atol=1e-5, rtol=1e-5)
        assert features.std() > 0.1
    config = vision_config(tower, name=str(tmp_path), image_size_px=WINDOW)
    cls, patches = image_tokens(states[-1], tower).detach().split([1, (WINDOW // PATCH) ** 2], 1)
    wanted = torch.cat([norm(cls), norm(patches)], 1).detach()
    torch.testing.assert_close(VisionEncoder(config).features(images), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tower", ["dinov2", "dinov2_with_registers", "dinov3", "clip", "siglip"])
def test_the_last_state_after_the_norm_is_what_the_library_gives(tmp_path: Path, tower: str) -> None:
    """At another size than its own, whose positions it interpolates."""
    model = save(tower, tmp_path)
    side = 3 * PATCH
    images = random_images(side)
    told = {"interpolate_pos_encoding": True} if tower in {"clip", "siglip"} else {}
    with torch.no_grad():
        wanted = model(normal(images, tower), **told).last_hidden_state[:, -9:]
        wanted = model.post_layernorm(wanted) if tower == "clip" else wanted  # CLIP's own norm is on CLS alone
    config = vision_config(tower, name=str(tmp_path), image_size_px=side, window_size_px=side)
    torch.testing.assert_close(VisionEncoder(config).features(images)[:, 1:], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tower", list(FAMILIES))
def test_a_tower_is_frozen_and_placed_block_by_block(tower: str) -> None:
    torch.manual_seed(0)
    placed: list[nn.Module] = []
    config = vision_config(tower, architecture=ARCHITECTURES[tower], hidden_layer=2, dtype="bfloat16")
    encoder = VisionEncoder(config, placed.append).train()
    assert isinstance(encoder.tower, TransformersTower)
    assert placed == list(encoder.tower.blocks())
    assert len(placed) == 2, "the block that is not needed is gone"
    assert not any(module.training for module in encoder.tower.modules())
    assert not any(parameter.requires_grad for parameter in encoder.tower.parameters())
    assert {parameter.dtype for parameter in encoder.tower.parameters()} == {torch.bfloat16}
    features = encoder.features(random_images(2 * WINDOW))
    assert features.shape == (2, 4 + 16, WIDTH)
    assert features.dtype == torch.float32
    assert features.isfinite().all()
    assert encoder.identity == fingerprint(encoder.tower)


def test_rotary_frequencies_stay_exact_in_half_precision() -> None:
    config = vision_config("dinov3", architecture=ARCHITECTURES["dinov3"], dtype="bfloat16")
    rope = VisionEncoder(config).tower.vit.rope_embeddings
    assert torch.equal(rope.inv_freq, vision_model("dinov3").rope_embeddings.inv_freq)


def test_what_a_whole_model_holds_besides_is_listed_and_no_surprise(tmp_path: Path) -> None:
    save("whole clip", tmp_path)
    report = VisionEncoder(vision_config("clip", name=str(tmp_path))).tower.report
    assert report is not None
    assert (report.surprises, report.part, report.dtypes) == ((), "vision tower", {"float32": 55})
    assert {name.split(".")[0] for name in report.extras} == {
        "logit_scale",
        "text_model",
        "text_projection",
        "visual_projection",
    }
    assert report.num_bytes == sum(p.nbytes for p in vision_model("clip").parameters())


def test_pixels_are_normalised_as_the_folder_says(tmp_path: Path) -> None:
    save("dinov3", tmp_path)
    assert VisionEncoder(vision_config("dinov3", name=str(tmp_path))).tower.mean == (0.485, 0.456, 0.406)
    said = {"image_mean": [0.43, 0.411, 0.296], "image_std": [0.213, 0.156, 0.143]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    encoder = VisionEncoder(vision_config("dinov3", name=str(tmp_path)))
    torch.testing.assert_close(encoder.mean_311.flatten(), torch.tensor(said["image_mean"]))
    torch.testing.assert_close(encoder.std_311.flatten(), torch.tensor(said["image_std"]))


class Run:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("code was run",)


def without(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def with_another(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "head.weight": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})


def of_another_width(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "intermediate_size": 20}))


def cut_off(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def with_code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"embeddings.class_embedding": Run()}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: without(folder, "post_layernorm.bias"), r"1 missing: post_layernorm\.bias.*random"),
        (with_another, r"1 unexpected: head\.weight"),
        (of_another_width, r"9 of another shape.*\(24, 16\) instead of \(20, 16\)"),
        (cut_off, "cannot be loaded.*Is the folder broken"),
        (with_code, "run the code in it, which is never done"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded.*no file named"),
        (lambda folder: (folder / "config.json").unlink(), r"no config\.json says"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Any, reason: str
) -> None:
    save("clip", tmp_path)
    VisionEncoder(vision_config("clip", name=str(tmp_path)))
    spoil(tmp_path)
    with pytest.raises(ValueError, match=rf"(?s)^vision\.name is '{tmp_path}'.*{reason}"):
        VisionEncoder(vision_config("clip", name=str(tmp_path)))
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model_type", "tower", "reason"),
    [
        (
            "siglip",
            "clip",
            r"a 'siglip' by its config\.json, but vision\.tower is 'clip'\. Set vision\.tower to siglip",
        ),
        ("dinov3_vit", "dinov2", r"Set vision\.tower to dinov3\."),
        ("siglip2", "siglip", "NaFlex.*SigLIP 2 of a fixed size"),
        ("swin", "dinov2", r"Towers that are read: dinov2, "),
    ],
)
def test_a_folder_of_another_family_is_named(tmp_path: Path, model_type: str, tower: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=reason):
        VisionEncoder(vision_config(tower, name=str(tmp_path)))


def test_a_hub_id_without_a_network_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"vision\.name is 'nobody/no-tower'.*where there is a network"):
        VisionEncoder(vision_config("siglip", name="nobody/no-tower"))
