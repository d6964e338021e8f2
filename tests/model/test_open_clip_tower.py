"""open_clip's towers, native and timm's, against its own forward passes, and the weights that it is given."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from osm_lightning.model.config import VisionConfig
from osm_lightning.model.towers import OpenClipTower
from osm_lightning.model.vision import VisionEncoder

NATIVE = {"image_size": 16, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8, "mlp_ratio": 2.0}
TIMM = {"image_size": 28, "timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": None}
POOLED = {"image_size": 8, "timm_model_name": "osm_test_pooled_vit", "timm_pool": "avg", "timm_proj": "linear"}
EVA = {"image_size": 8, "timm_model_name": "osm_test_eva", "timm_pool": "token", "timm_proj": None}
TEXT = {"context_length": 4, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1}


@register_model
def osm_test_pooled_vit(pretrained: bool = False, **options: Any) -> nn.Module:
    """A ViT of timm without CLS, as SigLIP's are; open_clip makes it by this name."""
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    vit = VisionTransformer(class_token=False, global_pool="avg", num_classes=0, **sizes)
    vit.default_cfg = {}
    return vit


@register_model
def osm_test_eva(pretrained: bool = False, **options: Any) -> nn.Module:
    """EVA01-g's architecture, small: q, k and v in one, a bias of zeros for k, learnt positions."""
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
    vit = Eva(mlp_ratio=6144 / 1408, num_classes=0, global_pool=options["global_pool"], **sizes)
    vit.default_cfg = {}
    return vit


def random_images(side: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=generator)


@pytest.fixture
def open_clip_names(tmp_path: Path) -> dict[str, str]:
    """Registers two small models; open_clip keeps them for the rest of the process."""
    names = {}
    for family, vision in {"native": NATIVE, "timm": TIMM, "pooled": POOLED, "eva": EVA}.items():
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


@pytest.mark.parametrize("layer", [2, None])
@pytest.mark.parametrize(("family", "patch_px", "window_px"), [("native", 8, 16), ("timm", 14, 28), ("eva", 4, 8)])
def test_tokens_are_those_of_its_own_forward_pass(
    open_clip_names: dict[str, str], family: str, patch_px: int, window_px: int, layer: int | None
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


@pytest.mark.parametrize(("family", "patch_px", "window_px"), [("native", 8, 16), ("timm", 14, 28), ("eva", 4, 8)])
def test_a_tower_runs_in_half_precision(
    open_clip_names: dict[str, str], family: str, patch_px: int, window_px: int
) -> None:
    sizes: dict[str, Any] = {"image_size_px": window_px, "window_size_px": window_px, "patch_size_px": patch_px}
    features = []
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        encoder = VisionEncoder(VisionConfig(name=open_clip_names[family], dtype=dtype, **sizes))
        features.append(encoder.features(random_images(window_px)))
    assert {parameter.dtype for parameter in encoder.tower.parameters()} == {torch.bfloat16}
    assert 0 < (features[1] - features[0]).abs().mean() < 0.05


def native_config(names: dict[str, str], weights: Path | str | None, **changes: Any) -> VisionConfig:
    sizes: dict[str, Any] = {"image_size_px": 32, "window_size_px": 16, "patch_size_px": 8}
    return VisionConfig(
        **{"name": names["native"], "pretrained": None if weights is None else str(weights), **sizes, **changes}
    )


def test_the_mean_of_the_patches_stands_for_a_cls_that_is_not_there(open_clip_names: dict[str, str]) -> None:
    torch.manual_seed(0)
    config = VisionConfig(name=open_clip_names["pooled"], image_size_px=8, window_size_px=8, patch_size_px=4)
    encoder = VisionEncoder(config)
    tower = encoder.tower
    assert isinstance(tower, OpenClipTower)
    trunk: Any = tower.visual.trunk
    with torch.no_grad():
        trunk.fc_norm.weight.uniform_(0.5, 2)
        trunk.fc_norm.bias.normal_()
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (tower.mean, tower.std))
    pixels = (random_images(8).float() / 255 - mean) / std
    with torch.no_grad():
        wanted = trunk.forward_features(pixels)
        pooled = trunk.forward_head(wanted)
    cls, patches = tower(pixels)
    torch.testing.assert_close(patches, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cls, wanted.mean(1), atol=1e-5, rtol=1e-5)
    features = encoder.features(random_images(8))
    assert isinstance(trunk.norm, nn.Identity)
    torch.testing.assert_close(features[:, 0], pooled, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_local_weight_file_is_loaded(open_clip_names: dict[str, str], tmp_path: Path, ending: str) -> None:
    model = open_clip.create_model(open_clip_names["native"], pretrained=None)
    path = tmp_path / f"weights.{ending}"
    if ending == "pt":
        torch.save(model.state_dict(), path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    loaded = VisionEncoder(native_config(open_clip_names, path)).tower.visual.state_dict()
    for name, tensor in model.visual.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


class Run:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("code was run",)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda weights: weights.pop("visual.proj"), r"Missing key.*visual\.proj"),
        (lambda weights: weights.update({"visual.more": torch.ones(1)}), r"Unexpected key.*visual\.more"),
        (lambda weights: weights.update({"visual.proj": torch.ones(64, 5)}), "size mismatch"),
        (lambda weights: weights.update({"run": Run()}), "run the code in it, which is never done"),
    ],
)
def test_a_weight_file_that_does_not_fit_or_holds_code_is_refused(
    open_clip_names: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Any, reason: str
) -> None:
    weights = open_clip.create_model(open_clip_names["native"], pretrained=None).state_dict()
    spoil(weights)
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=rf"^vision\.pretrained is '{tmp_path}/weights\.pt'.*{reason}"):
        VisionEncoder(native_config(open_clip_names, tmp_path / "weights.pt"))
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_weight_file_that_is_cut_off_is_one_error(
    open_clip_names: dict[str, str], tmp_path: Path, ending: str
) -> None:
    weights = open_clip.create_model(open_clip_names["native"], pretrained=None).state_dict()
    path = tmp_path / f"weights.{ending}"
    torch.save(weights, path) if ending == "pt" else save_file(weights, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=rf"^vision\.pretrained is '{path}', which cannot be loaded"):
        VisionEncoder(native_config(open_clip_names, path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained": "weights/none.pt"}, r"vision\.pretrained is 'weights/none\.pt', but there is no such"),
        ({"pretrained": "laion2b"}, r"vision\.pretrained is 'laion2b', which is neither.*Its tags: none"),
        ({"pretrained": "laion2b", "name": "ViT-L-14"}, r"Its tags: openai, .*laion2b_s32b_b82k"),
        ({"pretrained": "openai", "name": "ViT-L-14"}, r"another GELU.*vision\.name to ViT-L-14-quickgelu"),
        ({"name": "RN50"}, "no ViT"),
    ],
)
def test_weights_and_models_that_cannot_be_used_are_named_before_any_download(
    open_clip_names: dict[str, str], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        VisionEncoder(native_config(open_clip_names, None, **changes))


def test_a_missing_weight_file_is_named(open_clip_names: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"vision.pretrained is '{tmp_path}/none.pt', but there is no")):
        VisionEncoder(native_config(open_clip_names, tmp_path / "none.pt"))
