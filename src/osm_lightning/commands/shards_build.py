"""`osm shards build`: one split of a raw dataset into shards."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from osm_lightning.datasets import DATASETS
from osm_lightning.shard_index import SplitInfo, read_index
from osm_lightning.shards.custom import CustomSplit, read_custom
from osm_lightning.shards.exclusion import exclude_lvis_val
from osm_lightning.shards.layouts import LAYOUTS, find_layout
from osm_lightning.shards.own_vocabulary import write_vocabulary
from osm_lightning.vocabulary import Vocabulary, load_vocabulary

if TYPE_CHECKING:
    from osm_lightning.shards.build import BuildReport

HELP = "Convert one split of a dataset into WebDataset shards, checking its annotations on the way."

_YAML = (".yaml", ".yml")
_PATH_WIDTH = 44
"""Column of the help in which the archives begin."""

_EPILOG = """\
Examples:
  osm shards build coco --src ~/datasets/coco --split train2017
  osm shards build coco --src ~/datasets/coco --split val2017
  osm shards build mine.yaml --split train

A build that was killed goes on when the same command is given again. Until a split is complete, the folder's
index.json does not name it. docs/shards.md describes the format, docs/own_data.md the YAML.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes, and a list of what lies where in which dataset."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"{_describe_layouts()}\n{_EPILOG}"
    parser.add_argument(
        "dataset", type=_dataset, metavar="DATASET", help=f"{', '.join(LAYOUTS)}, or a YAML that describes your own"
    )
    parser.add_argument("--src", type=Path, metavar="DIR", help="folder of the dataset; for a YAML, its own folder")
    parser.add_argument("--split", required=True, help="name of the split, such as train2017")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the shards (default: data_shards/DATASET)")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes (default: all cores)"
    )
    parser.add_argument(
        "--max-skipped",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the images that may be left out because they can't be converted (default: 0)",
    )
    parser.add_argument(
        "--exclude-lvis-val",
        type=Path,
        metavar="JSON",
        help="lvis_v1_val.json: leave out the COCO images that LVIS is validated on",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the split if the folder has it already")


def run(args: argparse.Namespace) -> int:
    """Converts one split and prints what came of it.

    Raises:
        ValueError: the source is not what it must be, or the split is there already.
        OSError: the disk is full.
    """
    from osm_lightning.shards.build import build_split  # WebDataset imports torch, which --help need not wait for
    from osm_lightning.shards.write import ShardWriter

    start_s = time.monotonic()
    console = Console()
    source = _read(args, console)
    split = source.split
    if args.exclude_lvis_val is not None:
        split = exclude_lvis_val(split, args.exclude_lvis_val)
    out_dir = args.out or Path("data_shards") / source.dataset
    writer = ShardWriter(
        out_dir,
        dataset=source.dataset,
        split=args.split,
        vocabulary=source.index_vocabulary,
        overwrite=args.overwrite,
    )
    if source.vocabulary is not None and not source.is_shipped:
        write_vocabulary(source.vocabulary, out_dir)
    report = build_split(
        split,
        writer,
        vocabulary=source.vocabulary,
        workers=args.workers,
        max_skipped=args.max_skipped,
        console=console,
    )
    written = read_index(out_dir).splits[args.split]
    console.print(_summary(written, source.vocabulary, report, time.monotonic() - start_s))
    for line in (*_remarks(report), f"shards are in {out_dir}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def _read(args: argparse.Namespace, console: Console) -> CustomSplit:
    """Reads the tables of the split: of a dataset in the table of layouts, or of one that a YAML describes."""
    if args.dataset not in LAYOUTS:
        return read_custom(Path(args.dataset), args.src, args.split)
    if args.src is None:
        raise ValueError(f"--src is missing: it is the folder of {args.dataset}. `osm shards build --help` shows it.")
    vocabulary = load_vocabulary(DATASETS[args.dataset].vocabulary)
    layout = find_layout(args.dataset, args.src, args.split)
    console.print(f"{args.src}: {layout.title}", markup=False, highlight=False, soft_wrap=True)
    return CustomSplit(args.dataset, vocabulary, True, layout.read(args.src, args.split, vocabulary))


def _summary(written: SplitInfo, vocabulary: Vocabulary | None, report: BuildReport, duration_s: float) -> Table:
    table = Table("images", "masks", "classes", "shards", "MB", "seconds", "images/s")
    table.add_row(
        f"{written.num_samples:,}",
        f"{written.num_masks:,}",
        f"{len(written.masks_per_class)} of {len(vocabulary)}" if vocabulary else "free text",
        f"{len(written.shards):,}",
        f"{sum(shard.bytes for shard in written.shards) / 1e6:,.1f}",
        f"{duration_s:,.1f}",
        f"{(report.num_images - report.num_resumed) / duration_s:,.1f}",
    )
    return table


def _remarks(report: BuildReport) -> Iterator[str]:
    if report.num_skipped:
        share = report.num_skipped / report.num_images
        yield f"{report.num_skipped:,} images ({share:.2%}) could not be converted and were left out:"
        yield from (f"  {line}" for line in report.errors.lines())
    yield from report.notes.lines()


def _dataset(word: str) -> str:
    if word not in LAYOUTS and not word.endswith(_YAML):
        raise argparse.ArgumentTypeError(
            f"invalid choice: {word!r} (choose from {', '.join(LAYOUTS)}, or give the path of a .yaml)"
        )
    return word


def _describe_layouts() -> str:
    """For each dataset and layout, what is looked for below --src, and which archive holds it."""
    lines = ["What is looked for below --src; of several layouts, the first whose files are there is read:"]
    for dataset, layouts in LAYOUTS.items():
        lines += ["", dataset]
        for layout in layouts:
            lines.append(f"  {layout.title}")
            for path, archive in layout.paths:
                first, *others = path.format(split="SPLIT", folder="FOLDER").split("|")
                lines += [f"    {first:<{_PATH_WIDTH}}  {archive}", *(f"      or {other}" for other in others)]
            if any("{folder}" in path for path, _ in layout.paths):
                named = ", ".join(f"{folder} for {split}" for split, folder in layout.folders.items())
                lines.append(f"    (FOLDER is {named})")
    return "\n".join([*lines, ""])
