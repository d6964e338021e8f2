"""The README's commands work as they stand there, one after the other, in one working folder: only smaller.

Every line of its code blocks is run, or the test fails: a new command needs a row in the tables below. What stands in
for the reader's own files (COCO, photos, masks, a trained model) is made on the spot.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from shapes_run import QUOTA, ROOT, run_osm, settings, shapes_record, write_shapes

from osm_lightning.__main__ import main
from osm_lightning.commands import weights
from osm_lightning.weights.registry import SETS

sys.path.insert(0, str(Path(__file__).parents[1] / "weights"))
import fabricate

README = (ROOT / "README.md").read_text(encoding="utf-8")

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

INSTEAD = {"configs/model/mini.yaml": "configs/model/tiny.yaml"}
"""Words of a command, and what makes it small."""

TUNE = ("osm", "fit", "--ckpt", "models/released")
MORE: dict[tuple[str, ...], str] = {
    TUNE: "--data.masks_per_epoch 72 --data.num_workers 0 --data.sources.coco.val null --trainer.accelerator cpu "
    "--trainer.precision 32",
    ("osm", "fit"): "--data.masks_per_epoch 72 --trainer.limit_val_batches 2 --trainer.precision 32",
    ("osm", "validate"): "--trainer.limit_val_batches 2",
}
"""What is added to a command to make it small."""

LEAVES = {
    TUNE: ["runs/*/checkpoints/last.ckpt"],
    ("osm", "weights", "import"): ["models/released/model.safetensors", "models/released/load_report.json"],
    ("osm", "weights", "merge"): ["models/tuned/model.safetensors", "models/tuned/language/model.safetensors"],
    ("osm", "weights", "export"): ["osm_tuned.pt"],
    ("osm", "predict", "--ckpt", "models/released"): ["released/predictions.jsonl"],
    ("osm", "predict"): ["named/predictions.jsonl", "named/predictions.coco.json", "named/overlay/*.png"],
    ("osm", "shards", "build", "photos.yaml"): ["data_shards/mine/index.json", "data_shards/mine/train-00000.tar"],
    ("osm", "shards", "browse"): ["page.html"],
    ("osm", "shards", "build"): ["data_shards/coco/index.json", "data_shards/coco/train2017-00000.tar"],
    ("osm", "fit"): [
        "runs/*/config.yaml",
        "runs/*/metrics.csv",
        "runs/*/events.out.tfevents.*",
        "runs/*/scores.json",
        "runs/*/checkpoints/last.ckpt",
        "runs/*/checkpoints/best.ckpt",
    ],
    ("osm", "validate"): ["runs/*/scores.json"],
}
"""The commands that are run, and the files that each makes; `*` stands for one name."""

NOT_RUN = (("make",), ("osm", "weights", "fetch"))
"""Commands that would install or download; tests of their own look at what can be seen without."""

NUM_PHOTOS = 3

OWN_DATA = """\
dataset: mine
format: coco_panoptic
vocabulary: coco
splits:
  train:
    images: COCO/train2017
    annotations: COCO/annotations/panoptic_train2017.json
    segment_maps: COCO/annotations/panoptic_train2017
"""


def blocks(language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(README) if found == language]


def commands() -> list[list[str]]:
    """The words of every command in the code blocks, in their order."""
    lines = "\n".join(blocks("")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def kind(words: list[str]) -> tuple[str, ...]:
    """The key of a command in the tables."""
    for key in (*LEAVES, *NOT_RUN):
        if tuple(words[: len(key)]) == key:
            return key
    raise AssertionError(f"README.md shows `{shlex.join(words)}`, and no row of this file says how to try it")


def of_kind(*key: str) -> list[list[str]]:
    return [words for words in commands() if kind(words) == key]


def write_coco(root: Path) -> None:
    """Writes a folder in COCO's panoptic layout: boxes are its persons, lights its bicycles, walls its cars."""
    split = "train2017"
    for folder in (root / split, root / "annotations" / f"panoptic_{split}"):
        folder.mkdir(parents=True)
    images, annotations = [], []
    for number in range(1, NUM_PHOTOS + 1):
        name, record = f"{number:012}", shapes_record(str(number), number, class_of_lights=2)
        record.image().save(root / split / f"{name}.jpg", quality=95)
        segment_map = record.segment_map()
        assert segment_map is not None
        ids = np.stack([segment_map, 0 * segment_map, 0 * segment_map], axis=-1).astype(np.uint8)
        Image.fromarray(ids).save(root / "annotations" / f"panoptic_{split}" / f"{name}.png")
        images.append({"id": number, "file_name": f"{name}.jpg", "height": 72, "width": 96})
        infos = [
            {"id": int(s.id), "category_id": s.class_id, "iscrowd": 0, "area": s.area_px, "bbox": s.bbox_xywh_px}
            for s in record.segments
        ]
        annotations.append({"image_id": number, "file_name": f"{name}.png", "segments_info": infos})
    content = json.dumps({"images": images, "annotations": annotations})
    (root / "annotations" / f"panoptic_{split}.json").write_text(content, encoding="utf-8")


