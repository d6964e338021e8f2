"""Towers of open_clip, native or timm's."""

# B windows  w window side, px  p patches of a window  E width

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from osm_lightning.model.config import VisionConfig
from osm_lightning.model.frozen import missing_weights
from osm_lightning.model.towers.tower import Tower, checked_depth


class OpenClipTower(Tower):
    """An open_clip image tower, native or timm's."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        import open_clip

        if config.name not in open_clip.list_models():
            raise ValueError(
                f"vision.name is {config.name!r}, which open_clip does not know. `python -c 'import open_clip; "
                "print(open_clip.list_models())'` lists its models."
            )
        pretrained = config.pretrained
        if pretrained is not None and ("/" in pretrained or Path(pretrained).suffix):
            missing_weights("vision.pretrained", pretrained)
        size_px = config.window_size_px if config.use_windows else config.image_size_px
        model = open_clip.create_model(config.name, pretrained=pretrained, force_image_size=size_px)
        self.visual = model.visual
        self.mean, self.std = tuple(self.visual.image_mean), tuple(self.visual.image_std)
        timm_vit = getattr(self.visual, "trunk", None)
        if not hasattr(timm_vit, "blocks") and not hasattr(self.visual, "transformer"):
            raise ValueError(f"vision.name is {config.name!r}, which is no ViT and has no patch tokens. Use a ViT.")
        if timm_vit is not None:
            self._blocks, self.width = timm_vit.blocks, timm_vit.embed_dim
            self.patch_size_px = timm_vit.patch_embed.patch_size[0]
            self.norm = timm_vit.norm
        else:
            self._blocks, self.width = self.visual.transformer.resblocks, self.visual.conv1.out_channels
            self.patch_size_px = self.visual.patch_size[0]
            self.norm = self.visual.ln_post
        self.depth = checked_depth(config, len(self._blocks))

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
            output_extra_tokens=True,
        )
        return out["image_intermediates_prefix"][-1][:, 0], out["image_intermediates"][-1]

    def final_norm(self, tokens: Tensor) -> Tensor:
        """[.., E] -> [.., E]."""
        return cast("Tensor", self.norm(tokens))
