"""Compares what a validation counted with figures that are expected of it, such as the released checkpoint's.

Figures are read and checked before anything slow. Counts of masks are compared first, since shares of other masks prove
nothing.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from osm_lightning.batch import MODE_ALIASES
from osm_lightning.evaluation.naming import ScoreRow, format_table

RELEASED = "released"
"""Stands for all figures of `released_scores.tsv`."""

SPECIFIC = "specific"
"""How that table calls a dataset's own mode."""

FORM = re.compile(r"(?P<dataset>[^=/\s]+)(/(?P<mode>[^=/\s]+))?=(?P<right>\d+)/(?P<masks>\d+)")

ROUNDING = 1e-9
"""Points by which a difference may miss its limit, because shares are no whole numbers."""


@dataclass(frozen=True, slots=True)
class Validated:
    """The modes in which a source will be validated."""

    own: str
    """The mode that stands for its vocabulary, which may not be among them."""
    modes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Expected:
    """Counts that a dataset is to have in a mode."""

    dataset: str
    mode: str
    num_masks: int
    num_right: int
    num_outside: int | None = None
    """Masks whose name is not in the vocabulary; None where nothing is expected of it."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """What was counted beside what was expected; differences in points, ours minus theirs."""

    ours: ScoreRow
    expected: Expected

    @property
    def acc_points(self) -> float:
        """Difference in Acc."""
        return 100 * (self.ours.acc - self.expected.num_right / self.expected.num_masks)

    @property
    def niv_points(self) -> float | None:
        """Difference in NIV; None where nothing is expected of it."""
        outside = self.expected.num_outside
        return None if outside is None else 100 * (self.ours.niv - outside / self.expected.num_masks)

    def verdict(self, within_points: float) -> str:
        """`agrees`, or what does not."""
        if self.ours.num_masks != self.expected.num_masks:
            return "other masks"
        limit = within_points + ROUNDING
        differ = [
            name
            for name, points in (("Acc", self.acc_points), ("NIV", self.niv_points))
            if points is not None and not abs(points) <= limit
        ]
        return f"{' and '.join(differ)} differ{'s' if len(differ) == 1 else ''}" if differ else "agrees"


def released_scores() -> Iterator[Expected]:
    """The released checkpoint's figures; own modes are called SPECIFIC."""
    text = (files("osm_lightning") / "evaluation" / "released_scores.tsv").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for row in csv.DictReader(lines, delimiter="\t"):
        yield Expected(row["dataset"], row["mode"], int(row["masks"]), int(row["right"]), int(row["outside"]))


def read_expected(words: Sequence[str], validated: Mapping[str, Validated]) -> list[Expected]:
    """Figures in the words of `--expect`.

    Args:
        words: `DATASET=RIGHT/MASKS`, which is of the dataset's own mode, `DATASET/MODE=RIGHT/MASKS`, or `released`.
        validated: sources that will be validated, by name.

    Returns:
        One entry per dataset and mode; of `released` those that will be validated.

    Raises:
        ValueError: a word has no such form, or nothing will be measured that it could be compared with.
    """
    found: dict[tuple[str, str], Expected] = {}
    for word in words:
        for entry in _released(validated) if word == RELEASED else [_one(word, validated)]:
            if (entry.dataset, entry.mode) in found:
                raise ValueError(
                    f"--expect {word}: {entry.dataset} in mode {entry.mode!r} is expected twice. Leave one out."
                )
            found[entry.dataset, entry.mode] = entry
    return list(found.values())


def _released(validated: Mapping[str, Validated]) -> list[Expected]:
    chosen, known = [], set()
    for row in released_scores():
        known.add(row.dataset)
        source = validated.get(row.dataset)
        mode = row.mode if source is None or row.mode != SPECIFIC else source.own
        if source is not None and mode in source.modes:
            chosen.append(Expected(row.dataset, mode, row.num_masks, row.num_right, row.num_outside))
    if not chosen:
        raise ValueError(
            f"--expect {RELEASED} has figures of {', '.join(sorted(known))}, but what is validated is "
            f"{_sources(validated)}. Sources are compared by their names in data.sources."
        )
    return chosen


