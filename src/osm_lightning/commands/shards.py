"""`osm shards`: raw dataset folders to shards."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from osm_lightning.datasets import DATASETS
from osm_lightning.shard_index import SplitInfo, read_index
from osm_lightning.shards.panoptic import LAYOUTS, read_split
from osm_lightning.vocabulary import Vocabulary, load_vocabulary

HELP = "Build shards from a dataset as it is downloaded."

_BUILD_EPILOG = """\
Where coco looks, below --src:
  annotations/panoptic_<split>.json    panoptic_annotations_trainval2017.zip
  annotations/panoptic_<split>/*.png   the archive of PNGs inside it; panoptic_<split>/ will do as well
  <split>/*.jpg                        train2017.zip, val2017.zip

Example:
  osm shards build coco --src ~/datasets/coco --split train2017
  osm shards build coco --src ~/datasets/coco --split val2017

A build that fails or is interrupted leaves nothing behind. Splits of one dataset share a folder: its index.json says
what it holds. The format is described in docs/shards.md.
"""


def main(argv: Sequence[str]) -> int:
    """Runs `osm shards` with the arguments that follow it; returns the exit status.

    Raises:
        ValueError: the source is not what it must be, or the split is there already.
    """
    args = _parser().parse_args(argv)
    build(args.dataset, args.src, args.split, args.out or Path("data_shards") / args.dataset, args.overwrite)
    return 0


def build(dataset: str, src: Path, split: str, out_dir: Path, overwrite: bool) -> None:
    """Converts one split and prints what came of it."""
    from osm_lightning.shards.write import ShardWriter  # WebDataset imports torch, which --help need not wait for

    start_s = time.monotonic()
    console = Console()
    vocabulary = load_vocabulary(DATASETS[dataset].vocabulary)
    writer = ShardWriter(out_dir, dataset=dataset, split=split, vocabulary=vocabulary.key, overwrite=overwrite)
    source = read_split(LAYOUTS[dataset], src, split, vocabulary)
    with writer:
        for record in track(source.records(), f"{dataset} {split}", total=len(source), console=console):
            writer.write(record)
    written = read_index(out_dir).splits[split]
    console.print(_summary(written, vocabulary, time.monotonic() - start_s))
    for line in (*source.notes.lines(), f"shards are in {out_dir}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _summary(written: SplitInfo, vocabulary: Vocabulary, duration_s: float) -> Table:
    table = Table("images", "masks", "classes", "shards", "MB", "seconds")
    table.add_row(
        f"{written.num_samples:,}",
        f"{written.num_masks:,}",
        f"{len(written.masks_per_class)} of {len(vocabulary)}",
        f"{len(written.shards):,}",
        f"{sum(shard.bytes for shard in written.shards) / 1e6:,.1f}",
        f"{duration_s:,.1f}",
    )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="osm shards", description=f"{HELP.capitalize()}.", allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    build_parser = commands.add_parser(
        "build",
        help="convert one split of a dataset",
        description="Convert one split of a dataset into WebDataset shards, checking its annotations on the way.",
        epilog=_BUILD_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    build_parser.add_argument("dataset", choices=sorted(LAYOUTS), help="which dataset it is")
    build_parser.add_argument("--src", type=Path, required=True, metavar="DIR", help="folder of the dataset")
    build_parser.add_argument("--split", required=True, help="name of the split, such as train2017")
    build_parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the shards (default: data_shards/DATASET)"
    )
    build_parser.add_argument("--overwrite", action="store_true", help="replace the split if the folder has it already")
    return parser
