from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from tiny_training import scenes_data, tiny_task, trainer

from osm_lightning.evaluation.naming import ScoreRow
from osm_lightning.training.callbacks import Throughput, WriteScores, set_aside


def logged(folder: Path, name: str) -> list[tuple[int, float]]:
    """Step and value of every row of metrics.csv that has one."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row.get(name)]


# Throughput


@pytest.mark.parametrize("accumulate", [1, 2])
def test_throughput_reaches_the_logger_at_its_steps_in_every_epoch(tmp_path: Path, accumulate: int) -> None:
    """Five steps an epoch and a row every third step: the rows don't fall on an epoch's own count of batches."""
    task = tiny_task()
    loop = trainer(
        tmp_path,
        logger=CSVLogger(tmp_path, name="", version=""),
        max_epochs=2,
        log_every_n_steps=3,
        accumulate_grad_batches=accumulate,
        callbacks=[Throughput()],
    )
    loop.fit(task, scenes_data(task, steps=5 * accumulate, quota=2))
    masks_per_step = 2 * accumulate
    # Lightning counts the steps of its rows from 0.
    assert logged(tmp_path, "train/masks_seen") == [(step - 1, step * masks_per_step) for step in (3, 6, 9)]
    assert len(logged(tmp_path, "train/masks_per_s")) == 3
    assert all(0 <= share <= 1 for _, share in logged(tmp_path, "train/data_wait_share"))


def test_masks_seen_survive_a_checkpoint() -> None:
    callback, resumed = Throughput(), Throughput()
    callback.masks_seen = 1234
    resumed.load_state_dict(callback.state_dict())
    assert resumed.masks_seen == 1234


def test_waiting_is_the_time_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """One second of waiting, three of work, twice: waiting is a quarter; two masks in eight seconds."""
    clock = iter([0.0, 1.0, 4.0, 5.0, 8.0, 8.0])
    monkeypatch.setattr("osm_lightning.training.callbacks.time.perf_counter", lambda: next(clock))
    rows: dict[str, float] = {}
    module: Any = SimpleNamespace(log=lambda name, value, **_: rows.update({name: value}), log_dict=rows.update)
    batch: Any = SimpleNamespace(num_masks=1, num_images=1, num_vanished=3, num_skipped=0)
    loop: Any = SimpleNamespace(world_size=1, log_every_n_steps=2, global_step=0)
    callback = Throughput()
    for step in (1, 2):
        callback.on_train_batch_start(loop, module, batch, step - 1)
        loop.global_step = step
        callback.on_train_batch_end(loop, module, None, batch, step - 1)
    assert rows["train/data_wait_share"] == pytest.approx(0.25)
    assert rows["train/masks_per_s"] == rows["train/images_per_s"] == pytest.approx(0.25)
    assert rows["train/vanished_masks"] == 6


def test_no_batch_falls_between_rows_when_gradients_accumulate() -> None:
    rows: list[float] = []
    module: Any = SimpleNamespace(
        log=lambda *_, **__: None, log_dict=lambda row: rows.append(row["train/vanished_masks"])
    )
    batch: Any = SimpleNamespace(num_masks=1, num_images=1, num_vanished=3, num_skipped=0)
    loop: Any = SimpleNamespace(world_size=1, log_every_n_steps=1, global_step=0)
    callback = Throughput()
    callback.on_train_epoch_start(loop, module)
    for number in range(6):
        callback.on_train_batch_start(loop, module, batch, number)
        loop.global_step = (number + 1) // 2
        callback.on_train_batch_end(loop, module, None, batch, number)
    assert rows == [6, 6, 6]


def test_metrics_of_a_runs_earlier_part_are_kept(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.csv"
    set_aside(metrics)
    assert list(tmp_path.iterdir()) == []
    for part in ("first", "second"):
        metrics.write_text(part)
        set_aside(metrics)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "metrics.1.csv": "first",
        "metrics.2.csv": "second",
    }


# Scores


def score_trainer(**settings: Any) -> Any:
    return SimpleNamespace(**{"sanity_checking": False, "fast_dev_run": False, "global_step": 7, **settings})


ROW = ScoreRow("scenes", "agnostic", 4, 2, 1, acc=0.5, acc_strict=0.25, acc_balanced=0.5, niv=0.25, majority=0.25)


def test_scores_are_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback, task = WriteScores(tmp_path / "new" / "run"), SimpleNamespace(score_rows=[ROW])
    for step in (7, 8):
        callback.on_validation_end(score_trainer(global_step=step), task)  # type: ignore[arg-type]
    assert "scenes" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["scores.json"]
    content = json.loads((tmp_path / "new" / "run" / "scores.json").read_text())
    assert content["step"] == 8
    assert ScoreRow(**content["scores"][0]) == ROW


@pytest.mark.parametrize("state", [{"sanity_checking": True}, {"fast_dev_run": True}])
def test_scores_of_a_trial_run_are_not_kept(tmp_path: Path, state: dict[str, bool]) -> None:
    WriteScores(tmp_path).on_validation_end(score_trainer(**state), SimpleNamespace(score_rows=[ROW]))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
