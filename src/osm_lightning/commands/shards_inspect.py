"""`osm shards inspect`: tables, TSV files and pictures of what shard folders hold. The counting is in `shards/`."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from osm_lightning.shards.inspect import (
    ClassCount,
    Histogram,
    Sizes,
    Split,
    count_classes,
    draw_histograms,
    histograms,
    measure,
    open_splits,
)
from osm_lightning.shards.label_conflicts import Comparison, Labels, SharedName, compare, shared_names
from osm_lightning.whole_file import write_whole

HELP = "Count what shard folders hold and, of several, where their names contradict each other."

MOST = 10
"""Rows that a table shows where there may be many; files hold all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the words of `osm shards inspect`."""
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="shard folder")
    parser.add_argument("--split", help="name of the split (default: every split)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write full tables (TSV) and pictures (PNG) there")


def run(args: argparse.Namespace) -> int:
    """Prints what the folders hold; returns the exit status, 0.

    Raises:
        ValueError: a folder is no shard folder or has no such split, two folders have one name, or DIR cannot be
            written.
    """
    console = Console()
    names = [folder.absolute().name for folder in args.folders]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"two folders are called {twice[0]!r}, and tables and files tell folders apart by their name. Give each "
            "folder once; inspect folders of one name one by one."
        )
    splits = [split for folder in args.folders for split in open_splits(folder, args.split)]
    console.print(_contents(splits))
    sizes = _measure(splits, console)
    counts = [count_classes(split, of.free_text) for split, of in zip(splits, sizes, strict=True)]
    for split, classes in zip(splits, counts, strict=True):
        console.print(_class_table(split, classes))
    charts = [histograms(of) for of in sizes]
    for panels in zip(*charts, strict=True):
        console.print(_histogram_table([split.title for split in splits], panels))
    labels = _labels(splits)
    shared = shared_names(labels)
    comparisons = compare(shared, [entry.dataset for entry in labels])
    if len(labels) > 1:
        _print_conflicts(shared, comparisons, console)
    if args.out is not None:
        try:
            _write_all(args.out, splits, counts, charts, shared, comparisons)
        except OSError as error:
            raise ValueError(f"--out {args.out} cannot be written ({error}). Give another folder.") from error
        console.print(f"tables and pictures are in {args.out}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _measure(splits: Sequence[Split], console: Console) -> list[Sizes]:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading sizes", total=sum(split.info.num_samples for split in splits))
        return [measure(split, lambda: progress.advance(task)) for split in splits]


def _contents(splits: Sequence[Split]) -> Table:
    table = Table(title="What there is")
    for heading in ("folder", "split", "images", "masks", "classes seen", "never seen", "shards", "MB"):
        table.add_column(heading, justify="left" if heading in {"folder", "split"} else "right", overflow="fold")
    for split in splits:
        info = split.info
        classes = split.vocabulary or ()
        num_seen = sum(info.masks_per_class.get(cls.id, 0) > 0 for cls in classes)
        table.add_row(
            _shown(split.folder.absolute().name),
            split.name,
            f"{info.num_samples:,}",
            f"{info.num_masks:,}",
            f"{num_seen:,} of {len(classes):,}" if classes else "free text",
            f"{len(classes) - num_seen:,}",
            f"{len(info.shards):,}",
            f"{sum(shard.bytes for shard in info.shards) / 1e6:,.1f}",
        )
    return table


def _class_table(split: Split, classes: Sequence[ClassCount]) -> Table:
    """The most and the least frequent of the classes that occur, and in the caption some that don't."""
    seen = [entry for entry in classes if entry.num_masks]
    never = [_shown(entry.name) for entry in classes if not entry.num_masks]
    caption = f"never seen: {', '.join(never[:MOST])}{', ...' if len(never) > MOST else ''}" if never else None
    table = Table("most masks", title=f"Classes of {_shown(split.title)}", caption=caption)
    table.add_column("masks", justify="right")
    table.add_column("share", justify="right")
    table.add_column("fewest masks")
    table.add_column("masks", justify="right")
    num_masks = sum(entry.num_masks for entry in seen)
    rarest = sorted(seen, key=lambda entry: (entry.num_masks, entry.name))
    for most, fewest in zip(seen[:MOST], rarest[:MOST], strict=True):
        share = f"{most.num_masks / num_masks:.1%}"
        table.add_row(_called(most), f"{most.num_masks:,}", share, _called(fewest), f"{fewest.num_masks:,}")
    return table


def _called(entry: ClassCount) -> str:
    return f"class {entry.class_id}, {entry.name}" if entry.kind == "unknown" else _shown(entry.name)


def _histogram_table(titles: Sequence[str], panels: Sequence[Histogram]) -> Table:
    """One histogram of every split, side by side; counts in full are in the files."""
    first = panels[0]
    table = Table(title=f"{first.title}: share of all {first.counted}", show_footer=True)
    table.add_column(first.axis, no_wrap=True)
    for title, panel in zip(titles, panels, strict=True):
        table.add_column(_shown(title), justify="right", footer=panel.summary, overflow="fold")
    for row, text in enumerate(first.ranges):
        table.add_row(text, *(f"{panel.counts_B[row] / max(panel.counts_B.sum(), 1):.1%}" for panel in panels))
    return table


