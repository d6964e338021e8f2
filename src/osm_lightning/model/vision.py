"""Frozen vision towers, and the encoder that makes image tokens of them: CLS of every window, patches, position.

A tower maps pixels to (CLS, patches) and knows nothing of windows. The encoder holds the only trainable part of the
vision side, the learnt global position that makes up for what windows lose (Sec. 3.2). No features are kept.
"""

# I images  S image side, px  W windows per image  G patch-grid side  N image tokens (W + G*G)  E vision width
# B windows of a chunk  w window side, px  p patches of a window

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osm_lightning.model import windows
from osm_lightning.model.config import VisionConfig
from osm_lightning.model.frozen import OwnsFrozen, Shard, freeze, missing_weights, place, torch_dtype
from osm_lightning.model.instructblip import open_instructblip
from osm_lightning.model.load_report import LoadReport
from osm_lightning.model.lockstep import ALONE, Lockstep

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI_CLIP_MEAN, OPENAI_CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Tower(nn.Module):
    """A ViT up to one of its blocks."""

    width: int
    """Width of its tokens (E)."""
    patch_size_px: int
    """Side of its patches."""
    mean: tuple[float, ...]
    """Mean of its normalised pixels, in [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation of its normalised pixels, in [0, 1]."""
    report: LoadReport | None = None
    """What was loaded, where its tensors were assigned here and not by a library."""

    def blocks(self) -> Iterable[nn.Module]:
        """Its transformer blocks: nearly all of its weights."""
        raise NotImplementedError

    def forward(self, pixels_B3ww: Tensor) -> tuple[Tensor, Tensor]:
        """Runs normalised pixels: [B, 3, w, w] -> CLS [B, E], patches [B, p, E] in row-major order."""
        raise NotImplementedError

    def final_norm(self, tokens: Tensor) -> Tensor:
        """The tower's own final LayerNorm."""
        raise NotImplementedError


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


TOWERS: dict[str, type[Tower]] = {
    "open_clip": OpenClipTower,
    "dinov2": Dinov2Tower,
    "instructblip": InstructBlipTower,
}


def checked_depth(config: VisionConfig, num_blocks: int) -> int:
    """Number of blocks to run.

    Raises:
        ValueError: the tower has fewer blocks than asked for.
    """
    depth = num_blocks if config.hidden_layer is None else config.hidden_layer
    if not 1 <= depth <= num_blocks:
        raise ValueError(
            f"vision.hidden_layer is {depth}, but the tower has {num_blocks} blocks: use 1 to {num_blocks}."
        )
    return depth


class VisionEncoder(OwnsFrozen):
    """Images to image tokens: frozen tower over windows, then the learnt global position."""

    frozen_parts = ("tower",)

    mean_311: Tensor
    std_311: Tensor

    def __init__(self, config: VisionConfig, shard: Shard | None = None) -> None:
        """Builds the tower and loads its weights.

        Args:
            config: tower and input size.
            shard: called with every block of the tower once it has its precision.

        Raises:
            ValueError: weights are missing, or the sizes don't fit the tower.
        """
        super().__init__()
        config.check()
        self.config = config
        tower = TOWERS[config.tower](config)
        if tower.patch_size_px != config.patch_size_px:
            raise ValueError(
                f"vision.patch_size_px is {config.patch_size_px}, but the tower's are {tower.patch_size_px} px: "
                f"set it to {tower.patch_size_px}."
            )
        self.tower = freeze(tower)
        self.identity = place(tower, tower.blocks(), torch_dtype(config.dtype), shard)
        self.width = tower.width
        self.position_NE = nn.Parameter(torch.empty(config.num_windows + config.grid_side**2, tower.width))
        nn.init.normal_(self.position_NE, std=config.position_std)
        self.register_buffer("mean_311", torch.tensor(tower.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std_311", torch.tensor(tower.std).view(3, 1, 1), persistent=False)

    def forward(self, images_I3SS: Tensor, lockstep: Lockstep = ALONE) -> Tensor:
        """Encodes images.

        Args:
            images_I3SS: uint8[I, 3, S, S], RGB, padded with zeros: padding is black before normalising, as released.
            lockstep: how processes that share the tower's weights stay together.

        Returns:
            float[I, N, E], CLS of every window (W), then patches (G * G, row-major), with the global position added.
        """
        return self.features(images_I3SS, lockstep) + self.position_NE

    @torch.no_grad()
    def features(self, images_I3SS: Tensor, lockstep: Lockstep = ALONE) -> Tensor:
        """float32[I, N, E], image tokens before the global position; no gradient, never under autocast."""
        config = self.config
        num_images = images_I3SS.shape[0]
        size_px = config.window_size_px if config.use_windows else config.image_size_px
        pixels = windows.cut(images_I3SS, size_px)
        dtype = next(self.tower.parameters()).dtype
        cls_parts, patch_parts = [], []
        with torch.autocast(images_I3SS.device.type, enabled=False):
            chunks = pixels.split(config.windows_per_chunk)
            made_up = [pixels[:1]] * (lockstep.most(len(chunks)) - len(chunks))
            for chunk in (*chunks, *made_up):
                normal = (chunk.float() / 255 - self.mean_311.float()) / self.std_311.float()
                cls, patches = self.tower(normal.to(dtype))
                cls_parts.append(self._normed(cls).float())
                patch_parts.append(self._normed(patches).float())
        cls_IWE = torch.cat(cls_parts[: len(chunks)]).view(num_images, config.num_windows, self.width)
        patches_IWpE = torch.cat(patch_parts[: len(chunks)]).view(num_images, config.num_windows, -1, self.width)
        return torch.cat([cls_IWE, windows.merge(patches_IWpE)], dim=1)

    def _normed(self, tokens: Tensor) -> Tensor:
        if self.config.norm == "final":
            return self.tower.final_norm(tokens)
        if self.config.norm == "plain":
            return F.layer_norm(tokens.float(), (self.width,))
        return tokens
