"""One split of a raw dataset into shards: in parallel, with the same bytes however often it was killed on the way.

What an image becomes is its converter's business (`conversion.py`), how shards are written the writer's (`write.py`).
Here is decided what an image that can't be converted means for the split, and what survives a build that stops.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

from rich.console import Console
from rich.progress import track

from osm_lightning.shards.conversion import RawImage, RawSplit, convert_fully
from osm_lightning.shards.journal import Journal, fingerprint
from osm_lightning.shards.source import Findings
from osm_lightning.shards.workers import Outcome, convert_all
from osm_lightning.shards.write import PLAIN_NAME, ShardWriter
from osm_lightning.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What came of a build, beside its shards."""

    num_images: int
    """Images of the split, with those that were skipped."""
    num_resumed: int
    """How many of them an earlier build had dealt with."""
    num_skipped: int
    """How many of them could not be converted."""
    errors: Findings
    """Why they could not."""
    notes: Findings
    """What was left out or corrected."""


def build_split(
    split: RawSplit,
    writer: ShardWriter,
    *,
    vocabulary: Vocabulary | None = None,
    workers: int = 1,
    max_skipped: float = 0.0,
    console: Console | None = None,
) -> BuildReport:
    """Converts a split and writes it, or as much of it as an earlier build of the same plan left to do.

    All images are looked at before the build fails for one that can't be converted. Whatever stops it, finished shards
    stay under temporary names, with a journal, and the next build of the same plan goes on behind them.

    Args:
        split: the images.
        writer: writes their records; not entered yet.
        vocabulary: the classes that the split was read with; a build that was made with others is not gone on with.
        workers: processes that convert. With more than 1, the caller's main module must bear to be imported.
        max_skipped: share of the images that may be left out because they can't be converted.
        console: where progress is shown; nowhere if not given.

    Raises:
        ValueError: more images can't be converted, keys are not plain and unique, another process builds the split.
        OSError: the disk is full.
    """
    if workers < 1:
        raise ValueError(f"--workers is {workers}; it must be at least 1.")
    if not 0 <= max_skipped < 1:
        raise ValueError(f"--max-skipped is {max_skipped}, but it is a share of the images, from 0 to below 1.")
    _check_keys(split)
    _check_share(split, Journal(""), max_skipped)
    say = _silent if console is None else partial(console.print, markup=False, highlight=False, soft_wrap=True)
    with writer:
        journal = _resume(split, vocabulary, writer, say)
        num_resumed = journal.num_images
        try:
            with closing(_outcomes(split, num_resumed, workers, writer.split, console)) as outcomes:
                for outcome in outcomes:
                    _take(outcome, journal, writer, write=_share(split, journal) <= max_skipped)
            _check_share(split, journal, max_skipped)
        except BaseException:
            if journal.finished.shards:
                say(f"Kept {len(journal.finished.shards):,} finished shards: the same command goes on behind them.")
            raise
    errors, notes = deepcopy(split.errors), deepcopy(split.notes)
    errors.merge(journal.errors)
    notes.merge(journal.notes)
    num_images, num_skipped = len(split) + split.num_unusable, split.num_unusable + len(journal.skipped)
    return BuildReport(num_images, num_resumed, num_skipped, errors, notes)


def _resume(split: RawSplit, vocabulary: Vocabulary | None, writer: ShardWriter, say: Callable[[str], None]) -> Journal:
    """How far an earlier build of the same plan came, with the writer put behind it; else an empty journal."""
    plan = fingerprint(split, vocabulary, writer.identity)
    found = Journal.read(writer.journal)
    if found is None:
        return Journal(plan)
    try:
        if found.plan != plan:
            raise ValueError("it was of other images, tables or settings")
        if not all(_is_unusable(split.images[position]) for position in found.skipped):
            raise ValueError("an image that it left out has been mended")
        writer.resume(found.finished, (image.key for image in split.images[: found.num_images]))
    except ValueError as error:
        say(f"Starting over; there is an unfinished build of split {writer.split}, but {error}.")
        return Journal(plan)
    say(f"Going on behind {found.num_images:,} images, which are in {writer.num_finished:,} finished shards.")
    return found


def _is_unusable(image: RawImage) -> bool:
    errors = Findings()
    convert_fully(image, errors, Findings())
    return bool(errors.counts)


def _take(outcome: Outcome, journal: Journal, writer: ShardWriter, *, write: bool) -> None:
    """Writes an image's record, if it has one, and notes what came of the image."""
    if outcome.record is not None and not outcome.errors.counts and write:
        writer.write(outcome.record)
        if writer.num_finished > len(journal.finished.shards):
            # The record opened a new shard. Those before it hold all images before this one: a place to go on from.
            writer.keep()  # first, so that the journal never names a shard that is about to be removed
            journal.finished = writer.finished
            with writer.on_disk():
                journal.write(writer.journal)
    if outcome.errors.counts:
        journal.skipped.append(journal.num_images)
    journal.num_images += 1
    journal.errors.merge(outcome.errors)
    journal.notes.merge(outcome.notes)


def _check_keys(split: RawSplit) -> None:
    errors = Findings()
    for key, num in Counter(image.key for image in split.images).items():
        if num > 1:
            errors.add("images that would have the same sample key", f"{num} times {key}")
        if not PLAIN_NAME.fullmatch(key):
            errors.add("images whose sample key is not 1 to 80 letters, digits, '_' or '-'", repr(key))
    errors.raise_if_any(split.source)


def _share(split: RawSplit, journal: Journal) -> float:
    """Share of the images that are known not to be convertible."""
    return (split.num_unusable + len(journal.skipped)) / max(1, len(split) + split.num_unusable)


def _check_share(split: RawSplit, journal: Journal, max_skipped: float) -> None:
    if _share(split, journal) <= max_skipped:
        return
    errors = deepcopy(split.errors)
    errors.merge(journal.errors)
    raise ValueError(
        f"{split.source}: {split.num_unusable + len(journal.skipped):,} of {len(split) + split.num_unusable:,} images "
        f"cannot be converted, but --max-skipped is {max_skipped:g}. Nothing was written:\n  "
        + "\n  ".join(errors.lines())
        + "\nMend or download these again, then build once more; or have them left out with a larger --max-skipped."
    )


def _outcomes(
    split: RawSplit, num_resumed: int, workers: int, title: str, console: Console | None
) -> Generator[Outcome]:
    """Converts what is left of a split, and shows how it goes on."""
    with closing(convert_all(split.images[num_resumed:], workers)) as outcomes:
        if console is None:
            yield from outcomes
        else:
            yield from track(outcomes, title, total=len(split), completed=num_resumed, console=console)


def _silent(_: str) -> None:
    """Where nobody listens."""
