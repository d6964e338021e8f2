"""Which tokens a query may see, against loops over pixels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from osm_lightning.model.config import QFormerConfig, VisionConfig
from osm_lightning.model.visibility import Grid, visibility

PATCH, GRID_SIDE, WINDOWS, QUERIES = 4, 5, 3, 2
SIDE = PATCH * GRID_SIDE
GRID = Grid(GRID_SIDE, WINDOWS, PATCH)
CONFIG = QFormerConfig(num_queries=QUERIES)


def seen_patches(box: tuple[int, int, int, int]) -> Tensor:
    """bool[G * G], the patches of which a box holds at least one pixel, pixel by pixel."""
    x0, y0, x1, y1 = box
    seen = torch.zeros(GRID_SIDE, GRID_SIDE, dtype=torch.bool)
    for y in range(max(0, y0), min(SIDE - 1, y1) + 1):
        for x in range(max(0, x0), min(SIDE - 1, x1) + 1):
            seen[y // PATCH, x // PATCH] = True
    return seen.flatten()


def visible(coverage_MGG: Tensor, boxes: list[tuple[int, int, int, int]], config: QFormerConfig = CONFIG) -> Tensor:
    return visibility(coverage_MGG, torch.tensor(boxes, dtype=torch.int32), GRID, config)


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 0, 0),
        (3, 3, 3, 3),
        (4, 4, 4, 4),
        (3, 0, 4, 0),
        (4, 8, 7, 11),
        (7, 4, 8, 4),
        (0, 0, SIDE - 1, SIDE - 1),
        (SIDE - 1, SIDE - 1, SIDE - 1, SIDE - 1),
        (0, 6, 2, 19),
    ],
)
def test_context_and_mode_queries_see_the_patches_of_the_box_with_both_ends(box: tuple[int, int, int, int]) -> None:
    rows = visible(torch.ones(1, GRID_SIDE, GRID_SIDE), [box])[0, QUERIES:]
    assert rows.shape == (QUERIES + 1, WINDOWS + GRID_SIDE**2)
    for row in rows:
        assert torch.equal(row[WINDOWS:], seen_patches(box))


def test_by_nearest_neighbour_a_patch_is_seen_by_its_first_pixel() -> None:
    config = QFormerConfig(num_queries=QUERIES, mask_rule="nearest")
    for box in [(0, 0, 0, 0), (1, 1, 3, 3), (3, 0, 4, 0), (1, 4, 19, 8), (0, 0, SIDE - 1, SIDE - 1)]:
        x0, y0, x1, y1 = box
        picture = torch.zeros(1, 1, SIDE, SIDE)
        picture[:, :, y0 : y1 + 1, x0 : x1 + 1] = 1
        wanted = torch.nn.functional.interpolate(picture, size=(GRID_SIDE, GRID_SIDE), mode="nearest").flatten() > 0
        rows = visible(torch.zeros(1, GRID_SIDE, GRID_SIDE), [box], config)[0]
        assert bool(rows[:, :WINDOWS].all()), "every query sees the CLS tokens, also of a mask that vanished"
        assert not rows[:QUERIES, WINDOWS:].any()
        for row in rows[QUERIES:]:
            assert torch.equal(row[WINDOWS:], wanted)


def test_mask_queries_see_exactly_the_patches_that_the_mask_touches() -> None:
    coverage = torch.zeros(2, GRID_SIDE, GRID_SIDE, dtype=torch.float16)
    coverage[0, 3, 1] = 1 / 16384  # one pixel of a 128 px patch
    coverage[1, 0, 2:] = torch.tensor([0.5, 1.0, 0.25])
    rows = visible(coverage, [(0, 0, SIDE - 1, SIDE - 1)] * 2)[:, :QUERIES, WINDOWS:]
    for row in rows[0]:
        assert row.nonzero().flatten().tolist() == [3 * GRID_SIDE + 1]
    for row in rows[1]:
        assert row.nonzero().flatten().tolist() == [2, 3, 4]


def test_every_query_sees_every_cls_token_even_of_an_empty_mask() -> None:
    rows = visible(torch.zeros(1, GRID_SIDE, GRID_SIDE), [(0, 0, 0, 0)])
    assert rows[..., :WINDOWS].all()
    assert not rows[0, :QUERIES, WINDOWS:].any()


@pytest.mark.parametrize(
    ("config", "context_rows", "mode_rows"),
    [
        (QFormerConfig(num_queries=QUERIES, context="none"), 0, 1),
        (QFormerConfig(num_queries=QUERIES, mode_query=False), QUERIES, 0),
        (QFormerConfig(num_queries=QUERIES, context="none", mode_query=False), 0, 0),
        (QFormerConfig(num_queries=QUERIES, context="global"), QUERIES, 1),
    ],
)
def test_rows_are_mask_then_context_then_mode_as_far_as_there_are_any(
    config: QFormerConfig, context_rows: int, mode_rows: int
) -> None:
    coverage = torch.zeros(1, GRID_SIDE, GRID_SIDE)
    coverage[0, 4, 4] = 1.0
    rows = visible(coverage, [(0, 0, 3, 3)], config)[0, :, WINDOWS:]
    last, first = GRID_SIDE**2 - 1, 0
    wanted = [[last]] * QUERIES + [[first]] * (context_rows + mode_rows)
    assert [row.nonzero().flatten().tolist() for row in rows] == wanted


def test_masks_of_a_batch_do_not_mix() -> None:
    generator = torch.Generator().manual_seed(0)
    coverage = torch.rand(4, GRID_SIDE, GRID_SIDE, generator=generator) * (
        torch.rand(4, GRID_SIDE, GRID_SIDE, generator=generator) < 0.3
    )
    boxes = [(0, 0, 7, 3), (5, 5, 6, 6), (8, 1, 19, 4), (12, 12, 19, 19)]
    together = visible(coverage, boxes)
    for index, box in enumerate(boxes):
        assert torch.equal(together[index], visible(coverage[index : index + 1], [box])[0])


def test_a_grid_is_read_from_the_vision_config() -> None:
    assert Grid.of(VisionConfig()) == Grid(side=80, num_windows=25, patch_size_px=14)
    assert Grid.of(VisionConfig(use_windows=False)) == Grid(side=80, num_windows=1, patch_size_px=14)
