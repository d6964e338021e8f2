"""What the encoder makes of windows, norms and chunks, with a tower against the library's own forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from osm_lightning.model.config import VisionConfig
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