def write_model(folder: Path, scratch: Path) -> None:
    """Exports a tiny model of one step, whose vocabulary goes by the name of coco."""
    write_shapes(scratch / "shapes")
    words = [*settings(scratch / "shapes"), "--data.masks_per_epoch", str(QUOTA), "--trainer.limit_val_batches", "0"]
    words += ["--data.num_workers", "0", "--model.modes", "[coco]", "--data.sources.shapes.mode", "coco"]
    for argv in (
        ["fit", *words, "--run", str(scratch / "run")],
        ["weights", "export", "--ckpt", str(scratch / "run" / "checkpoints" / "last.ckpt"), "--out", str(folder)],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 0, argv


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with what a clone has that the commands need, and what its reader is taken to have."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "data_shards").mkdir()
    for name in ("configs", "data_shards/scenes"):
        (folder / name).symlink_to(ROOT / name)
    write_coco(folder / "COCO")
    (folder / "photos").symlink_to("COCO/train2017")
    (folder / "photos.yaml").write_text(OWN_DATA, encoding="utf-8")
    (folder / "masks.json").symlink_to("COCO/annotations/panoptic_train2017.json")
    (folder / "masks").symlink_to("COCO/annotations/panoptic_train2017")
    (folder / "photo.jpg").symlink_to("COCO/train2017/000000000001.jpg")
    write_model(folder / "models" / "mini-coco", tmp_path_factory.mktemp("scratch"))
    hub = fabricate.instructblip(folder / "instructblip-vicuna-7b")
    fabricate.save_released(fabricate.released(hub), folder / "osm_final.pt")
    return folder


def test_every_command_is_of_a_kind_that_is_tried() -> None:
    assert {kind(words) for words in commands()} == {*LEAVES, *NOT_RUN}
    assert {language for language, _ in BLOCK.findall(README)} == {"", "python", "yaml"}
    assert README.count("```") == 2 * len(BLOCK.findall(README)), "a block that the pattern does not see"


def test_files_of_the_project_that_are_named_exist() -> None:
    in_commands = {word for words in commands() for word in words if word.startswith("configs/")}
    linked = set(re.findall(r"\]\(([^):#]+)\)", README))
    assert in_commands
    assert linked
    assert not [name for name in sorted(in_commands | linked) if not (ROOT / name).exists()]


def test_commands_run_one_after_the_other(clone: Path) -> None:
    for words in commands():
        key = kind(words)
        if key in NOT_RUN:
            continue
        small = [INSTEAD.get(word, word) for word in words[1:]] + shlex.split(MORE.get(key, ""))
        before = set(clone.rglob("*"))
        done = run_osm(*small, cwd=clone)
        assert done.returncode == 0, f"$ {shlex.join(words)}\n{done.stderr}"
        missing = [pattern for pattern in LEAVES[key] if not set(clone.glob(pattern)) - before]
        assert not missing, f"$ {shlex.join(words)}\n{done.stdout}"
    lines = [json.loads(line) for line in (clone / "named" / "predictions.jsonl").read_text().splitlines()]
    assert [list(line["names"]) for line in lines] == [["agnostic", "coco"]] * (3 * NUM_PHOTOS)
    fitted, validated = (json.loads(path.read_text()) for path in sorted(clone.glob("runs/*/scores.json")))
    assert validated["scores"] == fitted["scores"], "checkpoints bring their own config"


def test_own_data_fits_on_top_of_the_recipe(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("yaml")
    overlay = clone / "mine.yaml"
    overlay.write_text(block, encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(ROOT / "configs/joint.yaml"), "--config", str(overlay), "--print_config"])
    assert stopped.value.code == 0
    parsed, written = yaml.safe_load(capsys.readouterr().out), yaml.safe_load(block)
    assert parsed["model"]["modes"] == written["model"]["modes"]
    assert parsed["data"]["sources"].keys() == written["data"]["sources"].keys()
    for key, source in written["data"]["sources"].items():
        assert source.items() <= parsed["data"]["sources"][key].items()


def test_names_come_from_python_too(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = blocks("python")
    head, question = block.rstrip().rsplit("\n", 1)
    monkeypatch.chdir(clone)
    space = {"masks": np.ones((2, 72, 96), dtype=bool)}
    exec(head, space)
    assert [list(mask.answers) for mask in eval(question.strip(), space)] == [["agnostic", "coco"]] * 2


def test_weights_that_are_fetched_are_a_set_that_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[tuple[str, Path]] = []
    monkeypatch.setattr(weights, "fetch", lambda part_set, out: fetched.append((part_set.key, out)))
    for words in of_kind("osm", "weights", "fetch"):
        assert weights.main(words[2:]) == 0
    mini = yaml.safe_load((ROOT / "configs/model/mini.yaml").read_text(encoding="utf-8"))["model"]
    made = {str(out / key / part.name) for key, out in fetched for part in SETS[key].parts}
    assert made == {mini["vision"]["name"], mini["language"]["name"]}


def test_make_knows_the_targets_and_lists_them() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for _, target in of_kind("make"):
        assert re.search(rf"^  {target} ", listed, re.MULTILINE)
        dry = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert dry.returncode == 0, dry.stderr
