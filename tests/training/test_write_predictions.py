"""Which images a run of `osm predict` names, which it believes to be named, and what its names depend on.

Several processes, kills and full disks: tests/faults/test_predict_resume.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace, dict_to_namespace
from PIL import Image
from safetensors.torch import save_file

from osm_lightning.batch import Answer, NamedMask
from osm_lightning.evaluation.prediction_journal import PredictionJournal
from osm_lightning.evaluation.segments import SegmentSource, read_segments
from osm_lightning.training.write_predictions import WritePredictions, naming_plan

STEMS = ("a", "b", "c")


@pytest.fixture
def source(tmp_path: Path) -> SegmentSource:
    """Three grey images with one mask each."""
    (tmp_path / "images").mkdir()
    for stem in STEMS:
        (tmp_path / "masks" / stem).mkdir(parents=True)
        Image.new("RGB", (8, 6), "grey").save(tmp_path / "images" / f"{stem}.png")
        Image.new("L", (8, 6), 255).save(tmp_path / "masks" / stem / "1.png")
    return read(tmp_path)


def read(folder: Path) -> SegmentSource:
    return read_segments(folder / "images", folder / "masks")


def begin(source: SegmentSource, out: Path) -> tuple[WritePredictions, Any]:
    """A callback in a trainer of one process, that has looked what there is to do."""
    callback = WritePredictions(source, PredictionJournal(out), lambda: {"modes": "agnostic"})
    strategy = SimpleNamespace(barrier=lambda *_: None, broadcast=lambda content: content)
    place = {"world_size": 1, "global_rank": 0, "is_global_zero": True}
    trainer = SimpleNamespace(**place, strategy=strategy, datamodule=SimpleNamespace())
    callback.setup(trainer, None, "predict")  # type: ignore[arg-type]
    return callback, trainer


def name(callback: WritePredictions, trainer: Any, *keys: str) -> None:
    """A batch, with a name for the mask of each image."""
    named = [NamedMask(key, "1", {"agnostic": Answer("cat", (5,), -0.1, 0.0)}) for key in keys]
    callback.on_predict_batch_end(trainer, trainer, named, SimpleNamespace(keys=keys), 0)  # type: ignore[arg-type]


def left(trainer: Any) -> list[str]:
    return [record.key for record in trainer.datamodule.predicted]


def lines(out: Path) -> int:
    return len((out / "predictions.jsonl").read_text().splitlines())


def test_files_appear_when_all_is_named(tmp_path: Path, source: SegmentSource) -> None:
    callback, trainer = begin(source, tmp_path / "out")
    assert left(trainer) == ["a", "b", "c"]
    name(callback, trainer, "a", "b")
    name(callback, trainer, "c")
    assert not (tmp_path / "out" / "predictions.jsonl").exists()
    callback.teardown(trainer, trainer, "predict")
    assert callback.num_named == lines(tmp_path / "out") == 3


def test_batches_that_fill_up_a_share_are_not_kept(tmp_path: Path, source: SegmentSource) -> None:
    """Where all ranks must call the model alike, one gets an image again, or one without masks."""
    callback, trainer = begin(source, tmp_path / "out")
    for keys in (("b",), ("a",), ("b",), (), ("c",)):
        name(callback, trainer, *keys)
    callback.teardown(trainer, trainer, "predict")
    assert lines(tmp_path / "out") == 3


def test_error_keeps_what_is_named(tmp_path: Path, source: SegmentSource, capsys: pytest.CaptureFixture[str]) -> None:
    callback, trainer = begin(source, tmp_path / "out")
    name(callback, trainer, "b")
    callback.on_exception(trainer, trainer, RuntimeError("out of memory"))
    callback.on_exception(trainer, trainer, RuntimeError("again"))  # as Lightning may, while it goes down
    assert capsys.readouterr().out.count("the same command goes on behind it") == 1
    callback, trainer = begin(source, tmp_path / "out")
    assert left(trainer) == ["a", "c"]
    assert "Going on behind 1 of 3 images" in capsys.readouterr().out
    name(callback, trainer, "a", "c")
    callback.teardown(trainer, trainer, "predict")
    assert lines(tmp_path / "out") == 3


def test_error_before_the_first_name_leaves_nothing(tmp_path: Path, source: SegmentSource) -> None:
    callback, trainer = begin(source, tmp_path / "out")
    callback.on_exception(trainer, trainer, RuntimeError("out of memory"))
    assert not (tmp_path / "out").exists()


def test_images_that_are_named_are_not_looked_at_again(tmp_path: Path, source: SegmentSource) -> None:
    callback, trainer = begin(source, tmp_path / "out")
    name(callback, trainer, "b")
    callback.on_exception(trainer, trainer, RuntimeError())
    for stem in ("b", "c"):
        (tmp_path / "images" / f"{stem}.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"1 of 3 images and their masks cannot be used:\nc\.png") as caught:
        begin(source, tmp_path / "out")
    assert "b.png" not in str(caught.value)


# The plan


@pytest.fixture
def options(tmp_path: Path) -> Namespace:
    """Those of the command that names depend on, and some that they don't."""
    model = {"vision": {"size": 1}, "qformer": {"width": 2}, "language": {"name": "llm"}, "modes": ["coco"]}
    model |= {"max_new_tokens": 12, "weights": str(tmp_path / "ckpt"), "optim": {"lr": 1.0}}
    write_checkpoint(tmp_path / "ckpt")
    trainer = {"precision": "32-true", "devices": 1}
    found = dict_to_namespace({"model": model, "trainer": trainer, "seed_everything": 0, "trust_checkpoint": False})
    found.modes = ["agnostic", "coco"]
    return found


