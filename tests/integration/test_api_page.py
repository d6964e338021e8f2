"""The examples of docs/api.md run as they stand there, and its table is that of the code."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shapes_run import ROOT
from tiny_checkpoint import write_exported

from osm_lightning import OSM, Answer, NamedMask, Scene

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def test_examples_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_exported(tmp_path / "models" / "mini-coco", tmp_path / "run")
    Image.new("RGB", (40, 30), "grey").save(tmp_path / "photo.jpg")
    np.save(tmp_path / "masks.npy", np.ones((3, 30, 40), dtype=bool))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    space: dict[str, Any] = {}
    for block in blocks:
        exec(block, space)
    # A random model writes line breaks into names.
    assert re.findall(r"^(\d) ", capsys.readouterr().out, re.MULTILINE)[0] == "0"
    assert str(next(space["osm"].model.language.parameters()).dtype) == "torch.bfloat16"


@pytest.mark.parametrize(
    ("heading", "function", "hidden"),
    [
        ("OSM.from_pretrained", OSM.from_pretrained, set()),
        ("osm.encode", OSM.encode, {"self"}),
        ("scene.name", Scene.name, {"self"}),
    ],
)
def test_arguments_are_those_of_the_code(heading: str, function: Any, hidden: set[str]) -> None:
    found = re.search(rf"`{re.escape(heading)}\((.*?)\) -> ", PAGE)
    assert found is not None
    named = re.findall(r"(?:^|, )(\w+)(?==|,|$)", re.sub(r"\([^)]*\)|\{\}", "", found[1]))
    assert named == [name for name in inspect.signature(function).parameters if name not in hidden]


@pytest.mark.parametrize("kind", [NamedMask, Answer])
def test_fields_are_those_of_the_code(kind: type) -> None:
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{kind.__name__}` |")]
    assert re.findall(r"`(\w+): ", row) == list(inspect.signature(kind).parameters)
