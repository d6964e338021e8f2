"""Frozen towers against the libraries' own forward passes, and what the encoder makes of windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from osm_lightning.model.config import VisionConfig
from osm_lightning.model.towers import OpenClipTower
from osm_lightning.model.vision import VisionEncoder

BLOCKS, WIDTH, PATCH, WINDOW = 3, 12, 4, 8
ARCHITECTURE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "image_size": WINDOW,
    "patch_size": PATCH,
    "initializer_range": 0.3,
}


def dinov2_config(**changes: Any) -> VisionConfig:
    sizes: dict[str, Any] = {"image_size_px": 24, "window_size_px": WINDOW, "patch_size_px": PATCH}
    return VisionConfig(**{"tower": "dinov2", "architecture": ARCHITECTURE, **sizes, **changes})


def random_images(side: int, number: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (number, 3, side, side), dtype=torch.uint8, generator=generator)


def imagenet_normal(images: Tensor) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


@pytest.fixture
def saved_dinov2(tmp_path: Path) -> tuple[str, Dinov2Model]:
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**ARCHITECTURE)).eval()
    with torch.no_grad():  # a norm that does something
        model.layernorm.weight.copy_(torch.rand(WIDTH) + 0.5)
        model.layernorm.bias.copy_(torch.randn(WIDTH))
    model.save_pretrained(tmp_path / "dinov2")
    return str(tmp_path / "dinov2"), model


class TestDinov2:
    @pytest.mark.parametrize("layer", [1, 2, BLOCKS, None])
    def test_hidden_layer_counts_as_transformers_counts(
        self, saved_dinov2: tuple[str, Dinov2Model], layer: int | None
    ) -> None:
        folder, model = saved_dinov2
        images = random_images(WINDOW)
        with torch.no_grad():
            states = model(imagenet_normal(images), output_hidden_states=True).hidden_states
        assert len(states) == BLOCKS + 1
        wanted = states[BLOCKS if layer is None else layer]
        sizes = {"image_size_px": WINDOW, "architecture": None, "name": folder, "hidden_layer": layer}
        for norm, expected in {
            "none": wanted,
            "plain": F.layer_norm(wanted, (WIDTH,)),
            "final": model.layernorm(wanted),
        }.items():
            features = VisionEncoder(dinov2_config(norm=norm, **sizes)).features(images)
            torch.testing.assert_close(features, expected.detach(), atol=1e-5, rtol=1e-5)

    def test_tokens_are_cls_of_every_window_then_patches_of_the_image(self) -> None:
        torch.manual_seed(0)
        encoder = VisionEncoder(dinov2_config())
        images = random_images(24)
        features = encoder.features(images)
        assert features.shape == (2, 9 + 36, WIDTH)
        with torch.no_grad():
            for window in range(9):
                row, column = divmod(window, 3)
                pixels = images[:, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
                tokens = encoder.tower.vit(imagenet_normal(pixels)).last_hidden_state
                grid = features[:, 9:].view(2, 6, 6, WIDTH)[:, row * 2 : row * 2 + 2, column * 2 : column * 2 + 2]
                torch.testing.assert_close(features[:, window], tokens[:, 0], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(grid.flatten(1, 2), tokens[:, 1:], atol=1e-5, rtol=1e-5)

    def test_without_windows_the_tower_sees_the_whole_image(self) -> None:
        torch.manual_seed(0)
        encoder = VisionEncoder(dinov2_config(use_windows=False))
        images = random_images(24)
        with torch.no_grad():
            wanted = encoder.tower.vit(imagenet_normal(images)).last_hidden_state
        assert wanted.shape == (2, 1 + 36, WIDTH)
        torch.testing.assert_close(encoder.features(images), wanted, atol=1e-5, rtol=1e-5)

    def test_the_size_of_a_chunk_changes_nothing(self) -> None:
        torch.manual_seed(0)
        encoder = VisionEncoder(dinov2_config())
        images = random_images(24)
        wanted = encoder.features(images)
        encoder.config.windows_per_chunk = 5
        torch.testing.assert_close(encoder.features(images), wanted, atol=1e-6, rtol=1e-6)

    def test_only_the_position_is_trained_and_the_tower_stays_in_eval(self) -> None:
        encoder = VisionEncoder(dinov2_config()).train()
        assert encoder.training
        assert not any(module.training for module in encoder.tower.modules())
        assert [name for name, p in encoder.named_parameters() if p.requires_grad] == ["position_NE"]
        tokens = encoder(random_images(24))
        tokens.sum().backward()
        assert all(parameter.grad is None for parameter in encoder.tower.parameters())
        # The position is added once to every image.
        assert torch.equal(encoder.position_NE.grad, torch.full_like(encoder.position_NE, 2.0))

    def test_the_position_is_added_with_the_deviation_that_is_asked_for(self) -> None:
        torch.manual_seed(0)
        encoder = VisionEncoder(dinov2_config(position_std=3.0))
        images = random_images(24)
        torch.testing.assert_close(encoder(images), encoder.features(images) + encoder.position_NE)
        assert encoder.position_NE.std().item() == pytest.approx(3.0, rel=0.15)

    def test_a_half_precision_tower_hands_on_single_precision(self) -> None:
        torch.manual_seed(0)
        exact = VisionEncoder(dinov2_config())
        rounded = VisionEncoder(dinov2_config(dtype="bfloat16"))
        rounded.tower.load_state_dict(exact.tower.state_dict())
        assert {p.dtype for p in rounded.tower.parameters()} == {torch.bfloat16}
        assert rounded.position_NE.dtype == torch.float32
        images = random_images(24)
        features = rounded.features(images)
        assert features.dtype == torch.float32
        difference = (features - exact.features(images)).abs()
        assert 0 < difference.mean() < 0.05


NATIVE = {"image_size": 16, "layers": BLOCKS, "width": 64, "head_width": 32, "patch_size": 8, "mlp_ratio": 2.0}
TIMM = {"image_size": 28, "timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": None}
TEXT = {"context_length": 4, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1}


@pytest.fixture
def open_clip_names(tmp_path: Path) -> dict[str, str]:
    """Registers two small models; open_clip keeps them for the rest of the process."""
    names = {}
    for family, vision in {"native": NATIVE, "timm": TIMM}.items():
        names[family] = f"osm-test-{family}"
        path = tmp_path / f"{names[family]}.json"
        path.write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": TEXT}))
        open_clip.add_model_config(path)
    return names


def hidden_states(visual: nn.Module, blocks: nn.Module, norm: nn.Module, pixels: Tensor) -> list[Tensor]:
    """What every block and then the final norm give in the library's own forward pass."""
    states: list[Tensor] = []
    hooks = [part.register_forward_hook(lambda _m, _i, out: states.append(out)) for part in (*blocks, norm)]
    visual(pixels)
    for hook in hooks:
        hook.remove()
    return states


