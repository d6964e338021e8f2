"""Towers of open_clip, its own ViTs and timm's."""

# B windows  w window side, px  p patches of a window  E width

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from osm_lightning.model.config import VisionConfig
from osm_lightning.model.frozen import missing_weights
from osm_lightning.model.load_report import LoadReport
from osm_lightning.model.towers.tower import Tower, checked_depth, split_tokens


class OpenClipTower(Tower):
    """An open_clip image tower, native or timm's."""

    def __init__(self, config: VisionConfig) -> None:
        """Builds it, and loads its weights.

        Raises:
            ValueError: open_clip has no such model or weights, they don't fit or hold code, or it is no ViT.
        """
        super().__init__()
        import open_clip

        if config.name not in open_clip.list_models():
            raise ValueError(
                f"vision.name is {config.name!r}, which open_clip does not know. `python -c 'import open_clip; "
                "print(open_clip.list_models())'` lists its models."
            )
        self.visual = _open(config)
        if config.pretrained is not None:
            loaded = self.visual.state_dict()
            shapes = {name: tensor.shape for name, tensor in loaded.items()}
            self.report = LoadReport.compare("vision tower", f"{config.name}, {config.pretrained}", loaded, shapes)
        self.mean, self.std = tuple(self.visual.image_mean), tuple(self.visual.image_std)
        timm_vit = getattr(self.visual, "trunk", None)
        if not hasattr(timm_vit, "blocks") and not hasattr(self.visual, "transformer"):
            raise ValueError(f"vision.name is {config.name!r}, which is no ViT and has no patch tokens. Use a ViT.")
        if timm_vit is not None:
            self._blocks, self.width = timm_vit.blocks, timm_vit.embed_dim
            self.patch_size_px = timm_vit.patch_embed.patch_size[0]
            # A trunk that averages its patches has its norm after the average, and none before it.
            self.norm = timm_vit.fc_norm if isinstance(timm_vit.norm, nn.Identity) else timm_vit.norm
        else:
            self._blocks, self.width = self.visual.transformer.resblocks, self.visual.conv1.out_channels
            self.patch_size_px = self.visual.patch_size[0]
            self.norm = self.visual.ln_post
        self.num_cls = int(timm_vit is None or timm_vit.cls_token is not None)
        self.depth = checked_depth(config, len(self._blocks))
        if config.norm == "final" and tuple(getattr(self.norm, "normalized_shape", ())) != (self.width,):
            raise ValueError(
                f"vision.norm is 'final', but {config.name} has no final LayerNorm over its {self.width} wide tokens. "
                "Use plain or none."
            )

    def blocks(self) -> Iterable[nn.Module]:
        """All, also those after the one whose output is wanted."""
        return cast("nn.ModuleList", self._blocks)

    def forward(self, pixels_B3ww: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, w, w] -> CLS [B, E], patches [B, p, E]."""
        out = self.visual.forward_intermediates(
            pixels_B3ww,
            indices=[self.depth - 1],
            stop_early=True,
            normalize_intermediates=False,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=bool(self.num_cls),
        )
        patches_BpE = out["image_intermediates"][-1]
        prefix_BxE = out["image_intermediates_prefix"][-1] if self.num_cls else patches_BpE[:, :0]
        return split_tokens(prefix_BxE, patches_BpE, self.num_cls)

    def final_norm(self, tokens: Tensor) -> Tensor:
        """[.., E] -> [.., E]."""
        return cast("Tensor", self.norm(tokens))


def _open(config: VisionConfig) -> Any:
    """The image side of an open_clip model.

    Raises:
        ValueError: there are no such weights, they don't fit the model, hold code, or were trained with another GELU.
    """
    import open_clip

    name, pretrained = config.name, config.pretrained
    if pretrained is not None:
        _check_weights(name, pretrained)
    size_px = config.window_size_px if config.use_windows else config.image_size_px
    try:
        return open_clip.create_model(name, pretrained=pretrained, force_image_size=size_px).visual
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"vision.pretrained is {pretrained!r}, which holds more than tensors, numbers and containers. Reading it "
            "would run the code in it, which is never done. Where you trust its origin, open it there and save the "
            "tensors alone."
        ) from error
    except Exception as error:
        if pretrained is None:
            raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"vision.pretrained is {pretrained!r}, which cannot be loaded into {name} ({type(error).__name__}: "
            f"{reason}). A file must hold all weights of this very model; a tag needs a network once."
        ) from error


def _check_weights(name: str, pretrained: str) -> None:
    """Refuses weights that open_clip would not find, or would use with another activation than they were trained with.

    Raises:
        ValueError: it is such a name.
    """
    import open_clip

    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        if "/" in pretrained or Path(pretrained).suffix:
            missing_weights("vision.pretrained", pretrained)
        if not Path(pretrained).is_file():
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
            raise ValueError(
                f"vision.pretrained is {pretrained!r}, which is neither a file here nor a tag that open_clip has for "
                f"{name}. Its tags: {tags}."
            )
    elif bool(tag.get("quick_gelu")) != bool((open_clip.get_model_config(name) or {}).get("quick_gelu")):
        other = f"{name}-quickgelu" if tag.get("quick_gelu") else name.removesuffix("-quickgelu")
        raise ValueError(
            f"vision.pretrained is {pretrained!r}, whose weights were trained with another GELU than {name} has: its "
            f"features would be wrong without a word. Set vision.name to {other}."
        )
