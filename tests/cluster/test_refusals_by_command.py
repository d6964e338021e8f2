"""What `osm` says on two CPU ranks to what it cannot work with: one message of rank 0, and all of them end.

tests/integration/test_refusals.py has what one process refuses. The ranks are started by Lightning, as a user's are.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from shapes_run import OSM, QUOTA, ROOT, settings, write_shapes

pytestmark = pytest.mark.cluster

TIMEOUT_S = 600
"""Of a command, most of which is its start; one that hangs fails."""

TWO_RANKS = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--data.num_workers", "0"]

FEW_STEPS = ["--data.masks_per_epoch", str(2 * QUOTA * 3 + 5)]
"""Three of two ranks, and masks that are not enough for another one."""


def osm(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command until all of its ranks have ended, which is when nobody holds its output any more."""
    own = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    argv = [str(OSM), *map(str, words)]
    with subprocess.Popen(argv, cwd=ROOT, env=own, start_new_session=True, **pipes) as process:
        try:
            said, complained = process.communicate(timeout=TIMEOUT_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(argv, process.returncode, said, complained)


def refusal(*words: str | Path, **environment: str) -> str:
    """The one message with which a command refuses; other ranks may say no more than that they stop."""
    done = osm(*words, **environment)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "frame #" not in done.stderr, "torch shows its own stack"
    (message,) = re.findall(r"^(.*)osm \w+: error: (.*)$", done.stderr, flags=re.MULTILINE)
    assert message[0] in {"", f"[{socket.gethostname()} rank 0] "}
    assert len(message[1]) < 1_000, "the message drowns"
    return message[1]


def free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("", 0))
        return str(listening.getsockname()[1])


@pytest.fixture(scope="module")
def ckpt(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one step."""
    run = tmp_path_factory.mktemp("run")
    short = ["--data.masks_per_epoch", str(QUOTA), "--data.num_workers", "0", "--trainer.limit_val_batches", "0"]
    assert osm("fit", *settings(shapes), *short, "--run", run).returncode == 0
    return run / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_more_ranks_than_images(strategy: str, tmp_path: Path) -> None:
    write_shapes(tmp_path / "shapes", num_train=1)
    words = [*settings(tmp_path / "shapes"), *TWO_RANKS, "--trainer.strategy", strategy, "--run", tmp_path / "run"]
    assert "split 'train' has 1 images for 2 readers (ranks x workers)" in refusal("fit", *words)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_nothing_has_to_be_divided_by_the_number_of_ranks(strategy: str, tmp_path: Path) -> None:
    """Nothing to refuse: one shard, an odd number of images and of masks, and a single image to validate."""
    write_shapes(tmp_path / "shapes", num_train=15, num_val=1)
    words = [*settings(tmp_path / "shapes"), *FEW_STEPS, *TWO_RANKS, "--trainer.strategy", strategy]
    done = osm("fit", *words, "--run", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["step"] == 3
    assert [row["num_masks"] for row in scores["scores"]] == [3, 3]  # those of one image, in two modes


def test_a_port_in_use(shapes: Path, tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = [*settings(shapes), *TWO_RANKS, "--trainer.strategy", "ddp", "--run", tmp_path]
        assert f"port {port} of " in refusal("fit", *words, MASTER_PORT=port)


def test_a_node_that_does_not_come(shapes: Path, tmp_path: Path) -> None:
    words = [*settings(shapes), *TWO_RANKS, "--trainer.num_nodes", "2", "--run", tmp_path]
    words += ["--trainer.strategy", "lightning.pytorch.strategies.DDPStrategy", "--trainer.strategy.timeout", "0:01:00"]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "NODE_RANK": "0"}
    said = refusal("fit", *words, **place)
    assert said.startswith(f"the ranks have not all met at 127.0.0.1:{place['MASTER_PORT']}: Timed out")
    assert "see that trainer.num_nodes nodes run the command" in said


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_checkpoint_of_another_model(ckpt: Path, strategy: str, tmp_path: Path) -> None:
    wider = ["--model.qformer.width", "64", "--trainer.max_epochs", "2"]
    said = refusal("fit", "--ckpt", ckpt, *wider, *TWO_RANKS, "--trainer.strategy", strategy, "--run", tmp_path)
    assert "the checkpoint is of another model" in said
    assert "(4, 32) for (4, 64)" in said


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_another_number_of_ranks(ckpt: Path, strategy: str, tmp_path: Path) -> None:
    words = ["--ckpt", ckpt, "--trainer.max_epochs", "2", *TWO_RANKS, "--trainer.strategy", strategy, "--run", tmp_path]
    said = refusal("fit", *words)
    assert "since then processes was 1, is 2" in said
    assert "set data.resume_approximately" in said
    done = osm("fit", *words, "--data.resume_approximately", "true")
    assert done.returncode == 0, done.stderr
