"""Where vocabularies that are trained on together contradict each other.

A class is trained on under its first name. Where two datasets mean the same thing, as a name that they share shows,
but call it differently ("tv" here, "television receiver" there), a model that answers to both can't be right in both:
the label conflicts of the paper, which its mode queries are for. Names are compared lower case, without plurals.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from osm_lightning.vocabulary import Vocabulary, normalise


@dataclass(frozen=True, slots=True)
class Labels:
    """The classes of one dataset and how often they occur."""

    dataset: str
    vocabulary: Vocabulary
    masks_per_class: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Use:
    """A class that has a certain name, be it the first or another."""

    dataset: str
    class_id: int
    first_name: str
    num_masks: int


@dataclass(frozen=True, slots=True)
class SharedName:
    """A name that classes of several datasets have."""

    name: str
    uses: tuple[Use, ...]
    """In the order of the datasets."""

    @property
    def num_masks(self) -> int:
        """Masks of all classes that have the name."""
        return sum(use.num_masks for use in self.uses)

    @property
    def opposites(self) -> list[tuple[Use, Use]]:
        """Pairs of classes of different datasets that are trained on under different names."""
        return [
            (left, right)
            for left, right in combinations(self.uses, 2)
            if left.dataset != right.dataset and left.first_name != right.first_name
        ]


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two datasets' classes that share names, but not the first one."""

    left: Use
    right: Use
    names: tuple[str, ...]
    """The names that they share, sorted."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two datasets' vocabularies side by side."""

    left: str
    right: str
    num_shared_names: int
    num_same_first_names: int
    """First names that both have."""
    conflicts: tuple[Conflict, ...]
    """Those that concern most masks on both sides first."""

    @property
    def num_masks_in_conflict(self) -> tuple[int, int]:
        """Masks of classes with a conflict, left and right; a class with several counts once."""
        left = {conflict.left for conflict in self.conflicts}
        right = {conflict.right for conflict in self.conflicts}
        return sum(use.num_masks for use in left), sum(use.num_masks for use in right)


def shared_names(labels: Sequence[Labels]) -> list[SharedName]:
    """Names of more than one dataset: those that are trained on under different names first, then by masks."""
    uses: defaultdict[str, dict[Use, None]] = defaultdict(dict)  # a dict for a set that keeps its order
    for entry in labels:
        for cls in entry.vocabulary:
            num_masks = entry.masks_per_class.get(cls.id, 0)
            for name in map(normalise, cls.names):
                uses[name][Use(entry.dataset, cls.id, normalise(cls.names[0]), num_masks)] = None
    shared = [SharedName(name, tuple(found)) for name, found in uses.items() if len({use.dataset for use in found}) > 1]
    return sorted(shared, key=lambda entry: (not entry.opposites, -entry.num_masks, entry.name))


def compare(shared: Iterable[SharedName], datasets: Sequence[str]) -> list[Comparison]:
    """Compares every pair of datasets by the names that they share.

    Args:
        shared: what `shared_names` found.
        datasets: their names, in the order in which they were given to it.
    """
    shared = list(shared)
    names: defaultdict[tuple[Use, Use], list[str]] = defaultdict(list)
    for entry in shared:
        for opposite in entry.opposites:
            names[opposite].append(entry.name)
    conflicts = [Conflict(left, right, tuple(sorted(common))) for (left, right), common in names.items()]
    conflicts.sort(key=_weight, reverse=True)
    return [
        Comparison(
            left,
            right,
            num_shared_names=sum({left, right} <= {use.dataset for use in entry.uses} for entry in shared),
            num_same_first_names=sum(
                {(left, entry.name), (right, entry.name)} <= {(use.dataset, use.first_name) for use in entry.uses}
                for entry in shared
            ),
            conflicts=tuple(c for c in conflicts if (c.left.dataset, c.right.dataset) == (left, right)),
        )
        for left, right in combinations(datasets, 2)
    ]


def _weight(conflict: Conflict) -> tuple[int, int]:
    """A contradiction takes two: what counts is the side that has fewer masks."""
    left, right = conflict.left.num_masks, conflict.right.num_masks
    return min(left, right), left + right
