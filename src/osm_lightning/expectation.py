"""`osm validate --expect`: figures that a validation is to reach, checked before it and compared after it."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from jsonargparse import Namespace

from osm_lightning.batch import MODE_ALIASES, mode_names, validation_modes
from osm_lightning.evaluation.expected import Validated, all_agree, compare, format_agreement, read_expected
from osm_lightning.evaluation.naming import ScoreRow


def add_expected(parser: ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--expect",
        action="append",
        type=str,
        default=[],
        metavar="DATASET[/MODE]=RIGHT/MASKS",
        help="counts to compare with, as coco=48953/56295 or coco/agnostic=44738/56295; again for more; `released`: "
        "all that the released checkpoint's authors give for what is validated. The command ends with 1 if masks are "
        "not as many, or Acc or NIV are further off than --expect-within",
    )
    parser.add_argument(
        "--expect-within", type=float, default=0.1, metavar="POINTS", help="percentage points that may lie between"
    )


class Expectation:
    """What one call expects."""

    def __init__(self, options: Namespace) -> None:
        """Reads it.

        Args:
            options: of `osm validate`.

        Raises:
            ValueError: an expectation is not of its form, or of nothing that will be measured.
        """
        self.within_points = options.expect_within
        if not self.within_points >= 0:
            raise ValueError(f"--expect-within is {self.within_points}, but must be a number of points from 0.")
        self.expected = read_expected(options.expect, validated_sources(options)) if options.expect else []

    def report(self, rows: Sequence[ScoreRow]) -> int:
        """Prints how the rows compare; 1 if they disagree, else 0."""
        if not self.expected:
            return 0
        agreements = compare(self.expected, rows)
        print("\n" + format_agreement(agreements, self.within_points), flush=True)
        return 0 if all_agree(agreements, self.within_points) else 1


def validated_sources(options: Namespace) -> dict[str, Validated]:
    """Sources that a config validates, with their modes."""
    names, asked = mode_names(options.model.modes), options.model.named_modes
    found = {}
    for key, source in options.data.sources.items():
        if source.val is not None:
            own = source.mode or key
            modes = (MODE_ALIASES.get(mode, mode) for mode in validation_modes(own, names, asked))
            found[key] = Validated(own, tuple(modes))
    return found
