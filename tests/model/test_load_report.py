"""What a load report counts, calls a surprise, and lets through."""

from __future__ import annotations

import json

import torch

from osm_lightning.model.load_report import LoadReport, report_table

SOURCE = {
    "a": torch.zeros(2, 3),
    "b": torch.zeros(4, dtype=torch.float16),
    "c": torch.zeros(5),
    "x.position_ids": torch.zeros(1),
    "strange": torch.zeros(1),
}
WANTED = {"a": (2, 3), "b": (4,), "c": (6,), "lost": (1,)}


def report() -> LoadReport:
    return LoadReport.compare("part", "file.pt", SOURCE, WANTED, unplaced=["other"], extras=["epoch"])


def test_everything_is_counted_once() -> None:
    made = report()
    assert (made.num_loaded, made.num_bytes) == (2, 24 + 8)
    assert made.dtypes == {"float32": 1, "float16": 1}
    assert made.missing == ["lost"]
    assert made.unexpected == ["strange", "other"]
    assert made.reshaped == {"c": "(5,) for (6,)"}
    assert made.extras == ["epoch", "x.position_ids"]
    assert json.loads(json.dumps(made.as_dict()))["of_another_shape"] == {"c": "(5,) for (6,)"}
    assert "| part | `file.pt` | 2 tensors, 0.0 MB | float32, float16 | 1 | 2 | 1 | 2 |" in report_table([made])


def test_what_a_pattern_names_is_no_problem() -> None:
    made = report()
    assert made.problems() == "1 missing: lost; 2 unexpected: strange, other; 1 of another shape: c (5,) for (6,)"
    assert made.problems(["l?st", "str*", "c"]) == "1 unexpected: other"
    assert made.problems(["*"]) == ""
    assert made.surprises == ("lost", "strange", "other", "c")


def test_five_examples_of_each_kind_are_shown() -> None:
    many = LoadReport.compare("part", "file", {}, {f"n{index}": (1,) for index in range(8)})
    assert many.problems() == "8 missing: n0, n1, n2, n3, n4 and 3 more"
