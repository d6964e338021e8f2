"""Does the mode query align names with vocabularies? Six shard sets of the same photographs, and a table of scores.

    python benchmarks/six_vocabularies.py build --coco COCO_MINI --out data_shards/six_mini
    osm fit --config configs/joint.yaml --config configs/model/mini.yaml --config configs/data/six_mini.yaml \
            --config configs/trainer/cpu.yaml --run runs/six-mini
    osm validate --ckpt runs/six-mini/checkpoints/last.ckpt \
            --model.named_modes "[agnostic,coco,lvis,ade20k,cityscapes,a847,pc459]" --run runs/six-mini-modes
    python benchmarks/six_vocabularies.py table --scores runs/six-mini-modes/scores.json

`build` writes COCO's photographs and masks in the raw layout of every dataset, each class under the name that the
dataset has for it, and runs `osm shards build` on each. `table` shows the accuracy on every dataset (rows) in every
mode (columns).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

# The raw layouts are written by what the tests of the converters write them with.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "shards"))

from six_layouts import RAW, write_six

SPLITS = {"coco": ("train2017", "val2017")}
"""Splits of a dataset, where they are not train and val."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    building = commands.add_parser("build", help="write and build the six shard sets")
    building.add_argument("--coco", type=Path, required=True, help="folder in COCO's panoptic layout")
    building.add_argument("--out", type=Path, default=Path("data_shards/six_mini"), help="folder of the shard folders")
    building.set_defaults(run=lambda args: build(args.coco, args.out))
    showing = commands.add_parser("table", help="show scores.json as a table")
    showing.add_argument("--scores", type=Path, required=True, help="what osm validate wrote")
    showing.set_defaults(run=lambda args: print(table(json.loads(args.scores.read_text()))))
    args = parser.parse_args()
    args.run(args)


def build(coco: Path, out: Path) -> None:
    """Writes the raw folders into a temporary place, and shards of all of them."""
    with tempfile.TemporaryDirectory() as folder:
        write_six(coco, Path(folder))
        for dataset, raw in RAW.items():
            for split in SPLITS.get(dataset, ("train", "val")):
                source = Path(folder) / "raw" / raw
                words = [dataset, "--src", str(source), "--split", split, "--out", str(out / dataset)]
                subprocess.run([sys.executable, "-m", "osm_lightning", "shards", "build", *words], check=True)


def table(scores: dict) -> str:
    """Acc in percent: a row for every dataset, a column for every mode; a dataset's own mode is bold."""
    acc = {(row["dataset"], row["mode"]): row["acc"] for row in scores["scores"]}
    masks = {row["dataset"]: row["num_masks"] for row in scores["scores"]}
    modes = list(dict.fromkeys(mode for _, mode in acc))
    lines = [f"| dataset | masks | {' | '.join(modes)} |", f"|---|---|{'---|' * len(modes)}"]
    for dataset, num_masks in masks.items():
        cells = [f"{100 * acc[dataset, mode]:.2f}" for mode in modes]
        cells = [f"**{cell}**" if mode == dataset else cell for mode, cell in zip(modes, cells, strict=True)]
        lines.append(f"| {dataset} | {num_masks} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
