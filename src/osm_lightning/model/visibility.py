"""Which image tokens each query may attend to (Sec. 3.3)."""

# M masks  G patch-grid side  W windows per image  N image tokens (W + G*G)  Q queries per set  A all queries

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from osm_lightning.model.config import QFormerConfig, VisionConfig


@dataclass(frozen=True, slots=True)
class Grid:
    """How an image's tokens lie."""

    side: int
    """Patches along a side (G)."""
    num_windows: int
    """CLS tokens that stand before the patches (W)."""
    patch_size_px: int
    """Side of a patch."""

    @classmethod
    def of(cls, vision: VisionConfig) -> Grid:
        """The grid of a vision config."""
        return cls(vision.grid_side, vision.num_windows, vision.patch_size_px)


def visibility(coverage_MGG: Tensor, context_box_px_M4: Tensor, grid: Grid, queries: QFormerConfig) -> Tensor:
    """Says which image tokens each query may attend to.

    Mask queries see the patches that the mask touches; context queries and the mode query see the patches that the
    context box touches; by the rule "nearest", those whose first pixel is in mask or box (released code, which scales
    both down by nearest neighbour). Every query sees the CLS token of every window, so that no row is ever empty.

    Args:
        coverage_MGG: float[M, G, G], share of each patch that the mask covers, in [0, 1].
        context_box_px_M4: int32[M, 4], x0, y0, x1, y1 (both ends included) of the enlarged box.
        grid: how the image's tokens lie.
        queries: which queries there are.

    Returns:
        [M, A, N], rows in the order mask (Q), context (Q, if any), mode (1, if any); columns CLS (W), patches
        (G * G, row-major). With the rules "touched" and "nearest" bool, True where a query may attend; with "share"
        float32, for mask queries the log of a patch's covered share, for the others 0 where they may attend and -inf
        elsewhere.
    """
    start = torch.arange(grid.side, device=coverage_MGG.device) * grid.patch_size_px
    last = start if queries.mask_rule == "nearest" else start + grid.patch_size_px - 1
    x0, y0, x1, y1 = context_box_px_M4.unsqueeze(-1).unbind(1)
    columns_MG = (last >= x0) & (start <= x1)
    rows_MG = (last >= y0) & (start <= y1)
    context_MN = _with_cls((rows_MG[:, :, None] & columns_MG[:, None, :]).flatten(1), grid.num_windows)
    if queries.mask_rule == "share":
        mask_MN = _with_cls(coverage_MGG.flatten(1).float(), grid.num_windows).log()
        context_MN = context_MN.float().log()
    else:
        mask_MN = _with_cls(coverage_MGG.flatten(1) > 0, grid.num_windows)
    rows = [mask_MN.unsqueeze(1).expand(-1, queries.num_queries, -1)]
    if queries.has_context:
        rows.append(context_MN.unsqueeze(1).expand(-1, queries.num_queries, -1))
    if queries.mode_query:
        rows.append(context_MN.unsqueeze(1))
    return torch.cat(rows, dim=1)


def _with_cls(patches: Tensor, num_windows: int) -> Tensor:
    return torch.cat([patches.new_ones(patches.shape[0], num_windows), patches], dim=1)
