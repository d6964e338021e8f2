"""`examples/name_masks.ipynb` runs from its first cell to its last, as Jupyter would run it.

Jupyter itself is not asked for: the cells are plain Python, and what a cell shows is its last expression.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from shapes_run import ROOT
from test_demo import NEEDS, NUM_MASKS
from tiny_checkpoint import MODES, write_exported

NOTEBOOK = ROOT / "examples" / "name_masks.ipynb"


def cells(kind: str) -> list[dict[str, Any]]:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["metadata"]["kernelspec"]["name"]) == (4, "python3")
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def run(checkpoint: str) -> list[Any]:
    """Runs all cells with another checkpoint, and returns what they show."""
    space: dict[str, Any] = {}
    shown = []
    for number, cell in enumerate(cells("code")):
        source = "".join(cell["source"]).replace('"models/mini-coco"', repr(checkpoint))
        tree = ast.parse(source, filename=f"cell {number}")
        last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"cell {number}", "exec"), space)
        if last is not None:
            shown.append(eval(compile(last, f"cell {number}", "eval"), space))
    return [value for value in shown if value is not None]


def test_it_is_a_clean_notebook() -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells("code"))
    ids = [cell["id"] for kind in ("code", "markdown") for cell in cells(kind)]
    assert len(set(ids)) == len(ids)
    assert '"models/mini-coco"' in "".join(cells("code")[1]["source"])
    for cell in cells("markdown"):
        for target in ("".join(cell["source"])).split("](")[1:]:
            assert (NOTEBOOK.parent / target.partition(")")[0]).exists()


def test_its_cells_run_on_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(NOTEBOOK.parent)  # where Jupyter runs it; it goes to the project's folder itself
    modes, shapes, picture = run(str(write_exported(tmp_path / "tiny", tmp_path / "run")))
    assert Path.cwd() == ROOT
    assert modes == MODES
    assert shapes == ((375, 500, 3), (NUM_MASKS, 375, 500))
    assert picture.size == (500, 375)
    assert f"{NUM_MASKS} masks in two modes in " in capsys.readouterr().out


@pytest.mark.slow
def test_it_names_what_is_on_the_photograph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = [name for name in NEEDS if not (ROOT / name).is_file()]
    if missing:
        pytest.skip(f"it needs {', '.join(missing)}; `osm weights fetch mini --out weights` makes the weights")
    monkeypatch.chdir(NOTEBOOK.parent)
    modes, _, picture = run("models/mini-coco")
    picture.save(tmp_path / "overlay.png")
    assert modes == ("agnostic", "coco")
    encoded, asked, *lines = capsys.readouterr().out.splitlines()
    assert encoded.startswith("encoded in ")
    assert asked.startswith(f"{NUM_MASKS} masks in two modes in ")
    rows = [line.split() for line in lines[:NUM_MASKS]]
    assert [row[0] for row in rows] == [str(number) for number in range(NUM_MASKS)]
    assert all(row[-1].endswith("%") for row in rows)
    assert len(lines) == NUM_MASKS + 2, "and the two masks that were made up"
    assert "person" in {row[1] for row in rows}, "the photograph is full of them"
