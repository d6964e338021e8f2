from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from osm_lightning.commands import weights
from osm_lightning.weights.registry import SETS, PartSet


def test_help_teaches_and_does_not_import_torch() -> None:
    code = (
        "import sys\n"
        "from osm_lightning.commands.weights import main\n"
        "try: main(['fetch', '--help'])\n"
        "finally: print([name for name in ('torch', 'transformers', 'onnx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "osm weights fetch mini --out weights" in done.stdout
    assert SETS["mini"].summary in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("argv", "out"), [(["fetch", "mini", "--out", "elsewhere"], "elsewhere"), (["fetch", "mini"], "weights")]
)
def test_fetch_is_called_with_the_set_and_the_folder(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], out: str
) -> None:
    calls: list[tuple[PartSet, Path]] = []
    monkeypatch.setattr(weights, "fetch", lambda part_set, folder: calls.append((part_set, folder)))
    assert weights.main(argv) == 0
    assert calls == [(SETS["mini"], Path(out))]


@pytest.mark.parametrize("argv", [[], ["fetch"], ["fetch", "maxi"]])
def test_a_wrong_command_line_is_an_error(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        weights.main(argv)
    assert stopped.value.code == 2
    assert "usage: osm weights" in capsys.readouterr().err
