"""What became of a source's tensors when they were put into a part of the model: said for every load, and strict.

A tensor that is missing, that nobody asked for or that has another shape is a surprise, and a surprise is an error
unless a pattern names it. What files are known to carry besides is listed and no surprise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

KNOWN_EXTRAS = ("*position_ids", "*rotary_emb.inv_freq")
"""Buffers that older transformers saved among the weights: counters and constants, made anew by every model."""

SHOWN = 5
"""Examples of each kind of surprise in an error."""


@dataclass(frozen=True)
class LoadReport:
    """One load: from where, into which part, and what did not fit."""

    part: str
    """Part of the model."""
    origin: str
    """Where the tensors come from."""
    num_loaded: int
    num_bytes: int
    dtypes: Mapping[str, int]
    """Number of loaded tensors by their precision."""
    missing: Sequence[str] = ()
    """Names that the part has and the source lacks."""
    unexpected: Sequence[str] = ()
    """Names that the source has and the part has no place for."""
    reshaped: Mapping[str, str] = field(default_factory=dict)
    """Names whose shapes differ, and both shapes."""
    extras: Sequence[str] = ()
    """What the source is known to carry besides."""

    @classmethod
    def compare(
        cls,
        part: str,
        origin: str,
        source: Mapping[str, Tensor],
        wanted: Mapping[str, Sequence[int]],
        *,
        unplaced: Iterable[str] = (),
        extras: Iterable[str] = (),
    ) -> LoadReport:
        """Compares names and shapes; what fits in both is taken for loaded.

        Args:
            part: part of the model.
            origin: where the tensors come from.
            source: tensors by the part's names for them.
            wanted: the part's names and shapes.
            unplaced: names of the source that are none of the part's, as the source has them.
            extras: what the source carries besides and is no tensor, or is known.
        """
        strangers = [*(name for name in source if name not in wanted), *unplaced]
        reshaped = {
            name: f"{tuple(source[name].shape)} for {tuple(shape)}"
            for name, shape in wanted.items()
            if name in source and tuple(source[name].shape) != tuple(shape)
        }
        loaded = [tensor for name, tensor in source.items() if name in wanted and name not in reshaped]
        return cls(
            part,
            origin,
            num_loaded=len(loaded),
            num_bytes=sum(tensor.nbytes for tensor in loaded),
            dtypes=dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in loaded)),
            missing=[name for name in wanted if name not in source],
            unexpected=[name for name in strangers if not is_known_extra(name)],
            reshaped=reshaped,
            extras=[*extras, *filter(is_known_extra, strangers)],
        )

    def problems(self, allow: Sequence[str] = ()) -> str:
        """All surprises that no pattern names, up to five of each kind; empty where there are none.

        Args:
            allow: patterns of names, with * and ?.
        """
        kinds = {
            "missing": {name: name for name in self.missing},
            "unexpected": {name: name for name in self.unexpected},
            "of another shape": {name: f"{name} {shapes}" for name, shapes in self.reshaped.items()},
        }
        found = []
        for kind, texts in kinds.items():
            left = [text for name, text in texts.items() if not any(fnmatchcase(name, pattern) for pattern in allow)]
            if left:
                more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
                found.append(f"{len(left)} {kind}: {', '.join(left[:SHOWN])}{more}")
        return "; ".join(found)

    def line(self) -> str:
        """What is said of a load that was done: how much, in which precision, from where, and what was let through."""
        precision = ", ".join(self.dtypes) or "nothing"
        besides = f"; left out as known: {', '.join(self.extras)}" if self.extras else ""
        allowed = f"; allowed: {said}" if (said := self.problems()) else ""
        return (
            f"{self.part}: {self.num_loaded} tensors ({precision}, {self.num_bytes / 1e6:.1f} MB) from {self.origin}"
            f"{besides}{allowed}"
        )

    @property
    def surprises(self) -> tuple[str, ...]:
        """Names of all surprises, allowed or not."""
        return (*self.missing, *self.unexpected, *self.reshaped)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "part": self.part,
            "origin": self.origin,
            "loaded": self.num_loaded,
            "bytes": self.num_bytes,
            "dtypes": dict(self.dtypes),
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "of_another_shape": dict(self.reshaped),
            "known_extras": list(self.extras),
        }


def is_known_extra(name: str) -> bool:
    """Whether a name is of a buffer that older files carry and no model needs."""
    return any(fnmatchcase(name, pattern) for pattern in KNOWN_EXTRAS)


def report_table(reports: Sequence[LoadReport]) -> str:
    """A Markdown table, a line per load."""
    lines = [
        "| part | from | loaded | precision | missing | unexpected | other shape | known extras |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        precision = ", ".join(report.dtypes) or "-"
        counts = (len(kind) for kind in (report.missing, report.unexpected, report.reshaped, report.extras))
        loaded = f"{report.num_loaded} tensors, {report.num_bytes / 1e6:.1f} MB"
        cells = (report.part, f"`{report.origin}`", loaded, precision, *map(str, counts))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
