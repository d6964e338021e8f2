"""Towers of transformers: one class, and a table of what tells the families apart.

A ViT is embeddings, blocks and a final norm in all of them. What differs is data: where those parts are, how many
tokens come before the patches, which numbers pixels are normalised with.
"""

# B windows  w window side, px  p patches of a window  E width

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from osm_lightning.model.config import VisionConfig
from osm_lightning.model.instructblip import open_instructblip
from osm_lightning.model.load_report import LoadReport
from osm_lightning.model.pretrained import load_pretrained, model_type, pixel_statistics
from osm_lightning.model.towers.tower import Tower, checked_depth, split_tokens

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

TEXT_SIDE = ("text_model.*", "text_projection.*", "visual_projection.*", "logit_scale", "logit_bias")
"""What the folder of a contrastive model holds beside its vision tower."""


@dataclass(frozen=True)
class Family:
    """What tells a family of transformers' ViTs from the others."""

    model: str
    """Its class."""
    config: str
    """Its config's class."""
    model_types: tuple[str, ...]
    """What its folders call themselves in config.json, alone and inside a larger model."""
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    """Mean and standard deviation of normalised pixels, where a folder does not say."""
    encoder: str = "encoder"
    """Where its blocks are run."""
    blocks: str = "layer"
    """Where they are in there."""
    final_norm: str = "layernorm"
    """Its final LayerNorm."""
    first_norm: str | None = None
    """A norm between embeddings and blocks."""
    rope: str | None = None
    """What makes the blocks' rotary positions of pixels."""
    cls_tokens: int = 1
    """CLS tokens, before its registers, of which its config says how many there are."""
    interpolates_if_told: bool = False
    """Whether another size than its own must be announced."""
    besides: tuple[str, ...] = ()
    """Patterns of tensors in its folders that are other parts'."""


FAMILIES = {
    "dinov2": Family("Dinov2Model", "Dinov2Config", ("dinov2",), IMAGENET),
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", ("dinov2_with_registers",), IMAGENET
    ),
    "dinov3": Family(
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        ("dinov3_vit",),
        IMAGENET,
        encoder="model",
        final_norm="norm",
        rope="rope_embeddings",
    ),
    "clip": Family(
        "CLIPVisionModel",
        "CLIPVisionConfig",
        ("clip", "clip_vision_model"),
        OPENAI_CLIP,
        blocks="layers",
        final_norm="post_layernorm",
        first_norm="pre_layrnorm",
        interpolates_if_told=True,
        besides=TEXT_SIDE,
    ),
    # SigLIP 2 of a fixed size is written as a SigLIP; NaFlex ("siglip2") takes lists of patches, not windows.
    "siglip": Family(
        "SiglipVisionModel",
        "SiglipVisionConfig",
        ("siglip", "siglip_vision_model"),
        HALF,
        blocks="layers",
        final_norm="post_layernorm",
        cls_tokens=0,
        interpolates_if_told=True,
        besides=TEXT_SIDE,
    ),
    "instructblip": Family(
        "InstructBlipVisionModel",
        "InstructBlipVisionConfig",
        ("instructblip",),
        OPENAI_CLIP,
        blocks="layers",
        final_norm="post_layernorm",
        interpolates_if_told=True,
    ),
}
"""By the name that `vision.tower` has for them."""


class TransformersTower(Tower):
    """A ViT of transformers, cut after the block whose output is wanted."""

    def __init__(self, config: VisionConfig) -> None:
        """Builds it, and loads its weights.

        Raises:
            ValueError: they are missing, broken or of another family, or it has fewer blocks than asked for.
        """
        super().__init__()
        import transformers

        self.family = FAMILIES[config.tower]
        self.mean, self.std = self.family.statistics
        if config.architecture is not None:
            kind = getattr(transformers, self.family.model)
            vit: Any = kind(getattr(transformers, self.family.config)(**config.architecture))
        else:
            vit, self.report = _load(config)
            self.mean, self.std = pixel_statistics(config.name) or self.family.statistics
        self.vit = vit
        self.width, self.patch_size_px = int(vit.config.hidden_size), int(vit.config.patch_size)
        self.native_size_px = int(vit.config.image_size)
        self.num_prefix_tokens = self.family.cls_tokens + int(getattr(vit.config, "num_register_tokens", 0))
        blocks = self.blocks()
        setattr(self._encoder(), self.family.blocks, blocks[: checked_depth(config, len(blocks))])

    def _encoder(self) -> Any:
        return getattr(self.vit, self.family.encoder)

    def blocks(self) -> nn.ModuleList:
        """The ones that are run."""
        return cast("nn.ModuleList", getattr(self._encoder(), self.family.blocks))

    def forward(self, pixels_B3ww: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, w, w] -> CLS [B, E], patches [B, p, E]; positions are interpolated for another size than its own."""
        family = self.family
        other_size = pixels_B3ww.shape[-1] != self.native_size_px
        told = {"interpolate_pos_encoding": True} if family.interpolates_if_told and other_size else {}
        tokens = self.vit.embeddings(pixels_B3ww, **told)
        if family.first_norm is not None:
            tokens = getattr(self.vit, family.first_norm)(tokens)
        turned = {} if family.rope is None else {"position_embeddings": getattr(self.vit, family.rope)(pixels_B3ww)}
        tokens = self._encoder()(tokens, **turned).last_hidden_state
        return split_tokens(tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :], family.cls_tokens)

    def final_norm(self, tokens: Tensor) -> Tensor:
        """[.., E] -> [.., E]."""
        return cast("Tensor", getattr(self.vit, self.family.final_norm)(tokens))


def _load(config: VisionConfig) -> tuple[Any, LoadReport]:
    """A folder's or hub id's tower with its weights.

    Raises:
        ValueError: they are missing, broken or of another family.
    """
    import transformers

    name, family = config.name, FAMILIES[config.tower]
    if config.tower == "instructblip":
        return open_instructblip(name, "vision.name").vision_model()
    found = model_type(name, "vision.name")
    if found not in family.model_types:
        fitting = next((tower for tower, other in FAMILIES.items() if found in other.model_types), None)
        remedy = f"Set vision.tower to {fitting}." if fitting else f"Towers that are read: {', '.join(FAMILIES)}."
        if found == "siglip2":
            remedy = "NaFlex takes lists of patches of any shape, not windows: use a SigLIP 2 of a fixed size."
        raise ValueError(
            f"vision.name is {name!r}, a {found!r} by its config.json, but vision.tower is {config.tower!r}. {remedy}"
        )
    kind = getattr(transformers, family.model)
    return load_pretrained(kind, name, "vision.name", "vision tower", family.besides, config.allow)
