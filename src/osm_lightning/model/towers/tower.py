"""What a frozen vision tower is: pixels of windows to (CLS, patches)."""

# B windows  w window side, px  p patches of a window  E width

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from osm_lightning.model.config import VisionConfig
from osm_lightning.model.load_report import LoadReport


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
    """What was loaded; None for random weights. Of open_clip, which loads strictly or fails, it is all there is."""

    def blocks(self) -> Iterable[nn.Module]:
        """Its transformer blocks: nearly all of its weights."""
        raise NotImplementedError

    def forward(self, pixels_B3ww: Tensor) -> tuple[Tensor, Tensor]:
        """Runs normalised pixels: [B, 3, w, w] -> CLS [B, E], patches [B, p, E] in row-major order."""
        raise NotImplementedError

    def final_norm(self, tokens: Tensor) -> Tensor:
        """The tower's own final LayerNorm."""
        raise NotImplementedError


def split_tokens(prefix_BxE: Tensor, patches_BpE: Tensor, num_cls: int) -> tuple[Tensor, Tensor]:
    """CLS and patches of a window's tokens; registers, which come after CLS, are left out.

    Where a tower has no CLS (SigLIP), the mean of the window's patches stands for it: it sums a window up, is there at
    every block, and is as wide as the patches. SigLIP's own pooling reads the last block's output only.
    """
    return prefix_BxE[:, 0] if num_cls else patches_BpE.mean(1), patches_BpE


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
