"""Figures that a validation is to reach: how they are written, what is refused, when they agree."""

from __future__ import annotations

import math

import pytest

from osm_lightning.evaluation.expected import (
    Expected,
    Validated,
    all_agree,
    compare,
    format_agreement,
    read_expected,
    released_scores,
)
from osm_lightning.evaluation.naming import ScoreRow

SOURCES = {
    "coco": Validated("coco", ("coco", "agnostic")),
    "lvis": Validated("lvis", ("agnostic",)),
    "mine": Validated("objects", ("objects", "agnostic")),
}


def row(dataset: str, mode: str, num_masks: int, num_right: int, num_outside: int = 0) -> ScoreRow:
    acc, niv = (count / num_masks if num_masks else math.nan for count in (num_right, num_outside))
    return ScoreRow(dataset, mode, num_masks, num_right, num_outside, acc, 0, 0, niv, 0)


# Reading


def test_figures_are_of_a_datasets_own_mode_unless_they_name_another() -> None:
    words = ["coco=3/4", "coco/any=1/4", "mine=0/9", "lvis/agnostic=5/5"]
    assert read_expected(words, SOURCES) == [
        Expected("coco", "coco", 4, 3),
        Expected("coco", "agnostic", 4, 1),
        Expected("mine", "objects", 9, 0),
        Expected("lvis", "agnostic", 5, 5),
    ]


def test_released_figures_are_those_of_what_is_validated() -> None:
    assert read_expected(["released"], SOURCES) == [
        Expected("coco", "coco", 56295, 48953, 62),
        Expected("coco", "agnostic", 56295, 44738, 4940),
        Expected("lvis", "agnostic", 244645, 157898, 20250),
    ]


def test_the_table_gives_the_percentages_that_are_quoted() -> None:
    """Acc and NIV, specific and agnostic, as printed in tables; the means over six sets stand in docs/evaluation.md."""
    quoted = {
        "coco": (86.96, 0.11, 79.47, 8.78),
        "ade20k": (85.19, 0.31, 83.75, 2.12),
        "cityscapes": (88.65, 0.01, 88.69, 0.01),
        "lvis": (72.45, 1.18, 64.54, 8.28),
        "a847": (78.11, 0.49, 76.54, 0.81),
        "pc459": (83.01, 0.54, 80.57, 3.74),
    }
    rows = {(entry.dataset, entry.mode): entry for entry in released_scores()}
    assert len(rows) == 12
    for dataset, percentages in quoted.items():
        own, agnostic = rows[dataset, "specific"], rows[dataset, "agnostic"]
        assert own.num_masks == agnostic.num_masks
        counts = (own.num_right, own.num_outside, agnostic.num_right, agnostic.num_outside)
        assert tuple(round(100 * count / own.num_masks, 2) for count in counts if count is not None) == percentages
    for mode, mean in (("specific", 82.39), ("agnostic", 78.93)):
        acc = [rows[dataset, mode].num_right / rows[dataset, mode].num_masks for dataset in quoted]
        assert 100 * sum(acc) / 6 == pytest.approx(mean, abs=0.005)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["coco"], r"--expect coco: give DATASET=RIGHT/MASKS"),
        (["coco=86.96"], "give DATASET=RIGHT/MASKS"),
        (["coco=-1/4"], "give DATASET=RIGHT/MASKS"),
        (["coco/=1/4"], "give DATASET=RIGHT/MASKS"),
        (["coco=3/4,lvis=1/2"], "give DATASET=RIGHT/MASKS"),
        (["coco=5/4"], "5 of 4 masks cannot be right"),
        (["coco=0/0"], "0 of 0 masks"),
        (["ade20k=1/2"], r"'ade20k' is not validated; coco, lvis, mine is"),
        (["lvis=1/2"], r"lvis is validated in agnostic, not in 'lvis'.*lvis/MODE="),
        (["coco/lvis=1/2"], r"coco is validated in coco and agnostic, not in 'lvis'"),
        (["coco=1/2", "coco/coco=1/2"], "coco in mode 'coco' is expected twice"),
        (["released", "coco/any=1/2"], "coco in mode 'agnostic' is expected twice"),
    ],
)
def test_what_cannot_be_compared_is_refused(words: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_expected(words, SOURCES)


def test_released_figures_of_nothing_that_is_validated_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has figures of a847, .*but what is validated is scenes\."):
        read_expected(["released"], {"scenes": Validated("scenes", ("scenes", "agnostic"))})


# Comparing


@pytest.mark.parametrize(
    ("counted", "verdict"),
    [
        ((1000, 800, 50), "agrees"),
        ((1000, 801, 50), "agrees"),  # exactly at the limit of 0.1 points
        ((1000, 799, 49), "agrees"),
        ((1000, 802, 50), "Acc differs"),
        ((1000, 798, 50), "Acc differs"),
        ((1000, 800, 52), "NIV differs"),
        ((1000, 700, 0), "Acc and NIV differ"),
        ((999, 800, 50), "other masks"),
        ((0, 0, 0), "other masks"),
    ],
)
def test_masks_must_be_as_many_and_shares_within_the_limit(counted: tuple[int, int, int], verdict: str) -> None:
    expected = Expected("coco", "coco", 1000, 800, 50)
    agreements = compare([expected], [row("coco", "agnostic", 1, 1), row("coco", "coco", *counted)])
    assert agreements[0].verdict(0.1) == verdict
    assert all_agree(agreements, 0.1) == (verdict == "agrees")
    assert verdict in format_agreement(agreements, 0.1)


def test_niv_counts_only_where_something_is_expected_of_it() -> None:
    agreements = compare([Expected("coco", "coco", 1000, 800)], [row("coco", "coco", 1000, 800, 999)])
    assert all_agree(agreements, 0)


def test_a_mode_is_found_under_the_released_name_too() -> None:
    """`model.named_modes: [any]` names in the agnostic mode, and rows then say `any`."""
    agreements = compare([Expected("coco", "agnostic", 4, 3)], [row("coco", "any", 4, 3)])
    assert all_agree(agreements, 0)


def test_the_table() -> None:
    expected = [Expected("coco", "coco", 56295, 48953, 62), Expected("coco", "agnostic", 56295, 44738)]
    rows = [row("coco", "coco", 56295, 48950, 70), row("coco", "agnostic", 541, 430, 3)]
    text = format_agreement(compare(expected, rows), 0.1)
    head, own, agnostic, last = text.splitlines()
    words = "dataset mode masks expected right expected Acc % expected points NIV % expected points verdict"
    assert " ".join(head.split()) == words
    assert " ".join(own.split()) == "coco coco 56295 56295 48950 48953 86.95 86.96 -0.01 0.12 0.11 +0.01 agrees"
    assert " ".join(agnostic.split()) == "coco agnostic 541 56295 430 44738 79.48 79.47 +0.01 0.55 - - other masks"
    assert last.startswith("1 of 2 agree: as many masks, and Acc and NIV within 0.1 points. Other masks are of another")
