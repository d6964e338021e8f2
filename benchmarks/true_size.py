"""Builds the paper's towers at true size with random weights, and runs each for one image: time and memory.

    python benchmarks/true_size.py [--models EVA01-g-14 ViT-L-14] [--image_size_px 448] [--dtype float32]

Each model has a process of its own, so that its peak memory is its own. No weights are needed and none are read.
Features of random weights mean nothing; shapes, time and memory are those of the trained tower.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HEAD = (
    "model",
    "parameters of the tower",
    "precision",
    "input, px",
    "windows",
    "tokens x width",
    "build, s",
    "peak while building, GB",
    "one image, s",
    "peak, GB",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["EVA01-g-14", "ViT-L-14"], help="open_clip's names")
    parser.add_argument("--image_size_px", type=int, default=448, help="side of the input")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.models[0], args.image_size_px, args.dtype)))
        return
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", flush=True)
    for model in args.models:
        words = ["--one", "--models", model, "--image_size_px", str(args.image_size_px), "--dtype", args.dtype]
        done = subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        print(f"| {' | '.join(str(row[name]) for name in HEAD)} |", flush=True)


def measure(name: str, image_size_px: int, dtype: Any) -> dict[str, Any]:
    """Builds one tower and runs it for one image, in this process."""
    import torch

    from osm_lightning.model.config import VisionConfig
    from osm_lightning.model.vision import VisionEncoder

    torch.manual_seed(0)
    begin = time.monotonic()
    encoder = VisionEncoder(VisionConfig(name=name, image_size_px=image_size_px, dtype=dtype))
    build_s, build_gb = time.monotonic() - begin, peak_gb()
    frozen = list(encoder.tower.parameters())
    assert not any(parameter.requires_grad for parameter in frozen)
    assert not any(module.training for module in encoder.tower.modules())
    image = torch.randint(0, 256, (1, 3, image_size_px, image_size_px), dtype=torch.uint8)
    begin = time.monotonic()
    tokens_INE = encoder.features(image)
    run_s = time.monotonic() - begin
    windows = encoder.config.num_windows
    assert tokens_INE.shape == (1, windows + encoder.config.grid_side**2, encoder.width)
    assert tokens_INE.isfinite().all()
    values = (
        name,
        f"{sum(parameter.numel() for parameter in frozen) / 1e6:.1f} M",
        dtype,
        image_size_px,
        windows,
        f"{tokens_INE.shape[1]} x {tokens_INE.shape[2]}",
        f"{build_s:.1f}",
        f"{build_gb:.2f}",
        f"{run_s:.1f}",
        f"{peak_gb():.2f}",
    )
    return dict(zip(HEAD, values, strict=True))


def peak_gb() -> float:
    """The most memory that this process has held, by the kernel's count; Linux only."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9


if __name__ == "__main__":
    main()
