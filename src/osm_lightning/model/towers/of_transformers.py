"""Towers of transformers."""

# B windows  w window side, px  p patches of a window  E width

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn

from osm_lightning.model.config import VisionConfig
from osm_lightning.model.frozen import missing_weights
from osm_lightning.model.instructblip import open_instructblip
from osm_lightning.model.towers.tower import Tower, checked_depth

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI_CLIP_MEAN, OPENAI_CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Dinov2Tower(Tower):
    """transformers' Dinov2, cut after the block whose output is wanted."""

    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        from transformers import Dinov2Config, Dinov2Model

        if config.architecture is not None:
            self.vit = Dinov2Model(Dinov2Config(**config.architecture))
        else:
            missing_weights("vision.name", config.name)
            self.vit = Dinov2Model.from_pretrained(config.name, dtype="auto")
        self.width = self.vit.config.hidden_size
        self.patch_size_px = cast("int", self.vit.config.patch_size)
        blocks = self.vit.encoder.layer
        self.vit.encoder.layer = blocks[: checked_depth(config, len(blocks))]

    def blocks(self) -> Iterable[nn.Module]:
        """The ones that are run."""
        return self.vit.encoder.layer

    def forward(self, pixels_B3ww: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, w, w] -> CLS [B, E], patches [B, p, E]."""
        tokens = self.vit.embeddings(pixels_B3ww)
        for block in self.vit.encoder.layer:
            tokens = block(tokens)
            tokens = tokens[0] if isinstance(tokens, tuple) else tokens
        return tokens[:, 0], tokens[:, 1:]

    def final_norm(self, tokens: Tensor) -> Tensor:
        """[.., E] -> [.., E]."""
        return cast("Tensor", self.vit.layernorm(tokens))


class InstructBlipTower(Tower):
    """InstructBLIP's vision model (EVA-CLIP's ViT-g of 39 blocks) out of its folder."""

    mean, std = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        from transformers import InstructBlipVisionConfig, InstructBlipVisionModel

        if config.architecture is not None:
            vit: Any = InstructBlipVisionModel(InstructBlipVisionConfig(**config.architecture))
        else:
            missing_weights("vision.name", config.name)
            vit, self.report = open_instructblip(config.name, "vision.name").vision_model()
        self.vit = vit
        self.width, self.patch_size_px = int(vit.config.hidden_size), int(vit.config.patch_size)
        self.native_size_px = int(vit.config.image_size)
        blocks = vit.encoder.layers
        vit.encoder.layers = blocks[: checked_depth(config, len(blocks))]

    def blocks(self) -> Iterable[nn.Module]:
        """The ones that are run."""
        return cast("nn.ModuleList", self.vit.encoder.layers)

    def forward(self, pixels_B3ww: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, w, w] -> CLS [B, E], patches [B, p, E]; positions are interpolated for another size than its own."""
        other_size = pixels_B3ww.shape[-1] != self.native_size_px
        tokens = self.vit.embeddings(pixels_B3ww, interpolate_pos_encoding=other_size)
        for block in self.vit.encoder.layers:
            tokens = block(tokens)
        return tokens[:, 0], tokens[:, 1:]

    def final_norm(self, tokens: Tensor) -> Tensor:
        """[.., E] -> [.., E]; the released code uses it on all tokens."""
        return cast("Tensor", self.vit.post_layernorm(tokens))
