"""What `osm` says to what it cannot work with: one message, exit code 2, no traceback, nothing left at --out."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from shapes_run import QUOTA, ROOT, run_osm, settings, write_shapes

from osm_lightning.__main__ import main
from osm_lightning.datasets import DATASETS

Refuse = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Runs the command here and returns what it said on stderr before it exited with 2."""

    def run(*words: str | Path) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        said = capsys.readouterr().err
        assert stopped.value.code == 2, said
        assert "Traceback" not in said
        assert said.count("error:") == 1
        assert len(said) < 4_000, "the message drowns"
        return said

    return run


@pytest.fixture(scope="module")
def ckpt(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one step."""
    run = tmp_path_factory.mktemp("runs") / "one-step"
    words = ["--data.masks_per_epoch", str(QUOTA), "--data.num_workers", "0", "--trainer.limit_val_batches", "0"]
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *settings(shapes), *words, "--run", str(run)])
    assert stopped.value.code == 0
    return run / "checkpoints" / "last.ckpt"


# The trainer


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("strategy", "nonsense", "invalid strategy name: `strategy='nonsense'`"),
        ("accelerator", "tpu", "Requirement 'torch_xla"),
        ("devices", "0", r"`Trainer(devices='0')` value is not a valid input"),
        ("devices", "3,a", "`devices` selected with `CPUAccelerator` should be an int > 0"),
    ],
)
def test_a_trainer_that_cannot_be(
    shapes: Path, tmp_path: Path, refused: Refuse, setting: str, value: str, reason: str
) -> None:
    said = refused("fit", *settings(shapes), f"--trainer.{setting}", value, "--run", tmp_path / "run")
    assert "the settings under `trainer` make no trainer here: " in said
    assert reason in said
    assert "configs/trainer/" in said
    assert not (tmp_path / "run").exists()


# Images and masks


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A folder with one image and one mask that would do."""
    (tmp_path / "images").mkdir()
    (tmp_path / "masks" / "photo").mkdir(parents=True)
    Image.new("RGB", (30, 20), "teal").save(tmp_path / "images" / "photo.png")
    Image.new("L", (30, 20), 255).save(tmp_path / "masks" / "photo" / "1.png")
    return tmp_path


@pytest.fixture
def predict(refused: Refuse, ckpt: Path, photo: Path) -> Refuse:
    """Runs `osm predict` on the photo, with more or other words after its own; --out must stay away."""

    def run(*words: str | Path) -> str:
        own = ["--images", photo / "images", "--masks", photo / "masks", "--out", photo / "out"]
        said = refused("predict", "--ckpt", ckpt, *own, *words)
        assert not (photo / "out").exists()
        return said

    return run


def test_missing_images(predict: Refuse, photo: Path) -> None:
    said = predict("--images", photo / "nowhere")
    assert said.endswith("nowhere. Give an image (.jpg, .jpeg, .png, .webp) or a folder of them.\n")


def test_empty_folder_of_images(predict: Refuse, photo: Path) -> None:
    (photo / "empty").mkdir()
    assert "empty holds no image" in predict("--images", photo / "empty")


def test_missing_masks(predict: Refuse, photo: Path) -> None:
    assert "masks: there is no file or folder" in predict("--masks", photo / "nowhere")


def test_mask_of_another_size(predict: Refuse, photo: Path) -> None:
    Image.new("L", (20, 30), 255).save(photo / "masks" / "photo" / "1.png")
    said = predict()
    assert "photo.png: " in said
    assert "1.png is 20 x 30 px, but the image is 30 x 20 px" in said


def test_mask_without_pixels(predict: Refuse, photo: Path) -> None:
    Image.new("L", (30, 20), 0).save(photo / "masks" / "photo" / "2.png")
    assert "2.png is empty; a mask without pixels cannot be named" in predict()


def test_image_that_is_none(predict: Refuse, photo: Path) -> None:
    (photo / "images" / "photo.png").write_bytes(b"<html>404</html>")
    assert "photo.png" in predict()


def test_unknown_mode(predict: Refuse) -> None:
    assert "mode 'lvis' is not one of this model's (agnostic, shapes). Use one of these." in predict("--modes", "lvis")


def test_no_mode(predict: Refuse) -> None:
    assert "--modes" in predict("--modes", ",")


def test_output_that_is_a_file(refused: Refuse, ckpt: Path, photo: Path) -> None:
    (photo / "out").write_text("mine")
    words = ["--images", photo / "images", "--masks", photo / "masks", "--out", photo / "out"]
    assert "is no folder to write to" in refused("predict", "--ckpt", ckpt, *words)
    assert (photo / "out").read_text() == "mine"


def test_prediction_without_a_model(refused: Refuse, photo: Path) -> None:
    said = refused("predict", "--images", photo / "images", "--masks", photo / "masks", "--out", photo / "out")
    assert "neither --config nor --ckpt is given" in said


# Data


def test_unknown_dataset(refused: Refuse, tmp_path: Path) -> None:
    said = refused("shards", "build", "imagenet", "--src", tmp_path, "--split", "train", "--out", tmp_path / "out")
    assert "invalid choice: 'imagenet'" in said
    assert "coco" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_class_that_the_vocabulary_lacks(refused: Refuse, tmp_path: Path, workers: int) -> None:
    """Also where a worker process finds it."""
    write_shapes(tmp_path / "shapes", class_of_lights=9)
    words = settings(tmp_path / "shapes")
    said = refused("fit", *words, "--data.num_workers", str(workers), "--run", tmp_path / "run")
    line = next(line for line in said.splitlines() if "error:" in line)
    assert line.startswith("osm fit: error: data.sources.shapes: sample train-")
    assert "class 9 is not in the vocabulary 'vocabulary' (3 classes)" in line
    assert "Set data.sources.shapes.vocabulary." in line


def test_an_error_in_a_worker_ends_the_command_at_once(tmp_path: Path) -> None:
    """While another worker, which leaves SIGTERM to the run, is at work."""
    write_shapes(tmp_path / "shapes", class_of_lights=9)
    begin = time.monotonic()
    done = run_osm("fit", *settings(tmp_path / "shapes"), "--data.num_workers", "2", "--run", tmp_path / "run")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("osm fit: error: data.sources.shapes: sample train-")
    assert time.monotonic() - begin < 120, "it waited for its workers"


def test_bare_clone_names_all_that_is_missing_with_its_commands(tmp_path: Path) -> None:
    done = run_osm("fit", "--config", ROOT / "configs" / "joint.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for key in DATASETS:
        assert f"data.sources.{key}: split " in done.stderr
        assert f"osm shards build {key} --src RAW_{key.upper()} --split " in done.stderr
    wanted = yaml.safe_load((ROOT / "configs" / "joint.yaml").read_text())["model"]
    for path in (
        wanted["vision"]["pretrained"],
        wanted["language"]["name"],
        wanted["qformer"]["instruction_tokenizer"],
    ):
        assert f"{path}  ->  " in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_weights_that_can_be_fetched_are_named_with_the_command(
    refused: Refuse, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*settings(shapes), "--config", ROOT / "configs" / "model" / "mini.yaml"]
    words += ["--model.vision.architecture", "null", "--model.language.architecture", "null"]
    monkeypatch.chdir(tmp_path)
    said = refused("fit", *words)
    assert said.count("osm weights fetch mini --out weights") == 2
    assert "model.vision.name: weights/mini/vision" in said
    assert "model.language.name: weights/mini/language" in said
    assert list(tmp_path.iterdir()) == []


# Settings


def test_unknown_command(refused: Refuse) -> None:
    assert "there are fit, validate, test, predict, shards, weights" in refused("train")


def test_unknown_setting_on_the_command_line(refused: Refuse, shapes: Path) -> None:
    assert "--model.qformer.querys" in refused("fit", *settings(shapes), "--model.qformer.querys", "3")


def test_typo_in_a_file(refused: Refuse, shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "typo.yaml").write_text("model:\n  qformer:\n    num_querys: 3\n")
    said = refused("fit", *settings(shapes), "--config", tmp_path / "typo.yaml")
    assert "model.qformer.num_querys" in said


def test_file_that_is_no_yaml(refused: Refuse, shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("model: [")
    said = refused("fit", *settings(shapes), "--config", tmp_path / "broken.yaml")
    assert "line 2, column 1" in said


def test_missing_config(refused: Refuse, shapes: Path, tmp_path: Path) -> None:
    assert "nowhere.yaml" in refused("fit", *settings(shapes), "--config", tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_neither_config_nor_checkpoint(refused: Refuse, command: str) -> None:
    assert "neither --config nor --ckpt is given" in refused(command)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("model.qformer.num_heads", "3", "qformer.width is 32, but must be a multiple of num_heads (3)"),
        ("model.vision.image_size_px", "100", "vision.image_size_px is 100, but must be a multiple of 56"),
        ("data.masks_per_image", "0", "data.masks_per_image is 0, but must be at least 1"),
        ("data.sources.shapes.quota", "5", "data.sources.shapes.quota is 5"),
        ("data.sources.shapes.weight", "0", "data.sources.shapes.weight is 0"),
        ("data.sources.shapes.mode", "coco", "mode 'coco' is not one of this model's (agnostic, shapes)"),
    ],
)
def test_setting_that_cannot_be(
    refused: Refuse, shapes: Path, tmp_path: Path, setting: str, value: str, message: str
) -> None:
    said = refused("fit", *settings(shapes), f"--{setting}", value, "--data.num_workers", "0", "--run", tmp_path)
    assert f"osm fit: error: {message}" in said


# Checkpoints


def test_checkpoint_of_another_model_size(refused: Refuse, ckpt: Path, tmp_path: Path) -> None:
    said = refused("validate", "--ckpt", ckpt, "--model.qformer.width", "64", "--run", tmp_path)
    assert "the checkpoint is of another model" in said
    assert "(4, 32) for (4, 64)" in said
    assert not (tmp_path / "scores.json").exists()


def test_validating_nothing(refused: Refuse, ckpt: Path, tmp_path: Path) -> None:
    said = refused("validate", "--ckpt", ckpt, "--trainer.limit_val_batches", "0", "--run", tmp_path)
    assert "nothing was validated" in said


def test_a_fit_without_validation_leaves_a_checkpoint_that_validates(ckpt: Path, tmp_path: Path) -> None:
    """The limits of the run that made it (none of its batches were validated) do not come along."""
    with pytest.raises(SystemExit) as stopped:
        main(["validate", "--ckpt", str(ckpt), "--data.num_workers", "0", "--run", str(tmp_path)])
    assert stopped.value.code == 0
    assert (tmp_path / "scores.json").exists()


def test_resuming_with_other_modes(refused: Refuse, ckpt: Path, tmp_path: Path) -> None:
    words = ["--model.modes", "[lamps]", "--data.sources.shapes.mode", "lamps", "--trainer.max_epochs", "2"]
    said = refused("fit", "--ckpt", ckpt, *words, "--run", tmp_path)
    assert "the checkpoint's modes are agnostic, shapes" in said


def test_missing_checkpoint_is_answered_with_those_there_are(
    refused: Refuse, ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "There are none under runs/ either" in refused("validate", "--ckpt", "runs/a/last.ckpt")
    Path("runs/b").mkdir(parents=True)
    Path("runs/b/best.ckpt").write_bytes(ckpt.read_bytes())
    said = refused("predict", "--ckpt=runs/a/last.ckpt", "--images", "x", "--masks", "y", "--out", "z")
    assert "checkpoint 'runs/a/last.ckpt' does not exist. Under runs/ there are: runs/b/best.ckpt." in said


def test_corrupt_checkpoint(refused: Refuse, ckpt: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.ckpt").write_bytes(ckpt.read_bytes()[:5_000])
    assert "cut.ckpt cannot be read" in refused("validate", "--ckpt", tmp_path / "cut.ckpt")


class Payload:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_code_in_a_checkpoint_is_not_run(refused: Refuse, ckpt: Path, tmp_path: Path, command: str) -> None:
    content = torch.load(ckpt, weights_only=True)
    torch.save({**content, "extra": Payload(tmp_path / "was-run")}, tmp_path / "evil.ckpt")
    assert "holds code, which is never run" in refused(command, "--ckpt", tmp_path / "evil.ckpt")
    assert not (tmp_path / "was-run").exists()
    pickle.loads(pickle.dumps(Payload(tmp_path / "was-run")))
    assert (tmp_path / "was-run").exists(), "the trap does not work, so that the test says nothing"


def test_checkpoint_of_another_machine_needs_no_such_machine(ckpt: Path, photo: Path) -> None:
    """Nothing to refuse: GPUs belong to the run, not to what it learnt."""
    content = torch.load(ckpt, weights_only=True)
    config = yaml.safe_load(content["osm"]["config"])
    config["trainer"] |= {"accelerator": "gpu", "devices": 8, "num_nodes": 2, "strategy": "ddp"}
    content["osm"]["config"] = yaml.safe_dump(config)
    torch.save(content, photo / "cluster.ckpt")
    words = ["--images", photo / "images", "--masks", photo / "masks", "--out", photo / "out"]
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in ["predict", "--ckpt", photo / "cluster.ckpt", *words]])
    assert stopped.value.code == 0
    assert np.asarray(Image.open(photo / "out" / "overlay" / "photo.png")).shape[:2] == (20, 30)
