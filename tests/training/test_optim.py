from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from tiny_training import scenes_data, tiny_task, trainer
from torch import nn

from osm_lightning.training.optim import OptimConfig, adamw, parameter_groups, schedule_factor, warmup_cosine


class Mixed(nn.Module):
    """One of each: what decays, what doesn't, what is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.words = nn.Embedding(5, 3)
        self.query = nn.Parameter(torch.zeros(2, 3))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)


def test_only_weights_of_linear_layers_decay() -> None:
    model = Mixed()
    decaying, others = parameter_groups(model, 0.05)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {name_of[id(p)] for p in decaying["params"]} == {"linear.weight"}
    assert {name_of[id(p)] for p in others["params"]} == {
        "linear.bias",
        "norm.weight",
        "norm.bias",
        "words.weight",
        "query",
    }


def test_all_that_is_trained_can_decay_as_released() -> None:
    model = Mixed()
    groups, usual = parameter_groups(model, 0.05, "all"), parameter_groups(model, 0.05)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.05]
    for group, other in zip(groups, usual, strict=True):
        assert list(map(id, group["params"])) == list(map(id, other["params"])), "checkpoints number them by group"
    nn.init.ones_(model.norm.weight)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    adamw(model, OptimConfig(lr=0.1, weight_decay=0.5, decay="all")).step()
    for name in ("linear.weight", "linear.bias", "norm.weight", "words.weight"):
        torch.testing.assert_close(model.get_parameter(name), before[name] * (1 - 0.1 * 0.5))
    assert torch.equal(model.frozen.weight, before["frozen.weight"])


def test_the_models_parameters_are_all_in_one_group_or_the_other(tmp_path: Path) -> None:
    task = tiny_task()
    trainer(tmp_path, max_steps=1).fit(task, scenes_data(task))
    decaying, others = parameter_groups(task.osm, 0.05)
    name_of = {id(parameter): name for name, parameter in task.osm.named_parameters()}
    decays, stays = ({name_of[id(p)] for p in group["params"]} for group in (decaying, others))
    assert decays | stays == {name for name, _ in task.osm.trained()}
    assert not decays & stays
    assert "projection.weight" in decays
    assert {"modes.query", "modes.embedding", "qformer.mask_query_QD", "projection.bias"} <= stays
    assert all(name.endswith(".weight") and "norm" not in name.lower() and "embed" not in name for name in decays)


def test_zero_gradient_moves_only_what_decays() -> None:
    model = Mixed()
    nn.init.ones_(model.norm.weight)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    adamw(model, OptimConfig(lr=0.1, weight_decay=0.5)).step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"linear.weight"}
    torch.testing.assert_close(model.linear.weight, before["linear.weight"] * (1 - 0.1 * 0.5))


# The schedule

STEPS = OptimConfig(warmup_steps=10, final_share=0.0)


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (60, 0.5), (110, 0.0), (10**6, 0.0)]
)
def test_schedule_at_its_corners(step: int, factor: float) -> None:
    assert schedule_factor(step, STEPS, 110) == pytest.approx(factor, abs=1e-12)


def test_schedule_rises_then_falls() -> None:
    factors = [schedule_factor(step, STEPS, 110) for step in range(111)]
    assert all(a < b for a, b in pairwise(factors[:10]))
    assert all(a > b for a, b in pairwise(factors[10:]))


def test_a_share_of_the_peak_may_be_left_at_the_end() -> None:
    config = OptimConfig(warmup_steps=0, final_share=0.2)
    assert schedule_factor(0, config, 50) == 1.0
    assert schedule_factor(25, config, 50) == pytest.approx(0.6)
    assert schedule_factor(50, config, 50) == pytest.approx(0.2)


def test_a_run_shorter_than_its_warm_up_never_divides_by_zero() -> None:
    assert schedule_factor(3, STEPS, 4) == 0.4
    assert schedule_factor(10, STEPS, 10) == 1.0


def test_the_released_horizon_ends_near_86_percent_and_begins_at_zero() -> None:
    """15,625 batches, four to a step."""
    config = OptimConfig(warmup_steps=100, horizon="batches")
    assert schedule_factor(0, config, 15_625) == 0
    assert schedule_factor(50, config, 15_625) == 0.5
    assert schedule_factor(100, config, 15_625) == 1
    assert schedule_factor(15_625 // 4, config, 15_625) == pytest.approx(0.86, abs=0.005)


def test_scheduler_sets_both_groups() -> None:
    optimizer = adamw(Mixed(), OptimConfig(lr=2.0, warmup_steps=4))
    scheduler = warmup_cosine(optimizer, OptimConfig(lr=2.0, warmup_steps=4), 8)
    rates = []
    for _ in range(8):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert all(a == b for a, b in rates)
    expected = [2 * schedule_factor(step, OptimConfig(warmup_steps=4), 8) for step in range(8)]
    assert [a for a, _ in rates] == pytest.approx(expected)


# Under a trainer


class Rates(lightning.Callback):
    """Learning rate and gradient norm of every optimizer step, after clipping."""

    def __init__(self) -> None:
        self.lr: list[float] = []
        self.norm: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > len(self.norm):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self.norm.append(float(torch.nn.utils.get_total_norm(gradients)))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.lr.append(optimizer.param_groups[0]["lr"])


def test_schedule_counts_optimizer_steps_when_gradients_accumulate(tmp_path: Path) -> None:
    task = tiny_task(optim=OptimConfig(lr=1e-3, warmup_steps=2))
    rates = Rates()
    loop = trainer(tmp_path, accumulate_grad_batches=3, max_epochs=2, gradient_clip_val=1e-3, callbacks=[rates])
    loop.fit(task, scenes_data(task, steps=9, quota=2))
    assert loop.global_step == 6  # 2 epochs of 9 batches, three to a step
    expected = [1e-3 * schedule_factor(step, task.optim, 6) for step in range(6)]
    assert rates.lr == pytest.approx(expected)
    assert max(rates.lr) == pytest.approx(1e-3)
    assert task.lr_schedulers().get_last_lr() == pytest.approx([0.0, 0.0], abs=1e-12)
    assert rates.norm == pytest.approx([1e-3] * 6, rel=1e-3), "the sum of a step is clipped, once"


def test_the_released_schedule_counts_batches_and_moves_with_steps(tmp_path: Path) -> None:
    task = tiny_task(optim=OptimConfig(lr=1e-3, warmup_steps=1, horizon="batches"))
    rates = Rates()
    loop = trainer(tmp_path, accumulate_grad_batches=2, max_epochs=2, callbacks=[rates])
    loop.fit(task, scenes_data(task, steps=4, quota=2))
    assert rates.lr == pytest.approx([1e-3 * schedule_factor(step, task.optim, 8) for step in range(4)])
    assert rates.lr[0] == 0
    task = tiny_task(optim=task.optim)
    task.trainer = trainer(tmp_path, accumulate_grad_batches=2, max_epochs=2, max_steps=3)
    task.trainer.datamodule = scenes_data(task, steps=4, quota=2)
    assert task._total_steps() == 6, "three steps of two batches"