class TestOpenClip:
    @pytest.mark.parametrize("layer", [2, None])
    @pytest.mark.parametrize(("family", "patch_px", "window_px"), [("native", 8, 16), ("timm", 14, 28)])
    def test_tokens_are_those_of_its_own_forward_pass(
        self, open_clip_names: dict[str, str], family: str, patch_px: int, window_px: int, layer: int | None
    ) -> None:
        torch.manual_seed(0)
        config = VisionConfig(
            name=open_clip_names[family],
            image_size_px=2 * window_px,
            window_size_px=window_px,
            patch_size_px=patch_px,
            hidden_layer=layer,
        )
        encoder = VisionEncoder(config)
        assert isinstance(encoder.tower, OpenClipTower)
        visual = encoder.tower.visual
        trunk = getattr(visual, "trunk", None)
        blocks = visual.transformer.resblocks if trunk is None else trunk.blocks
        norm = visual.ln_post if trunk is None else trunk.norm
        images = random_images(window_px)
        mean, std = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)
        pixels = (images.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        states = hidden_states(visual, blocks, norm, pixels)
        assert len(states) == len(blocks) + 1
        wanted = states[-2 if layer is None else layer - 1]

        cls, patches = encoder.tower(pixels)
        torch.testing.assert_close(torch.cat([cls.unsqueeze(1), patches], 1), wanted, atol=1e-5, rtol=1e-5)
        if layer is None:
            torch.testing.assert_close(encoder.tower.final_norm(patches), states[-1][:, 1:], atol=1e-5, rtol=1e-5)
        # The encoder normalises with the model's numbers, applies the final norm and puts windows where they belong.
        canvas = torch.zeros(2, 3, 2 * window_px, 2 * window_px, dtype=torch.uint8)
        canvas[:, :, :window_px, window_px:] = images
        side = window_px // patch_px
        features = encoder.features(canvas)
        grid = features[:, 4:].unflatten(1, (2 * side, 2 * side))[:, :side, side:].flatten(1, 2)
        torch.testing.assert_close(grid, norm(wanted[:, 1:]), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(features[:, 1], norm(wanted[:, 0]), atol=1e-4, rtol=1e-4)

    def test_a_local_weight_file_is_loaded(self, open_clip_names: dict[str, str], tmp_path: Path) -> None:
        model = open_clip.create_model(open_clip_names["native"], pretrained=None)
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        config = VisionConfig(
            name=open_clip_names["native"],
            pretrained=str(tmp_path / "weights.pt"),
            image_size_px=32,
            window_size_px=16,
            patch_size_px=8,
        )
        loaded = VisionEncoder(config).tower.visual.state_dict()
        for name, tensor in model.visual.state_dict().items():
            assert torch.equal(loaded[name], tensor), name


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"patch_size_px": 2}, r"vision\.patch_size_px is 2.*are 4 px"),
            ({"image_size_px": 28}, r"vision\.image_size_px is 28.*multiple of 8.*Use (24|32)"),
            ({"image_size_px": 4}, r"vision\.image_size_px is 4.*multiple of 8.*Use 8"),
            ({"image_size_px": 26, "use_windows": False}, r"vision\.image_size_px is 26.*multiple of 4"),
            ({"window_size_px": 10}, r"vision\.window_size_px is 10.*multiple of patch_size_px"),
            ({"hidden_layer": 0}, r"vision\.hidden_layer is 0.*1 to 3"),
            ({"hidden_layer": 4}, r"vision\.hidden_layer is 4.*1 to 3"),
            ({"architecture": None, "name": "weights/nowhere"}, r"vision\.name is 'weights/nowhere'"),
            ({"tower": "open_clip", "name": "ViT-nothing"}, r"vision\.name is 'ViT-nothing'.*open_clip"),
        ],
    )
    def test_sizes_and_names_that_cannot_be_are_refused(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            VisionEncoder(dinov2_config(**changes))

    def test_a_missing_weight_file_is_named(self, open_clip_names: dict[str, str], tmp_path: Path) -> None:
        config = VisionConfig(name=open_clip_names["native"], pretrained=str(tmp_path / "none.pt"))
        with pytest.raises(ValueError, match=r"vision\.pretrained is .*none\.pt"):
            VisionEncoder(config)
