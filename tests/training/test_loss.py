from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from osm_lightning.batch import AGNOSTIC, MaskBatch
from osm_lightning.model.osm import AnswerLogits
from osm_lightning.training.loss import group_loss, group_of

DATASETS = ("coco", "lvis", "mine")


def make_batch(dataset_M: list[int], mode_M: list[int]) -> MaskBatch:
    """Masks of which only dataset and mode matter."""
    num_masks = len(dataset_M)
    empty, ones = torch.zeros(num_masks, 0, dtype=torch.int64), torch.ones(num_masks, dtype=torch.int64)
    return MaskBatch(
        images_I3SS=torch.zeros(1, 3, 14, 14, dtype=torch.uint8),
        image_index_M=torch.zeros_like(ones),
        coverage_MGG=torch.ones(num_masks, 1, 1, dtype=torch.float16),
        context_box_px_M4=torch.zeros(num_masks, 4, dtype=torch.int32),
        mode_M=torch.tensor(mode_M),
        dataset_M=torch.tensor(dataset_M),
        class_id_M=ones,
        text_ids_ML=empty,
        prompt_tokens_M=ones,
        text_tokens_M=ones,
        instruction_ids_MT=empty,
        instruction_tokens_M=ones,
        datasets=DATASETS,
        keys=("0",),
        mask_ids=tuple(map(str, range(num_masks))),
    )


def make_answers(tokens_per_mask: list[int], num_ids: int = 7) -> AnswerLogits:
    generator = torch.Generator().manual_seed(0)
    mask_index_P = torch.arange(len(tokens_per_mask)).repeat_interleave(torch.tensor(tokens_per_mask))
    logits_PV = torch.randn(len(mask_index_P), num_ids, generator=generator, dtype=torch.float64)
    target_P = torch.randint(num_ids, (len(mask_index_P),), generator=generator)
    return AnswerLogits(logits_PV.requires_grad_(), target_P, mask_index_P)


# Masks of coco in both modes (0 and 1), of lvis in its own (2) only, none of the third.
DATASET_M, MODE_M, TOKENS_M = [0, 0, 1, 0, 1], [0, 1, 2, 1, 2], [2, 1, 4, 3, 2]
WEIGHTS = torch.tensor([1.0, 3.0, 5.0])


def by_loops(answers: AnswerLogits, batch: MaskBatch) -> tuple[torch.Tensor, dict[tuple[int, bool], torch.Tensor]]:
    """The loss restated token by token."""
    groups: dict[tuple[int, bool], list[torch.Tensor]] = {}
    for logits_V, target, mask in zip(answers.logits_PV, answers.target_P, answers.mask_index_P, strict=True):
        nll = torch.logsumexp(logits_V, 0) - logits_V[target]
        key = (int(batch.dataset_M[mask]), int(batch.mode_M[mask]) != AGNOSTIC)
        groups.setdefault(key, []).append(nll)
    means = {key: torch.stack(nlls).mean() for key, nlls in groups.items()}
    weighted = sum(WEIGHTS[dataset] * mean for (dataset, _), mean in means.items())
    return weighted / sum(WEIGHTS[dataset] for dataset, _ in means), means


def test_equals_the_definition_by_loops_also_in_its_gradient() -> None:
    batch, answers = make_batch(DATASET_M, MODE_M), make_answers(TOKENS_M)
    loss = group_loss(answers, batch, WEIGHTS)
    expected, means = by_loops(answers, batch)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-12)
    for (dataset, own), mean in means.items():
        assert loss.mean_g[2 * dataset + own].item() == pytest.approx(mean.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss.total, answers.logits_PV)
    (expected_gradient,) = torch.autograd.grad(expected, answers.logits_PV)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


def test_groups_are_dataset_and_whether_the_mode_is_its_own() -> None:
    assert group_of(make_batch([0, 0, 1, 2, 2], [0, 1, 2, 0, 3])).tolist() == [0, 1, 3, 4, 5]


def test_absent_groups_are_named_and_have_no_part() -> None:
    batch = make_batch(DATASET_M, MODE_M)
    loss = group_loss(make_answers(TOKENS_M), batch, WEIGHTS)
    assert loss.present_g.tolist() == [True, True, False, True, False, False]
    assert loss.mean_g[[2, 4, 5]].tolist() == [0, 0, 0]
    other_weight_of_absent = torch.tensor([1.0, 3.0, 500.0])
    assert torch.equal(group_loss(make_answers(TOKENS_M), batch, other_weight_of_absent).total, loss.total)


def test_a_group_counts_as_its_weight_however_many_masks_and_tokens_it_has() -> None:
    few = group_loss(make_answers([1, 1]), make_batch([0, 1], [0, 0]), torch.tensor([1.0, 3.0, 1.0]))
    assert few.total.item() == pytest.approx((few.mean_g[0].item() + 3 * few.mean_g[2].item()) / 4, rel=1e-6)
    sure = torch.zeros(12, 7).index_fill(1, torch.tensor([0]), 50.0)  # says id 0, surely
    answers = AnswerLogits(sure, torch.tensor([0] * 11 + [1]), torch.arange(12))
    batch = make_batch([0] * 11 + [1], [0] * 12)
    assert group_loss(answers, batch, torch.ones(3)).total.item() == pytest.approx(50 / 2, rel=1e-5)


def test_a_model_that_knows_nothing_has_the_entropy_of_the_vocabulary() -> None:
    answers = AnswerLogits(torch.zeros(9, 7), torch.arange(9) % 7, torch.tensor([0] * 5 + [1] * 4))
    loss = group_loss(answers, make_batch([0, 2], [0, 1]), torch.tensor([0.3, 1.0, 2.0]))
    assert loss.total.item() == pytest.approx(math.log(7))


def test_datasets_can_be_summed_as_released() -> None:
    """coco has both modes, lvis one only; each dataset's loss is the mean over the modes that it has."""
    batch, answers = make_batch(DATASET_M, MODE_M), make_answers(TOKENS_M)
    _, means = by_loops(answers, batch)
    coco, lvis = (means[0, False] + means[0, True]) / 2, means[1, True]
    summed = group_loss(answers, batch, WEIGHTS, sum_datasets=True)
    assert summed.total.item() == pytest.approx((1 * coco + 3 * lvis).item(), rel=1e-12)
    both = make_batch([0, 0, 1, 1], [0, 1, 0, 2])
    ones = torch.ones(3)
    mean, total = (group_loss(make_answers([2, 1, 4, 3]), both, ones, which).total.item() for which in (False, True))
    assert total == pytest.approx(2 * mean, rel=1e-12), "with both modes of two datasets, a factor of two"


def test_one_dataset_in_one_mode_is_plain_cross_entropy() -> None:
    answers = make_answers([3, 1, 2])
    loss = group_loss(answers, make_batch([1, 1, 1], [2, 2, 2]), torch.tensor([1.0, 0.25, 1.0]))
    assert loss.total.item() == pytest.approx(F.cross_entropy(answers.logits_PV, answers.target_P).item(), rel=1e-12)