def _labels(splits: Sequence[Split]) -> list[Labels]:
    """One entry per folder that has a vocabulary, with the masks of all its splits that were asked for."""
    labels: dict[str, Labels] = {}
    for split in splits:
        if split.vocabulary is None:
            continue
        name = split.folder.absolute().name
        masks = dict(labels[name].masks_per_class) if name in labels else {}
        for class_id, num_masks in split.info.masks_per_class.items():
            masks[class_id] = masks.get(class_id, 0) + num_masks
        labels[name] = Labels(name, split.vocabulary, masks)
    return list(labels.values())


def _print_conflicts(shared: Sequence[SharedName], comparisons: Sequence[Comparison], console: Console) -> None:
    table = Table("names", title="Names in several vocabularies, and the first name (masks) that each trains on")
    datasets = list(dict.fromkeys(name for comparison in comparisons for name in (comparison.left, comparison.right)))
    for dataset in datasets:
        table.add_column(_shown(dataset))
    for entry in shared[:MOST]:
        cells = [
            ", ".join(f"{_shown(use.first_name)} ({use.num_masks:,})" for use in entry.uses if use.dataset == dataset)
            for dataset in datasets
        ]
        table.add_row(_shown(entry.name), *cells)
    console.print(table)

    table = Table("vocabularies", title="How far vocabularies agree")
    for heading in ("shared names", "same first name", "classes in conflict", "masks in conflict"):
        table.add_column(heading, justify="right")
    for comparison in comparisons:
        left, right = comparison.num_masks_in_conflict
        table.add_row(
            _shown(f"{comparison.left}, {comparison.right}"),
            f"{comparison.num_shared_names:,}",
            f"{comparison.num_same_first_names:,}",
            f"{len(comparison.conflicts):,}",
            f"{left:,} and {right:,}",
        )
    console.print(table)

    for comparison in comparisons:
        if not comparison.conflicts:
            continue
        table = Table(_shown(comparison.left), title="One meaning, two first names (masks)")
        table.add_column(_shown(comparison.right))
        table.add_column("names in common")
        for conflict in comparison.conflicts[:MOST]:
            sides = [f"{_shown(use.first_name)} ({use.num_masks:,})" for use in (conflict.left, conflict.right)]
            table.add_row(*sides, _shown(", ".join(conflict.names)))
        console.print(table)


def _write_all(
    out: Path,
    splits: Sequence[Split],
    counts: Sequence[Sequence[ClassCount]],
    charts: Sequence[Sequence[Histogram]],
    shared: Sequence[SharedName],
    comparisons: Sequence[Comparison],
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    places = [(split.folder.absolute().name, split.name) for split in splits]
    rows: list[tuple[object, ...]] = [("folder", "split", "class_id", "kind", "name", "masks")]
    for place, classes in zip(places, counts, strict=True):
        rows += [(*place, entry.class_id, entry.kind, entry.name, entry.num_masks) for entry in classes]
    write_whole(out / "classes.tsv", _tsv(rows))
    rows = [("folder", "split", "histogram", "range", "count")]
    for place, panels in zip(places, charts, strict=True):
        for panel in panels:
            numbers = zip(panel.ranges, panel.counts_B.tolist(), strict=True)
            rows += [(*place, f"{panel.title}: {panel.axis}", text, number) for text, number in numbers]
    write_whole(out / "sizes.tsv", _tsv(rows))
    for split, place, panels in zip(splits, places, charts, strict=True):
        title = f"{split.title}: {split.info.num_masks:,} masks in {split.info.num_samples:,} images"
        png = io.BytesIO()
        draw_histograms(title, panels).save(png, "PNG")
        write_whole(out / f"sizes-{'-'.join(place)}.png", png.getvalue())
    if comparisons:
        rows = [("name", "folder", "class_id", "first_name", "masks", "conflict")]
        for entry in shared:
            differs = "yes" if entry.opposites else "no"
            rows += [(entry.name, u.dataset, u.class_id, u.first_name, u.num_masks, differs) for u in entry.uses]
        write_whole(out / "shared_names.tsv", _tsv(rows))
        sides = ("folder", "class_id", "first_name", "masks")
        rows = [(*(f"left_{side}" for side in sides), *(f"right_{side}" for side in sides), "names_in_common")]
        for conflict in (conflict for comparison in comparisons for conflict in comparison.conflicts):
            uses = (conflict.left, conflict.right)
            cells = [cell for u in uses for cell in (u.dataset, u.class_id, u.first_name, u.num_masks)]
            rows.append((*cells, "|".join(conflict.names)))
        write_whole(out / "label_conflicts.tsv", _tsv(rows))


def _tsv(rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _shown(text: str) -> str:
    """A foreign text for a table: no markup, no control characters."""
    return escape(text if text.isprintable() else ascii(text))
