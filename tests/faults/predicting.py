"""`osm predict` with a tiny untrained model, on ranks that are processes of their own, for tests that stop it."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from osm_lightning.__main__ import main
from osm_lightning.training.task import OSMTask

ROOT = Path(__file__).parents[2]
STACK = ("configs/joint.yaml", "configs/model/tiny.yaml", "configs/trainer/cpu.yaml")
NUM_MASKS = 3

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["predicting"])


def write_photos(folder: Path, num_images: int) -> None:
    """Images of noise, each with masks in a folder of its own."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for number in range(num_images):
        pixels = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number:03}.png")
        (folder / "masks" / f"{number:03}").mkdir(parents=True)
        for mask_id in range(NUM_MASKS):
            mask = np.zeros((40, 60), np.uint8)
            top, left = rng.integers(0, 20, 2)
            mask[top : top + 15, left : left + 30] = 255
            Image.fromarray(mask).save(folder / "masks" / f"{number:03}" / f"{mask_id}.png")


class Prediction:
    """The processes of one `osm predict`, started at once."""

    def __init__(
        self,
        photos: Path,
        out: Path,
        ranks: int = 1,
        words: Sequence[str] = (),
        *,
        slow_s: float = 0.0,
        most_bytes: int | None = None,
    ) -> None:
        """Starts them.

        Args:
            photos: folder of `images` and `masks`.
            out: output folder; stderr and what is named are written beside it.
            ranks: processes.
            words: further words of the command.
            slow_s: how long every image takes at least.
            most_bytes: largest file that the processes may write: a disk that is full for all that is larger.
        """
        self.out, self.ranks = out, ranks
        argv = ["predict", *(word for path in STACK for word in ("--config", str(ROOT / path)))]
        # A loader's workers hand over batches in files of shared memory, for which a disk may be too full as well.
        argv += ["--data.num_workers", "1" if most_bytes is None else "0", "--trainer.precision", "32"]
        argv += ["--images", str(photos / "images"), "--masks", str(photos / "masks"), "--out", str(out)]
        argv += ["--trainer.devices", str(ranks), "--trainer.enable_progress_bar", "false"]
        argv += [*(["--trainer.strategy", "ddp"] if ranks > 1 else []), *words]
        said(out).unlink(missing_ok=True)
        named(out).unlink(missing_ok=True)
        port = _free_port()
        self.processes: list[BaseProcess] = [
            CONTEXT.Process(target=_run, args=(rank, ranks, port, argv, out, slow_s, most_bytes))
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def wait(self) -> list[int | None]:
        """Exit codes, once all have ended."""
        for process in self.processes:
            process.join(300)
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """SIGKILL to every process and its workers, with no time for anything."""
        for process in self.processes:
            try:
                os.killpg(process.pid or 0, signal.SIGKILL)
            except ProcessLookupError:  # it has ended, or has no group of its own yet, and no workers either
                process.kill()
        self.wait()

    def wait_for_images(self, num_images: int) -> bool:
        """Waits until so many more images are named; whether the run still goes on then."""
        while all(process.is_alive() for process in self.processes):
            if len(names(self.out)) >= num_images:
                return True
            time.sleep(0.002)
        return False


def said(out: Path) -> Path:
    """Where the last run's stderr and stdout are."""
    return out.with_name(f"{out.name}.said")


def named(out: Path) -> Path:
    """Where the last run notes what the model names."""
    return out.with_name(f"{out.name}.named")


def names(out: Path) -> Counter[str]:
    """Images that the model named in the last run, and how often."""
    return Counter(named(out).read_text().split()) if named(out).exists() else Counter()


def kept(out: Path) -> Counter[str]:
    """Images in the journal, and how often."""
    lines = [line for part in (out / ".predictions").glob("*.jsonl") for line in part.read_bytes().splitlines(True)]
    return Counter(json.loads(line)["key"] for line in lines if line.endswith(b"\n"))


def _run(rank: int, ranks: int, port: int, argv: list[str], out: Path, slow_s: float, most_bytes: int | None) -> None:
    os.setsid()
    if ranks > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = said(out).open("a", buffering=1)
    _note_what_is_named(named(out), slow_s)
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))
    main(argv)


def _note_what_is_named(path: Path, slow_s: float) -> None:
    predict_step = OSMTask.predict_step

    def noting(self: OSMTask, batch: Any, batch_index: int) -> Any:
        time.sleep(slow_s)
        result = predict_step(self, batch, batch_index)
        with path.open("a") as file:
            file.write("".join(f"{key}\n" for key in batch.keys))
        return result

    OSMTask.predict_step = noting  # type: ignore[method-assign]


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
