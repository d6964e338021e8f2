"""Checkpoints written beside training (--async_save): the same ones, none is told of too early, no error is lost."""

import resource
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from fitting import diary
from processes import Fit, finish, same
from shapes_run import OSM, QUOTA, ROOT, run_osm, settings, write_shapes

from osm_lightning.weights.sharded import partial_of

SLOW_DISK_S = 1.0

SMALL = 60_000
"""Bytes of a file that holds a fit's diary, and no checkpoint."""


def cluster(value):
    """A parameter that is too much for `make test`."""
    return pytest.param(value, marks=pytest.mark.cluster)


def equal(one, other):
    """Whether two checkpoints hold the same, to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def content(folder):
    """Of a run's last checkpoint, without the folder's name."""
    held = torch.load(folder / "last.ckpt", weights_only=True)
    named = [state for name, state in held["callbacks"].items() if name.startswith("ModelCheckpoint")]
    for state in named:
        for key in [key for key, value in state.items() if str(folder) in str(value)]:
            del state[key]
    return held


@pytest.mark.parametrize("ranks", [1, cluster(2)])
def test_a_run_ends_with_the_same_checkpoint(folders, ranks):
    whole, beside = folders
    finish(whole, ranks=ranks)
    finish(beside, ranks=ranks, beside=True, slow_disk_s=0.2)  # so that steps are made meanwhile
    same(beside, whole, ranks)
    assert equal(content(beside), content(whole))
    assert not equal(content(beside), {**content(whole), "global_step": 0}), "it takes everything for equal"


@pytest.mark.parametrize("ranks", [1, cluster(2)])
def test_a_signal_within_a_write_leaves_a_whole_checkpoint(folders, ranks):
    whole, beside = folders
    finish(whole, ranks=ranks, interruptible=True)
    run = Fit(beside, ranks=ranks, interruptible=True, beside=True, slow_disk_s=SLOW_DISK_S)
    run.wait_for_save()  # at the end of the first epoch
    assert run.all_alive(), run.said()
    run.signal(signal.SIGTERM, 0)
    assert run.wait() == [143] * ranks, run.said()
    assert not partial_of(beside / "last.ckpt").exists()
    step = torch.load(beside / "last.ckpt", weights_only=True)["global_step"]
    assert step >= 12
    assert f"SIGTERM: saved {beside}/last.ckpt at step {step}; " in run.said()
    finish(beside, ranks=ranks, interruptible=True, beside=True)
    same(beside, whole, ranks)


def test_a_signal_whose_checkpoint_fails_is_not_said_to_be_saved(tmp_path):
    run = Fit(tmp_path, interruptible=True, beside=True, most_bytes=[SMALL])
    run.wait_for_lines(3)
    run.signal(signal.SIGTERM, 0)
    assert run.wait() == [1]
    assert f"ValueError: checkpoint {tmp_path}/last.ckpt could not be written: " in run.said()
    assert "SIGTERM: saved" not in run.said()


@pytest.mark.parametrize("ranks", [1, cluster(2)])
def test_a_write_that_fails_ends_the_run_at_the_next_save(tmp_path, ranks):
    run = Fit(tmp_path, ranks=ranks, beside=True, most_bytes=[SMALL])
    codes = run.wait()
    assert codes[0] == 1
    assert codes[-1] in {1, 2}
    assert f"ValueError: checkpoint {tmp_path}/last.ckpt could not be written: " in run.said()
    assert 2 <= len(diary(tmp_path)) <= 4
    assert list(tmp_path.glob("*last.ckpt*")) == []


@pytest.mark.parametrize("strategy", ["deepspeed_zero2", "{class_path: osm_lightning.training.fsdp2.FSDP2}"])
def test_engines_that_write_folders_refuse_it(tmp_path, shapes, strategy):
    overlay = tmp_path / "strategy.yaml"
    overlay.write_text(f"trainer: {{strategy: {strategy}}}\n", encoding="utf-8")
    words = [*settings(shapes), "--config", overlay, "--run", tmp_path / "run", "--async_save", "true"]
    done = run_osm("fit", *words)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "--async_save is for one file that one process writes, but trainer.strategy" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("strategy", ["auto", cluster("ddp")])
def test_a_last_write_that_fails_is_told_at_the_end(tmp_path, strategy):
    write_shapes(tmp_path / "shapes")
    words = [*settings(tmp_path / "shapes"), "--run", tmp_path / "run", "--async_save", "true"]
    words += ["--data.masks_per_epoch", str(QUOTA * 4), "--data.num_workers", "0", "--trainer.limit_val_batches", "0"]
    words += ["--trainer.strategy", strategy, "--trainer.devices", "1" if strategy == "auto" else "2"]
    done = subprocess.run(
        [str(OSM), "fit", *map(str, words)],
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, resource.RLIM_INFINITY)),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "last.ckpt could not be written: " in done.stderr
    assert "run folder:" not in done.stdout, "it says that all is well"
    assert list(Path(tmp_path / "run" / "checkpoints").iterdir()) == []