def _one(word: str, validated: Mapping[str, Validated]) -> Expected:
    match = FORM.fullmatch(word)
    if match is None:
        raise ValueError(
            f"--expect {word}: give DATASET=RIGHT/MASKS for its own mode, DATASET/MODE=RIGHT/MASKS, or {RELEASED}; as "
            "coco=48953/56295 or coco/agnostic=44738/56295."
        )
    dataset, right, masks = match["dataset"], int(match["right"]), int(match["masks"])
    if not 0 < masks >= right:
        raise ValueError(f"--expect {word}: {right} of {masks} masks cannot be right. Give RIGHT/MASKS.")
    if dataset not in validated:
        raise ValueError(
            f"--expect {word}: {dataset!r} is not validated; {_sources(validated)} is. Name one of these, or give "
            f"data.sources.{dataset} a `val` split."
        )
    source = validated[dataset]
    mode = source.own if match["mode"] is None else MODE_ALIASES.get(match["mode"], match["mode"])
    if mode not in source.modes:
        raise ValueError(
            f"--expect {word}: {dataset} is validated in {' and '.join(source.modes) or 'no mode'}, not in {mode!r}. "
            f"Write {dataset}/MODE=RIGHT/MASKS with one of these, or set model.named_modes."
        )
    return Expected(dataset, mode, masks, right)


def _sources(validated: Mapping[str, Validated]) -> str:
    return ", ".join(validated) or "nothing"


def compare(expected: Sequence[Expected], rows: Sequence[ScoreRow]) -> list[Agreement]:
    """Puts figures beside what was counted, in the order of the figures."""
    row_of = {(row.dataset, MODE_ALIASES.get(row.mode, row.mode)): row for row in rows}
    return [Agreement(row_of[entry.dataset, entry.mode], entry) for entry in expected]


def format_agreement(agreements: Sequence[Agreement], within_points: float) -> str:
    """A text table with a line for each figure, and what it comes to."""
    heads = ("masks", "expected", "right", "expected", "Acc %", "expected", "points")
    lines: list[tuple[str, ...]] = [("dataset", "mode", *heads, "NIV %", "expected", "points", "verdict")]
    verdicts = [agreement.verdict(within_points) for agreement in agreements]
    for agreement, verdict in zip(agreements, verdicts, strict=True):
        ours, theirs = agreement.ours, agreement.expected
        counts = ours.num_masks, theirs.num_masks, ours.num_right, theirs.num_right
        acc = (
            f"{100 * ours.acc:.2f}",
            f"{100 * theirs.num_right / theirs.num_masks:.2f}",
            f"{agreement.acc_points:+.2f}",
        )
        niv, points = (f"{100 * ours.niv:.2f}", "-", "-"), agreement.niv_points
        if theirs.num_outside is not None and points is not None:
            niv = niv[0], f"{100 * theirs.num_outside / theirs.num_masks:.2f}", f"{points:+.2f}"
        lines.append((ours.dataset, ours.mode, *map(str, counts), *acc, *niv, verdict))
    agree = verdicts.count("agrees")
    rule = f"as many masks, and Acc and NIV within {within_points:g} points"
    last = f"{agree} of {len(verdicts)} agree: {rule}."
    if any(verdict == "other masks" for verdict in verdicts):
        last += (
            " Other masks are of another validation set, input size or trainer.limit_val_batches; their points prove "
            "nothing."
        )
    return f"{format_table(lines, num_left=2)}\n{last}"


def all_agree(agreements: Sequence[Agreement], within_points: float) -> bool:
    """Whether every figure is met."""
    return all(agreement.verdict(within_points) == "agrees" for agreement in agreements)
