"""Masks per second of one process and of two, what communication takes, and the memory of every rank, by strategy.

    python benchmarks/bench_scaling.py
    python benchmarks/bench_scaling.py --strategies ddp deepspeed_zero2 --steps 10 --masks 16

Every row is a fit of its own in real processes (gloo, DeepSpeed, FSDP2), one thread each, on the shipped scenes; every
rank has `--masks` masks per step, so that two ranks do twice the work. The first step is not counted. `all-reduce` is
one of all trained values by itself, after the fit, when nothing else runs: what a step of DDP has to send. What ZeRO-3
and FSDP2 gather beside is in their step only. Memory is the largest of the ranks: the highest resident size (VmHWM),
and what belongs to the process alone (smaps_rollup), before the model is built and after the last step. Linux only.
"""

import argparse
import ctypes
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any, cast

import lightning
import torch
import torch.distributed as dist

from bench_model import build
from osm_lightning.batch import MaskBatch
from osm_lightning.data.module import OSMData, SourceConfig
from osm_lightning.training.strategies import register_strategies
from osm_lightning.training.task import OSMTask

STRATEGIES = ("ddp", "deepspeed_zero2", "deepspeed_zero3", "fsdp2")
RANKS = 2
REDUCTIONS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/model/mid.yaml"), help="model config")
    parser.add_argument("--shards", default="data_shards/scenes", help="shard folder with a train split")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, help="what two processes run under")
    parser.add_argument("--steps", type=int, default=5, help="counted steps, after one that is not")
    parser.add_argument("--masks", type=int, default=8, help="masks of a rank's step")
    parser.add_argument("--masks-per-image", type=int, default=8)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        print(json.dumps(fit(args, *json.loads(args.rank_of))))
        return
    print(f"{args.config}, {args.masks} masks per rank and step, one thread per rank, torch {torch.__version__}")
    columns = (("ranks", 7), ("masks/s", 9), ("s/step", 8), ("all-reduce", 12), ("of step", 9))
    memory = (("peak MB", 10), ("own before", 12), ("own after", 11))
    print(f"{'':18}" + "".join(f"{name:>{width}}" for name, width in (*columns, *memory)))
    for strategy, ranks in (("auto", 1), *((name, RANKS) for name in args.strategies)):
        rows = run_ranks(strategy, ranks)
        step, reduction = (max(row[key] for row in rows) for key in ("step_s", "reduction_s"))
        peak, before, after = (max(row[key] for row in rows) for key in ("peak_mb", "before_mb", "after_mb"))
        speed = f"{ranks:7d}{ranks * args.masks / step:9.2f}{step:8.2f}{reduction:12.3f}{reduction / step:9.1%}"
        print(f"{strategy:18}{speed}{peak:10.0f}{before:12.0f}{after:11.0f}", flush=True)


def run_ranks(strategy: str, ranks: int) -> list[dict[str, float]]:
    """Starts the processes of a fit, and reads what each measured.

    Raises:
        RuntimeError: one of them failed.
    """
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = str(listening.getsockname()[1])
    processes = []
    for rank in range(ranks):
        own = {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        words = [sys.executable, *sys.argv, "--rank-of", json.dumps([strategy, ranks])]
        # Not a pipe: nobody reads it while the other rank is waited for.
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        process = subprocess.Popen(words, env={**os.environ, **own}, stdout=log, stderr=subprocess.STDOUT, text=True)
        processes.append((process, log))
    said = []
    try:
        for process, log in processes:
            code = process.wait()
            log.seek(0)
            said.append(log.read())
            if code:
                raise RuntimeError(f"a rank of {strategy} ended with code {code}:\n{said[-1]}")
    finally:
        for process, log in processes:
            process.kill()
            log.close()
    return [next(json.loads(line) for line in text.splitlines() if line.startswith('{"step_s"')) for text in said]


def fit(args: argparse.Namespace, strategy: str, ranks: int) -> dict[str, float]:
    """One rank's part of a fit, measured."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    register_strategies()
    task = build(args.config)
    measure = Measure()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy,
        max_epochs=1,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        callbacks=[measure],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, scenes(task, args, (args.steps + 1) * args.masks * ranks))
    return measure.result()


def scenes(task: OSMTask, args: argparse.Namespace, num_masks: int) -> OSMData:
    """Data for a task; every rank has the quota in each of its steps."""
    return OSMData(
        {"scenes": SourceConfig(args.shards, quota=args.masks)},
        task.language.tokenizer or task.language.name,
        task.qformer.instruction_tokenizer,
        modes=["scenes"],
        image_size_px=task.vision.image_size_px,
        patch_size_px=task.vision.patch_size_px,
        context=task.qformer.context,
        masks_per_image=args.masks_per_image,
        masks_per_epoch=num_masks,
        num_workers=0,
    )


class Measure(lightning.Callback):
    """Times steps, then all-reduces, and reads this process's memory."""

    def __init__(self) -> None:
        self.steps_s: list[float] = []
        self.reductions_s: list[float] = [0.0]
        self.before_mb = self.after_mb = self._start = 0.0

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Memory before the model is built."""
        self.before_mb = own_mb()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: MaskBatch, batch_idx: int) -> None:
        """Starts the clock; all ranks begin together."""
        trainer.strategy.barrier()
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: MaskBatch, batch_idx: int) -> None:
        """Stops it; the optimizer's step is in it."""
        self.steps_s.append(time.perf_counter() - self._start)
        self.after_mb = own_mb()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Times all-reduces of as many values as are trained."""
        if not dist.is_initialized():
            return
        shapes = cast("OSMTask", pl_module).osm.kept_shapes().values()
        values = torch.zeros(sum(torch.Size(shape).numel() for shape in shapes))
        self.reductions_s = []
        for _ in range(REDUCTIONS):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(values)
            self.reductions_s.append(time.perf_counter() - start)

    def result(self) -> dict[str, float]:
        """What was measured; medians."""
        return {
            "step_s": median(self.steps_s[1:]),
            "reduction_s": median(self.reductions_s),
            "peak_mb": kilobytes("status", "VmHWM") / 1000,
            "before_mb": self.before_mb,
            "after_mb": self.after_mb,
        }


def own_mb() -> float:
    """Memory in use that belongs to this process alone: no library's or weight file's pages that others map too."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and is kept for later is in nobody's use
    return kilobytes("smaps_rollup", "Private_Clean", "Private_Dirty") / 1000


def kilobytes(table: str, *rows: str) -> int:
    """Sum of rows of one of /proc's tables."""
    lines = (line.split() for line in Path("/proc/self", table).read_text().splitlines())
    return sum(int(words[1]) for words in lines if words[0].rstrip(":") in rows)


if __name__ == "__main__":
    main()
