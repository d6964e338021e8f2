"""The loss: a mean for every (dataset, mode) group of masks, and the weighted mean of those.

A dataset's share of the loss is therefore its weight, not its number of masks or the length of its names. The released
code sums over datasets instead: the same direction, but clipping at a norm cuts a longer gradient.
"""

# P supervised tokens  V LLM vocabulary  M masks  g groups: dataset * 2 + (0 in the agnostic mode, 1 in its own)

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from osm_lightning.batch import AGNOSTIC, MaskBatch
from osm_lightning.model.osm import AnswerLogits


@dataclass(frozen=True, slots=True)
class GroupLoss:
    """The loss of a batch and where it comes from."""

    total: Tensor
    """float32[], weighted mean over the groups that are present, or the sum over datasets."""
    mean_g: Tensor
    """float32[g], mean negative log-likelihood of a group's tokens, in nats; 0 where the group is absent."""
    present_g: Tensor
    """bool[g], groups that have tokens in this batch."""


def group_of(batch: MaskBatch) -> Tensor:
    """int64[M], group of every mask."""
    return batch.dataset_M * 2 + (batch.mode_M != AGNOSTIC)


def group_loss(
    answers: AnswerLogits, batch: MaskBatch, weight_of_dataset: Tensor, sum_datasets: bool = False
) -> GroupLoss:
    """Negative log-likelihood of the answers' tokens and EOS.

    Args:
        answers: logits of the supervised tokens.
        batch: the masks that they belong to.
        weight_of_dataset: float[datasets].
        sum_datasets: add up the datasets' losses, each the mean of its modes' times its weight (released behaviour).
    """
    nll_P = F.cross_entropy(answers.logits_PV, answers.target_P, reduction="none")
    group_P = group_of(batch)[answers.mask_index_P]
    num_groups = 2 * len(batch.datasets)
    sum_g = nll_P.new_zeros(num_groups).index_add(0, group_P, nll_P)
    count_g = torch.bincount(group_P, minlength=num_groups)
    mean_g = sum_g / count_g.clamp(min=1)
    present_g = count_g > 0
    weight_g = weight_of_dataset.to(nll_P).repeat_interleave(2) * present_g
    if sum_datasets:
        modes_g = present_g.view(-1, 2).sum(1).clamp(min=1).repeat_interleave(2)
        return GroupLoss((mean_g * weight_g / modes_g).sum(), mean_g, present_g)
    return GroupLoss((mean_g * weight_g).sum() / weight_g.sum(), mean_g, present_g)
