"""Prints parameters, patch and native size of the towers that docs/towers.md lists.

    python benchmarks/tower_sizes.py

Nothing is loaded or computed: models are built on the meta device, transformers' with the sizes of the published
configs, which stand below.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import open_clip
import timm
import torch
import transformers
from open_clip.transformer import VisionTransformer

from osm_lightning.model.towers import FAMILIES

OPEN_CLIP = (
    "EVA01-g-14",
    "EVA02-L-14",
    "ViT-B-16",
    "ViT-L-14",
    "ViT-H-14",
    "ViT-bigG-14",
    "ViT-B-16-SigLIP2",
    "ViT-SO400M-14-SigLIP2",
)
DINOV2 = {"image_size": 518, "patch_size": 14}
REGISTERS = {"num_register_tokens": 4}
DINOV3 = {"image_size": 224, "patch_size": 16, **REGISTERS}


def sizes(width: int, layers: int, heads: int, inner: int | None = None, **more: Any) -> dict[str, Any]:
    """Arguments of transformers' vision configs."""
    inner_width = {} if inner is None else {"intermediate_size": inner}
    return {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, **inner_width, **more}


PUBLISHED = (
    ("dinov2", "facebook/dinov2-small", sizes(384, 12, 6, **DINOV2)),
    ("dinov2", "facebook/dinov2-base", sizes(768, 12, 12, **DINOV2)),
    ("dinov2", "facebook/dinov2-large", sizes(1024, 24, 16, **DINOV2)),
    ("dinov2", "facebook/dinov2-giant", sizes(1536, 40, 24, use_swiglu_ffn=True, **DINOV2)),
    ("dinov2_with_registers", "facebook/dinov2-with-registers-large", sizes(1024, 24, 16, **DINOV2, **REGISTERS)),
    ("dinov3", "facebook/dinov3-vitb16-pretrain-lvd1689m", sizes(768, 12, 12, 3072, **DINOV3)),
    ("dinov3", "facebook/dinov3-vitl16-pretrain-lvd1689m", sizes(1024, 24, 16, 4096, **DINOV3)),
    ("clip", "openai/clip-vit-base-patch16", sizes(768, 12, 12, 3072, image_size=224, patch_size=16)),
    ("clip", "openai/clip-vit-large-patch14", sizes(1024, 24, 16, 4096, image_size=224, patch_size=14)),
    ("siglip", "google/siglip2-base-patch16-224", sizes(768, 12, 12, 3072, image_size=224, patch_size=16)),
    ("siglip", "google/siglip2-so400m-patch14-224", sizes(1152, 27, 16, 4304, image_size=224, patch_size=14)),
    ("instructblip", "Salesforce/instructblip-vicuna-7b", {}),
)


def main() -> None:
    print("| `vision.tower` | `vision.name` | parameters | width | blocks | patch, px | native, px |")
    print("|---|---|---|---|---|---|---|")
    with torch.device("meta"):
        for tower, name, parameters, *numbers in rows():
            print(f"| {tower} | `{name}` | {parameters / 1e6:.0f} M | {' | '.join(map(str, numbers))} |")


def rows() -> Iterator[tuple[Any, ...]]:
    """Tower, name, parameters, width, blocks, patch size and native size of each."""
    for name in OPEN_CLIP:
        config = open_clip.get_model_config(name)["vision_cfg"]
        side = config["image_size"]
        if "timm_model_name" in config:
            vit = timm.create_model(config["timm_model_name"], img_size=side, num_classes=0)
            yield "open_clip", name, count(vit), vit.embed_dim, len(vit.blocks), vit.patch_embed.patch_size[0], side
        else:
            width, layers, patch = config["width"], config["layers"], config["patch_size"]
            heads, ratio = width // config.get("head_width", 64), config.get("mlp_ratio", 4.0)
            output = open_clip.get_model_config(name)["embed_dim"]
            native = VisionTransformer(side, patch, width, layers, heads, ratio, output_dim=output)
            yield "open_clip", name, count(native), width, layers, patch, side
    for tower, name, arguments in PUBLISHED:
        family = FAMILIES[tower]
        config = getattr(transformers, family.config)(**arguments)
        model = getattr(transformers, family.model)(config)
        yield (
            tower,
            name,
            count(model),
            config.hidden_size,
            config.num_hidden_layers,
            config.patch_size,
            config.image_size,
        )


def count(model: torch.nn.Module) -> int:
    """Its parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
