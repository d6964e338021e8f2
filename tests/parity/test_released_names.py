"""An imported released checkpoint gives the released names: ids and probabilities of the method restated naively.

The way here is the whole one: `osm weights import`, then `osm predict` from image files and masks. The reference runs
on transformers' own modules. Each of its rules is broken once, to see that the comparison notices.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from naive_released import NaiveReleased, Rules
from PIL import Image

from osm_lightning.__main__ import main

sys.path.insert(0, str(Path(__file__).parents[1] / "weights"))
import fabricate

MODES = ("any", "coco")
pytestmark = pytest.mark.usefixtures("one_thread")

CLOSE = 1e-4
"""Of a log probability."""

Named = dict[tuple[str, str, str], tuple[list[int], float]]
"""(image, mask, mode) to generated ids and their log probability."""

MASKS = {
    "portrait": {
        "1": (10, 20, 60, 90),
        "2": (0, 0, 40, 7),  # along the upper border
        "3": (79, 100, 90, 140),  # at the corner
        "4": (41, 71, 3, 3),  # smaller than a patch
    },
    "square": {
        "1": (0, 0, 64, 64),
        "2": (15, 9, 3, 40),  # thinner than a patch, as high as three
        "3": (33, 34, 4, 5),  # between the first pixels of all patches
        "4": (63, 0, 1, 64),
    },
    "landscape": {
        "1": (100, 30, 70, 50),
        "2": (0, 99, 200, 21),  # along the lower border
        "3": (150, 5, 9, 9),
        "4": (199, 119, 1, 1),
    },
}
"""x, y, width and height of the masks of each image."""

SIZES = {"portrait": (90, 140), "square": (64, 64), "landscape": (200, 120)}


def here(*words: str | Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    assert stopped.value.code == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fabricate.instructblip(tmp_path_factory.mktemp("hub") / "instructblip")


@pytest.fixture(scope="module")
def released(folder: Path) -> dict[str, torch.Tensor]:
    return fabricate.released(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise of several scales, so that every window and patch is another."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    for name, (width, height) in SIZES.items():
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((width, height))
        fine = rng.integers(-60, 60, (height, width, 3))
        pixels = (np.asarray(coarse).astype(int) + fine).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{name}.png")
        (root / "masks" / name).mkdir(parents=True)
        for mask_id, (x, y, mask_width, mask_height) in MASKS[name].items():
            mask = np.zeros((height, width), dtype=np.uint8)
            mask[y : y + mask_height, x : x + mask_width] = 255
            assert mask.any(), (name, mask_id)
            Image.fromarray(mask).save(root / "masks" / name / f"{mask_id}.png")
    return root


@pytest.fixture(scope="module")
def predicted(
    folder: Path, released: dict[str, torch.Tensor], pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> Named:
    root = tmp_path_factory.mktemp("imported")
    checkpoint = fabricate.save_released(released, root / "osm_final.pt")
    here(
        *("weights", "import", "--instructblip", folder, "--released", checkpoint),
        *("--out", root / "model", "--dtype", "float32"),
    )
    here(
        *("predict", "--ckpt", root / "model", "--modes", ",".join(MODES), "--out", root / "named"),
        *("--images", pictures / "images", "--masks", pictures / "masks", "--data.num_workers", "0"),
        *("--trainer.accelerator", "cpu"),
    )
    named: Named = {}
    for line in (root / "named" / "predictions.jsonl").read_text().splitlines():
        row = json.loads(line)
        for mode in MODES:
            answer = row["names"]["agnostic" if mode == "any" else mode]
            named[Path(row["image"]).stem, row["mask_id"], mode] = (answer["token_ids"], answer["logprob"])
    return named


def naive(folder: Path, released: dict[str, torch.Tensor], pictures: Path, rules: Rules) -> Named:
    model = NaiveReleased(folder, released, fabricate.SIDE, rules)
    return {
        (image, mask_id, mode): model.name(
            pictures / "images" / f"{image}.png", pictures / "masks" / image / f"{mask_id}.png", mode
        )
        for image, masks in MASKS.items()
        for mask_id in masks
        for mode in MODES
    }


def differences(ours: Named, theirs: Named) -> list[tuple[str, str, str]]:
    assert ours.keys() == theirs.keys()
    return [key for key in theirs if ours[key][0] != theirs[key][0] or not abs(ours[key][1] - theirs[key][1]) <= CLOSE]


def test_every_mask_gets_the_released_name_in_every_mode(
    predicted: Named, folder: Path, released: dict[str, torch.Tensor], pictures: Path
) -> None:
    wanted = naive(folder, released, pictures, Rules())
    assert len(wanted) == 3 * 4 * len(MODES)
    assert not differences(predicted, wanted)
    assert len({tuple(ids) for ids, _ in wanted.values()}) > 8, "names that are all alike would show little"
    assert len({len(ids) for ids, _ in wanted.values()}) > 1, "some names must end, and some not, before the limit"


def test_the_masks_are_those_that_rules_differ_for(folder: Path, released: dict, pictures: Path) -> None:
    model = NaiveReleased(folder, released, fabricate.SIDE)
    gone, kept = [], []
    for image, masks in MASKS.items():
        for mask_id in masks:
            mask = model.mask_on_input(pictures / "masks" / image / f"{mask_id}.png")
            assert mask.any(), "a mask of which nothing is left has no released name"
            patches = model.on_grid(mask, "nearest")[fabricate.WINDOWS_A_SIDE**2 :]
            (kept if patches.any() else gone).append((image, mask_id))
    assert len(gone) >= 2, "masks that vanish on the grid"
    assert len(kept) >= 6


BROKEN = {
    "another context ratio": {"context": 0.3},
    "masks by area": {"mask_on_grid": "touched"},
    "context boxes by area": {"context_on_grid": "touched"},
    "no CLS columns": {"cls_is_visible": False},
    "swapped modes": {"swap_modes": True},
    "no global position": {"add_position": False},
    "Llama's own BOS": {"bos": 1},
    "no instruction in the Q-Former": {"read_instruction": False},
    "grey padding": {"normalise_before_padding": True},
    "a shorter limit": {"max_new_tokens": 3},
}


@pytest.mark.parametrize("fault", BROKEN)
def test_the_comparison_notices(
    predicted: Named, folder: Path, released: dict[str, torch.Tensor], pictures: Path, fault: str
) -> None:
    broken = naive(folder, released, pictures, replace(Rules(), **BROKEN[fault]))
    assert differences(predicted, broken)
