"""The encoder that makes image tokens of a frozen tower: CLS of every window, patches, position.

A tower (`towers/`) maps pixels to (CLS, patches) and knows nothing of windows. The encoder holds the only trainable
part of the vision side, the learnt global position that makes up for what windows lose (Sec. 3.2). No features are
kept.
"""

# I images  S image side, px  W windows per image  G patch-grid side  N image tokens (W + G*G)  E vision width
# p patches of a window

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osm_lightning.model import windows
from osm_lightning.model.config import VisionConfig
from osm_lightning.model.frozen import OwnsFrozen, Shard, freeze, place, torch_dtype
from osm_lightning.model.lockstep import ALONE, Lockstep
from osm_lightning.model.towers import build_tower


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
        tower = build_tower(config)
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