def write_checkpoint(folder: Path, value: float = 1.0, language: str = "1a") -> None:
    """An exported folder with one tensor."""
    folder.mkdir(exist_ok=True)
    save_file({"modes.query": torch.full((2, 3), value, dtype=torch.bfloat16)}, folder / "model.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"modes": ["coco"]}}))
    (folder / "frozen.json").write_text(f'{{"language": "{language}"}}')


def touch(path: Path) -> None:
    facts = path.stat()
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))


CHANGES: dict[str, tuple[str, Callable[[Path, Namespace], object]]] = {
    "trained tensor": ("checkpoint", lambda folder, _: write_checkpoint(folder / "ckpt", value=2.0)),
    "frozen part": ("checkpoint", lambda folder, _: write_checkpoint(folder / "ckpt", language="2b")),
    "no checkpoint": ("checkpoint", lambda _, options: options.model.update(None, "weights")),
    "size": ("model settings", lambda _, options: options.model.vision.update(2, "size")),
    "length": ("model settings", lambda _, options: options.model.update(3, "max_new_tokens")),
    "precision": ("precision", lambda _, options: options.trainer.update("bf16-mixed", "precision")),
    "modes": ("modes", lambda _, options: options.modes.reverse()),
    "image": ("images and masks", lambda folder, _: touch(folder / "images" / "a.png")),
    "mask": ("images and masks", lambda folder, _: touch(folder / "masks" / "c" / "1.png")),
    "fewer masks": ("images and masks", lambda folder, _: (folder / "masks" / "c" / "1.png").unlink()),
    "mask's id": (
        "images and masks",
        lambda folder, _: (folder / "masks" / "c" / "1.png").rename(folder / "masks" / "c" / "2.png"),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_plan_changes_with_what_names_depend_on(
    tmp_path: Path, source: SegmentSource, options: Namespace, change: str
) -> None:
    before = naming_plan(source, options)
    what, function = CHANGES[change]
    function(tmp_path, options)
    after = naming_plan(read(tmp_path), options)
    assert {key for key in before if before[key] != after[key]} == {what}


def test_plan_stays_for_what_names_do_not_depend_on(tmp_path: Path, source: SegmentSource, options: Namespace) -> None:
    options.model.language.update(str(tmp_path / "ckpt" / "tokenizer"), "tokenizer")  # an exported folder's own
    before = naming_plan(source, options)
    options.trainer.devices = 8
    options.model.optim.lr = 2.0
    (tmp_path / "ckpt").rename(tmp_path / "moved")
    options.model.weights = str(tmp_path / "moved")
    options.model.language.update(str(tmp_path / "moved" / "tokenizer"), "tokenizer")
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(tmp_path / "images")
    assert naming_plan(read(tmp_path), options) == before


def test_plan_changes_with_the_file_that_lists_the_masks(tmp_path: Path, source: SegmentSource) -> None:
    table = tmp_path / "sam.json"
    table.write_text('[{"segmentation": [[0, 0, 4, 0, 4, 4]]}]')
    found = [read_segments(tmp_path / "images" / "a.png", table).fingerprint()]
    touch(table)
    found.append(read_segments(tmp_path / "images" / "a.png", table).fingerprint())
    assert len(set(found)) == 2
