"""A batch whose loss is no number: all ranks skip its step, nothing else changes, and too many of them end the run."""

import pytest
from fitting import diary
from processes import Fit, finish, lines

LOSS, WEIGHTS = 1, 2

ENGINES = ["ddp", *(pytest.param(name, marks=pytest.mark.cluster) for name in ("deepspeed_zero2", "fsdp2"))]


def weights(folder, rank=0):
    return [line[WEIGHTS] for _, line in sorted(diary(folder, rank).items())]


def skipped(folder, rank=0):
    """Numbers of the batches after which the weights are what they were."""
    after = weights(folder, rank)
    return [number for number in range(1, len(after)) if after[number] == after[number - 1]]


@pytest.mark.parametrize("poisoned", [{1: [5]}, pytest.param({0: [5], 1: [5]}, marks=pytest.mark.cluster)])
@pytest.mark.parametrize("strategy", ENGINES)
def test_ranks_skip_the_same_steps_together(tmp_path, strategy, poisoned):
    finish(tmp_path, ranks=2, strategy=strategy, poisoned=poisoned)
    assert [rank for rank in (0, 1) if diary(tmp_path, rank)[5][LOSS] == "nan"] == list(poisoned)
    assert weights(tmp_path, 0) == weights(tmp_path, 1)
    assert skipped(tmp_path) == [5]


@pytest.mark.cluster
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_zero2", "fsdp2"])
def test_a_skipped_step_takes_its_accumulated_batches_along(tmp_path, strategy):
    finish(tmp_path, ranks=2, strategy=strategy, poisoned={1: [6]}, accumulate_grad_batches=3)
    assert weights(tmp_path, 0) == weights(tmp_path, 1)
    stepped = set(range(1, 24)) - set(skipped(tmp_path))
    assert stepped == {2, 5, 11, 14, 17, 20, 23}


@pytest.mark.parametrize("strategy", ENGINES)
def test_too_many_in_a_row_end_all_ranks(tmp_path, strategy):
    """Two may be skipped in a row (`fitting.py`); a good step between starts the count anew."""
    run = Fit(tmp_path, ranks=2, strategy=strategy, poisoned={1: [3, 4, 6, 7, 8]})
    assert run.wait() == [1, 1]
    assert "ValueError: the gradient is no number at step" in run.said(1)
    assert skipped(tmp_path) == [3, 4, 6, 7]
    assert lines(tmp_path) == 8
