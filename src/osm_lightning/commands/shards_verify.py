"""`osm shards verify`: says what is wrong with a shard folder and, if asked, writes a clean copy of it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from osm_lightning.record import Record
from osm_lightning.shard_tar import read_record
from osm_lightning.shards.inspect import Split, open_splits
from osm_lightning.shards.source import Findings
from osm_lightning.shards.verify import CheckedShard, Verification, check_record, scan, verify
from osm_lightning.whole_file import write_whole

HELP = "Check a shard folder: checksums, every image and mask, classes, keys. Nothing in it is changed."

MAX_CHARACTERS = 300
"""Longer examples are cut: they may quote a broken file at length."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the words of `osm shards verify`."""
    parser.epilog = "The exit status is 0 if all is sound, 1 if something is wrong."
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="shard folder")
    parser.add_argument("--split", help="name of the split (default: every split)")
    parser.add_argument("--fix", type=Path, metavar="OUT", help="write a clean copy into this new folder")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes (default: all cores)"
    )


def run(args: argparse.Namespace) -> int:
    """Prints what is wrong; returns the exit status, 1 if anything is.

    Raises:
        ValueError: the folder is no shard folder or has no such split, or OUT is not a new folder outside of it.
    """
    if args.workers < 1:
        raise ValueError(f"--workers is {args.workers}; it must be at least 1.")
    if args.fix is not None:
        _check_is_new(args.fix, args.folder)
    splits = open_splits(args.folder, args.split)
    console = Console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("verifying", total=sum(split.info.num_samples for split in splits))
        found = verify(splits, args.workers, partial(progress.advance, task))
    _print(console, found.findings)
    if not found.findings.counts:
        num_images = sum(split.info.num_samples for split in splits)
        console.print(
            f"{args.folder}: nothing is wrong in {num_images:,} images", markup=False, highlight=False, soft_wrap=True
        )
    if args.fix is not None:
        notes = write_clean_copy(splits, found, args.fix)
        console.print(f"clean copy in {args.fix}", markup=False, highlight=False, soft_wrap=True)
        _print(console, notes)
    return 1 if found.findings.counts else 0


def write_clean_copy(splits: Sequence[Split], found: Verification, out: Path) -> Findings:
    """Writes the samples that are sound, or can be mended, into a new shard folder; says what became of the rest.

    Raises:
        ValueError: the folder's vocabulary cannot be copied, or a split's name is one that no shard can have.
    """
    from osm_lightning.shards.write import ShardWriter  # WebDataset imports torch, which a check need not wait for

    notes = Findings()
    index, folder = splits[0].index, splits[0].folder
    out.mkdir(parents=True, exist_ok=True)
    if index.vocabulary is not None and (folder / index.vocabulary).is_file():
        write_whole(out / index.vocabulary, (folder / index.vocabulary).read_bytes())
    for split in splits:
        shards = found.shards[split.name]
        there = {checked.shard.info.file for checked in shards}
        for info in split.info.shards:
            if info.file not in there:
                notes.add("missing shards, left out", f"{info.file} with {info.num_samples} samples")
        if not any(checked.usable for checked in shards):
            notes.add("splits of which nothing is left", split.name)
            continue
        num_written = 0
        with ShardWriter(out, dataset=index.dataset, split=split.name, vocabulary=index.vocabulary) as writer:
            for record in _usable(shards, notes):
                try:
                    writer.write(record)
                    num_written += 1
                except ValueError as error:  # a key that stands twice, or that no shard can have
                    notes.add("samples left out", str(error))
        notes.add("splits written", f"{split.name}: {num_written:,} of {split.info.num_samples:,} images")
    return notes


def _usable(shards: Sequence[CheckedShard], notes: Findings) -> Iterator[Record]:
    for checked in shards:
        shard = checked.shard
        for place, entry in enumerate(scan(shard.path)[0]):
            where = f"{shard.info.file}, sample {entry.key}"
            if place not in checked.usable:
                notes.add("samples left out", where)
                continue
            record = read_record(shard.path, entry)
            if checked.usable[place]:
                mended = check_record(record, shard.class_ids, where, Findings())
                assert mended is not None, "it was found usable a moment ago"
                notes.add("samples mended", where)
                record = mended
            yield record


def _check_is_new(out: Path, folder: Path) -> None:
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--fix is {out}, which lies in {folder}: nothing is changed in place. Give another folder.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--fix is {out}, which is there already. Give a new folder, or an empty one.")


def _print(console: Console, findings: Findings) -> None:
    """One line per kind; foreign texts are cut, and control characters in them written out."""
    shown = Findings(findings.counts)
    for kind, examples in findings.examples.items():
        shown.examples[kind] = [
            text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} ..." for text in examples
        ]
    for line in shown.lines():
        console.print(
            line if line.isprintable() else ascii(line), markup=False, highlight=False, soft_wrap=True, emoji=False
        )
