"""Acc and NIV of generated names on given masks, as the released protocol counts them (`docs/evaluation.md`).

The metric sees names and class ids only. What is not counted at all (crowd regions, ignored class ids, masks with no
pixel left) never reaches it: whoever feeds it leaves those out, because only the data knows them.
"""

# Shape letters: C classes of the vocabulary, in its order

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from osm_lightning.vocabulary import Vocabulary


class NamingAccuracy(Metric):
    """Scores the names that one mode gives to the masks of one dataset.

    The state is whole numbers only, summed over processes, so that the scores do not depend on how the masks were split
    into batches and ranks. Results are shares in [0, 1] over all masks seen since the last reset.

    Args:
        vocabulary: the dataset's classes; names are compared with these, whatever the mode.
    """

    is_differentiable = False
    full_state_update = False

    right_C: Tensor
    """int64[C], masks of each class whose name is right."""
    strict_C: Tensor
    """int64[C], masks of each class whose name is the class's first."""
    total_C: Tensor
    """int64[C], masks of each class."""
    outside: Tensor
    """int64[], masks whose name is no class's name (NIV)."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self._position = {entry.id: position for position, entry in enumerate(vocabulary)}
        for state in ("right_C", "strict_C", "total_C"):
            self.add_state(state, torch.zeros(len(vocabulary), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("outside", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, names: Sequence[str], class_ids: Tensor | Sequence[int]) -> None:
        """Counts some masks.

        Args:
            names: the generated name of each mask.
            class_ids: int[masks], the true class of each.

        Raises:
            ValueError: there are not as many names as classes, or a class is not in the vocabulary; nothing is counted.
        """
        ids: Sequence[int] = class_ids.tolist() if isinstance(class_ids, Tensor) else class_ids
        if len(names) != len(ids):
            raise ValueError(f"there are {len(names)} names for {len(ids)} class ids; give one of each for every mask.")
        unknown = sorted({class_id for class_id in ids if class_id not in self._position})
        if unknown:
            raise ValueError(
                f"class ids {', '.join(map(str, unknown[:5]))} ({len(unknown)} in all) are not in the vocabulary "
                f"{self.vocabulary.key!r}. Leave out masks without a class (crowd, ignored, free text), or score with "
                "the vocabulary that the masks were annotated with."
            )
        vocabulary, pairs = self.vocabulary, list(zip(names, ids, strict=True))
        self.right_C += self._count([class_id for name, class_id in pairs if vocabulary.is_right(name, class_id)])
        self.strict_C += self._count([class_id for name, class_id in pairs if vocabulary.is_first_name(name, class_id)])
        self.total_C += self._count(ids)
        self.outside += sum(not vocabulary.knows(name) for name in names)

    def compute(self) -> dict[str, Tensor]:
        """The scores; all shares NaN where no mask was seen.

        Returns:
            acc: share of masks named right.
            niv: share of masks whose name is not in the vocabulary.
            acc_strict: share named with the class's first name, no synonym and no plural.
            acc_balanced: mean of the accuracies of the classes that occur, each counting the same.
            majority: share of the most frequent class: what naming every mask alike would score.
            num_masks, num_right, num_outside: int64[], masks seen, those of `acc`, and those of `niv`.
        """
        num_masks = self.total_C.sum()
        seen_C = self.total_C > 0
        return {
            "acc": self.right_C.sum() / num_masks,
            "niv": self.outside / num_masks,
            "acc_strict": self.strict_C.sum() / num_masks,
            "acc_balanced": (self.right_C[seen_C] / self.total_C[seen_C]).mean(),
            "majority": self.total_C.max() / num_masks,
            "num_masks": num_masks,
            "num_right": self.right_C.sum(),
            "num_outside": self.outside,
        }

    def _count(self, ids: Sequence[int]) -> Tensor:
        """int64[C], how often each class occurs among ids."""
        positions = torch.tensor([self._position[class_id] for class_id in ids], dtype=torch.int64)
        return torch.bincount(positions, minlength=len(self.vocabulary)).to(self.total_C.device)


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """The scores of one dataset in one mode, as counts and shares in [0, 1]; see `NamingAccuracy.compute`."""

    dataset: str
    mode: str
    num_masks: int
    num_right: int
    num_outside: int
    acc: float
    acc_strict: float
    acc_balanced: float
    niv: float
    majority: float

    @classmethod
    def of(cls, dataset: str, mode: str, scores: Mapping[str, Tensor]) -> ScoreRow:
        """A row of what `NamingAccuracy.compute` returned."""
        values: dict[str, Any] = {
            key: int(value) if key.startswith("num_") else float(value) for key, value in scores.items()
        }
        return cls(dataset, mode, **values)


def format_scores(rows: Sequence[ScoreRow]) -> str:
    """A text table of rows in their order: shares in percent, `-` where no mask was seen."""

    def percent(share: float) -> str:
        return "-" if math.isnan(share) else f"{100 * share:.2f}"

    lines: list[tuple[str, ...]] = [
        ("dataset", "mode", "masks", "Acc %", "strict %", "balanced %", "NIV %", "majority %")
    ]
    for row in rows:
        shares = (row.acc, row.acc_strict, row.acc_balanced, row.niv, row.majority)
        lines.append((row.dataset, row.mode, str(row.num_masks), *map(percent, shares)))
    return format_table(lines, num_left=2)


def format_table(lines: Sequence[Sequence[str]], num_left: int) -> str:
    """Lines of cells as columns of text, the first of them on the left of their columns, the others on the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < num_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
