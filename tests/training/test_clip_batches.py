"""Clipping after every batch: what it does to what is accumulated, over processes too, and where it is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import Job, run
from tiny_training import trainer

from osm_lightning.training import strategies  # noqa: F401  registers them
from osm_lightning.training.clip_batches import ClipBatches
from osm_lightning.training.optim import OptimConfig

LIMIT = 0.05
OPTIM = {"lr": 2e-3, "warmup_steps": 4}


def clipped(gradient: torch.Tensor) -> torch.Tensor:
    norm = float(gradient.norm())
    assert norm > 1.5 * LIMIT, "the limit does nothing here"
    return gradient * LIMIT / norm


def test_two_processes_clip_the_mean_of_what_both_have_accumulated(tmp_path: Path) -> None:
    """Told from the batches' own gradients: one process that clips nothing has them, in turn, as differences."""
    (alone,) = run(Job(tmp_path / "one", steps=1, union_of=2, accumulate=2, gradients=True, clip=None))
    first, both, _, all_four = alone["gradients"]
    task = {"optim": OptimConfig(**OPTIM, clip="batches")}
    ranks = run(Job(tmp_path / "two", "ddp", 2, steps=1, accumulate=2, gradients=True, clip=LIMIT, task=task))
    after_one = clipped(both)
    after_two = clipped(after_one + all_four - both)
    assert not torch.allclose(first, both - first, atol=1e-4), "the processes' batches differ"
    for rank in ranks:
        torch.testing.assert_close(rank["gradients"][0], after_one, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(rank["gradients"][1], after_two, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(*(rank["gradients"] for rank in ranks), strict=True))
    once = clipped(all_four)
    assert not torch.allclose(after_two, once, rtol=1e-2, atol=1e-4), "clipping once would be seen"


def test_without_accumulation_it_is_the_trainers_own_clipping(tmp_path: Path) -> None:
    task = {"optim": OptimConfig(**OPTIM, clip="batches")}
    (batches,) = run(Job(tmp_path / "a", steps=2, gradients=True, clip=LIMIT, task=task))
    (steps,) = run(Job(tmp_path / "b", steps=2, gradients=True, clip=LIMIT))
    assert batches["losses"] == steps["losses"]
    assert all(torch.equal(a, b) for a, b in zip(batches["gradients"], steps["gradients"], strict=True))


@pytest.mark.parametrize("strategy", ["fsdp2", "deepspeed_zero2"])
def test_strategies_that_hold_parts_of_gradients_are_refused(strategy: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"strategy": strategy, "devices": 2, "gradient_clip_val": 1.0}
    loop = trainer(tmp_path, accumulate_grad_batches=2, **settings)
    with pytest.raises(ValueError, match=r"model\.optim\.clip is 'batches', but trainer\.strategy .*strategy ddp"):
        ClipBatches().setup(loop, None, "fit")  # type: ignore[arg-type]
    ClipBatches().setup(loop, None, "validate")  # type: ignore[arg-type]
    ClipBatches().setup(trainer(tmp_path, accumulate_grad_batches=1, **settings), None, "fit")  # type: ignore[arg-type]


def test_scaled_gradients_are_refused(tmp_path: Path) -> None:
    strategy = trainer(tmp_path).strategy
    loop = SimpleNamespace(accumulate_grad_batches=2, gradient_clip_val=1.0, strategy=strategy, precision="16-mixed")
    with pytest.raises(ValueError, match=r"16-mixed gradients are scaled.*bf16-mixed or 32"):
        ClipBatches().setup(loop, None, "fit")  # type: ignore[arg-type]


def test_a_limit_that_is_not_set_is_told(tmp_path: Path) -> None:
    loop = trainer(tmp_path, accumulate_grad_batches=2)
    with pytest.warns(UserWarning, match=r"trainer\.gradient_clip_val is not set"):
        ClipBatches().setup(loop, None, "fit")  # type: ignore[arg-type]
