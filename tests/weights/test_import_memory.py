"""Memory that loading takes: never more than 1.2 times the weights that are kept, whatever precision the files have."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fabricate
import pytest

MOST = 1.2

PROGRAM = """
import json, sys
from pathlib import Path
from osm_lightning.model.config import LanguageConfig, VisionConfig
from osm_lightning.model.language import LanguageModel
from osm_lightning.model.vision import VisionEncoder
from osm_lightning.weights.instructblip_import import import_model

folder, tiny, what, out = sys.argv[1:]

def load(folder, dtype):
    sizes = {"image_size_px": 112, "window_size_px": 56, "patch_size_px": 14}
    return VisionEncoder(VisionConfig(tower="instructblip", name=folder, dtype=dtype, **sizes)), LanguageModel(
        LanguageConfig(folder, dtype=dtype))

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

load(tiny, "float32")  # libraries are imported, and are no part of what is measured
import_model(tiny, Path(out) / "tiny")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before = status("VmRSS")
if what == "import":
    made = import_model(folder, Path(out) / "model")
    kept = sum(load.num_bytes for load in made.reports)
else:
    vision, language = load(folder, what)
    parameters = [*vision.parameters(), *language.parameters()]
    total = sum(float(parameter.detach().float().sum()) for parameter in parameters)  # every page is touched
    kept = sum(parameter.nbytes for parameter in parameters)
print(json.dumps({"kept": kept, "peak": status("VmHWM") - before}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Blocks have the share of the whole that they have in Vicuna: a thirty-second each."""
    root = tmp_path_factory.mktemp("hub")
    sizes = {"hidden_size": 512, "intermediate_size": 1400, "num_hidden_layers": 32}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fabricate, "spread", lambda module, seed: None)
        large = fabricate.instructblip(root / "safetensors", shard="60MB", **sizes)
        older = fabricate.instructblip(root / "bin", "bin", shard="60MB", **sizes)
    return {"safetensors": large, "bin": older, "tiny": fabricate.instructblip(root / "tiny")}


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
@pytest.mark.parametrize("what", ["float32", "float16", "import"])
def test_peak_memory(folders: dict[str, Path], tmp_path: Path, file_format: str, what: str) -> None:
    argv = [sys.executable, "-c", PROGRAM, str(folders[file_format]), str(folders["tiny"]), what, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["kept"] > {"float16": 150e6}.get(what, 300e6)
    assert measured["peak"] <= MOST * measured["kept"]
    if what != "import":
        assert measured["peak"] > 0.9 * measured["kept"], "what is kept must have been touched, or nothing is shown"
