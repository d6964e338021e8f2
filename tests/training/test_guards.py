from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from test_callbacks import logged
from tiny_training import build, scenes_data, tiny_task, trainer

from osm_lightning.training.guards import MIN_STEPS, GradientGuard
from osm_lightning.training.optim import OptimConfig

WAYS = {"trainer": SimpleNamespace(global_step=7, is_global_zero=True)}


class Spoil(Callback):
    """Makes what a layer gives for some batches no numbers."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in self.numbers:
            projection = pl_module.osm.projection
            hook = projection.register_forward_hook(lambda module, given, made: (hook.remove(), made * math.nan)[1])


class Snapshots(Callback):
    """Weights and optimizer state after every batch."""

    def __init__(self) -> None:
        self.taken: list[list[torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        state = trainer.optimizers[0].state
        moments = [value.clone() for of in state.values() for value in of.values()]
        self.taken.append([parameter.detach().clone() for _, parameter in pl_module.osm.trained()] + moments)


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def test_a_loss_that_is_no_number_changes_neither_weights_nor_optimizer(tmp_path: Path) -> None:
    task, snapshots = tiny_task(optim=OptimConfig(warmup_steps=1)), Snapshots()
    loop = trainer(
        tmp_path,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        logger=CSVLogger(tmp_path, name="", version=""),
        callbacks=[Spoil(2), GradientGuard(1, 10), snapshots],
    )
    with pytest.warns(UserWarning, match=r"train/loss is nan at step 2, which is skipped: images .+\."):
        loop.fit(task, scenes_data(task, steps=5))
    one, two, three, four, five = snapshots.taken
    assert same(two, three)
    assert not same(one, two)
    assert not same(three, four)
    assert not same(four, five)
    assert all(torch.isfinite(tensor).all() for tensor in five)
    assert logged(tmp_path, "train/skipped_steps") == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 1)]
    for name in ("train/grad_norm", "train/loss"):
        assert [step for step, value in logged(tmp_path, name) if math.isfinite(value)] == [0, 1, 3, 4], name
    assert loop.lr_scheduler_configs[0].scheduler.last_epoch == 5, "the schedule ends where the run does"


def test_an_infinite_loss_with_a_finite_gradient_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a token of probability zero has it."""
    task, snapshots = build(tiny_task(), tmp_path), Snapshots()
    real = task.osm.forward

    def infinite(*words: Any, **named: Any) -> Any:
        answers = real(*words, **named)
        answers.logits_PV[0, answers.target_P[0]] = -math.inf
        return answers

    monkeypatch.setattr(task.osm, "forward", infinite)
    before = [parameter.detach().clone() for _, parameter in task.osm.trained()]
    with pytest.warns(UserWarning, match="train/loss is inf"):
        trainer(tmp_path, callbacks=[GradientGuard(9, 10), snapshots]).fit(task, scenes_data(task, steps=2))
    assert same(snapshots.taken[-1], before)


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    task = tiny_task()
    loop = trainer(tmp_path, callbacks=[Spoil(0, 2, 3), GradientGuard(1, 10)])
    with (
        pytest.warns(UserWarning, match="train/loss is nan"),
        pytest.raises(ValueError, match=r"no number at step 3, .* 1 steps before.*optim\.lr"),
    ):
        loop.fit(task, scenes_data(task, steps=6))


def judge(guard: GradientGuard, *norms: float) -> None:
    for norm in norms:
        guard._judge(norm, WAYS["trainer"], SimpleNamespace(log_dict=lambda *_: None))  # type: ignore[arg-type]


def test_a_spike_is_told_by_the_median(recwarn: pytest.WarningsRecorder) -> None:
    guard = GradientGuard(1, 10)
    judge(guard, *[1.0] * (MIN_STEPS - 1), 500.0)  # one among the first is not told, and does not move the median
    assert not recwarn.list
    judge(guard, 10.0)
    assert not recwarn.list
    judge(guard, 10.1)
    assert [str(warning.message)[:40] for warning in recwarn.list] == ["train/grad_norm is 10.1 at step 7, 10 ti"]


def test_counts_survive_a_checkpoint() -> None:
    guard, resumed = GradientGuard(2, 10), GradientGuard(2, 10)
    judge(guard, math.nan, 1.0, math.nan, math.inf)
    resumed.load_state_dict(guard.state_dict())
    assert (resumed.skipped, resumed.skipped_in_row) == (3, 2)
    with pytest.raises(ValueError, match="nor was it in the 2 steps before"):
        judge(resumed, math.nan)
