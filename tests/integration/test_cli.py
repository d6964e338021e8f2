"""The installed `osm` command from end to end: fit, resume, validate, export, predict, and what each leaves on disk.

One training run serves the whole file; what follows it runs inside this process where that says as much.
"""

from __future__ import annotations

import csv
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from shapes_run import QUOTA, STEPS, run_osm, settings

from osm_lightning.__main__ import OFFLINE_COMMANDS, TRAINER_COMMANDS, main
from osm_lightning.training.callbacks import KeepConfig

pytestmark = pytest.mark.usefixtures("one_thread")

MODES = ("agnostic", "shapes")


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the installed command."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    done = run_osm("fit", *settings(shapes), "--run", folder)
    assert done.returncode == 0, done.stderr
    assert f"run folder: {folder}" in done.stdout
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "shapes-tiny"
    done = run_osm("weights", "export", "--ckpt", run / "checkpoints" / "last.ckpt", "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


def here(*words: str | Path) -> None:
    """Runs the command in this process."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    assert stopped.value.code == 0


def scores(folder: Path) -> dict:
    return json.loads((folder / "scores.json").read_text())


def column(folder: Path, name: str) -> list[float]:
    """Values of a column of metrics.csv, where there are any."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


# Fit


def test_fit_leaves_what_a_run_consists_of(run: Path) -> None:
    found = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    events = {name for name in found if name.startswith("events.out.tfevents.")}
    assert len(events) == 1
    assert {"checkpoints/last.ckpt", "checkpoints/best.ckpt", "metrics.csv", "config.yaml", "scores.json"} <= found
    assert not [name for name in found if "partial" in name]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["sources"]["shapes"]["quota"] == QUOTA
    assert config["model"]["modes"] == ["shapes"]
    assert not {"config", "run", "ckpt"} & config.keys(), "settings of one call are no part of what was trained"


def test_fit_learns_to_name_shapes_by_their_masks(run: Path) -> None:
    saved = scores(run)
    assert saved["step"] == STEPS
    assert [row["mode"] for row in saved["scores"]] == ["shapes", "agnostic"]
    for row in saved["scores"]:
        assert row["num_masks"] == 24
        assert row["majority"] == pytest.approx(1 / 3)
        assert row["acc"] >= 0.6, "a model that doesn't see the masks stays at 1/3"
    assert column(run, "val/acc")[-1] == pytest.approx(np.mean([row["acc"] for row in saved["scores"]]))


def test_metrics_count_masks_and_steps(run: Path) -> None:
    assert column(run, "train/masks_seen") == [6.0 * QUOTA * i for i in range(1, STEPS // 6 + 1)]
    losses = column(run, "train/loss")
    assert losses[-1] < losses[0]
    rates = column(run, "lr-AdamW/pg1")
    assert rates[0] == pytest.approx(5e-3)
    assert rates[-1] < 5e-3 * 0.01
    assert all(0 <= share <= 1 for share in column(run, "train/data_wait_share"))


def test_checkpoint_holds_what_was_trained_and_little_else(run: Path) -> None:
    path = run / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    names = list(content["state_dict"])
    assert all(name.startswith(("osm.qformer.", "osm.projection.", "osm.modes.", "osm.vision.pos")) for name in names)
    trained_bytes = sum(tensor.nbytes for tensor in content["state_dict"].values())
    # AdamW keeps two more numbers per parameter; zip and pickle take a kilobyte per tensor.
    assert path.stat().st_size < 3 * trained_bytes + 1_500 * 3 * len(names)
    assert yaml.safe_load(content["osm"]["config"]) == yaml.safe_load((run / "config.yaml").read_text())
    assert content["osm"]["frozen"].keys() == {"vision", "language"}
    assert content["global_step"] == STEPS


def test_saved_config_makes_the_same_run_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here("fit", "--config", run / "config.yaml", "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)
    printed = {key: value for key, value in printed.items() if key not in KeepConfig.PER_CALL}
    assert printed == yaml.safe_load((run / "config.yaml").read_text())


def test_resumed_run_goes_on_counting(run: Path, tmp_path: Path) -> None:
    here("fit", "--ckpt", run / "checkpoints" / "last.ckpt", "--trainer.max_epochs", "2", "--run", tmp_path / "second")
    content = torch.load(tmp_path / "second" / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 2 * STEPS
    assert scores(tmp_path / "second")["step"] == 2 * STEPS
    seen = column(tmp_path / "second", "train/masks_seen")
    assert seen[0] == (STEPS + 6) * QUOTA
    assert seen[-1] == 2 * STEPS * QUOTA
    # It went on from what had been learnt: the first loss is near the last one, far from an untrained model's.
    before, after = column(run, "train/loss"), column(tmp_path / "second", "train/loss")
    assert abs(after[0] - before[-1]) < 0.5 * abs(before[0] - before[-1])


def test_what_a_run_may_begin_without_its_checkpoints_do_not_pass_on(
    shapes: Path, exported: Path, tmp_path: Path
) -> None:
    words = ["--data.masks_per_epoch", str(QUOTA), "--data.num_workers", "0", "--trainer.limit_val_batches", "0"]
    here(
        "fit", *settings(shapes), *words, "--model.weights", exported, "--model.allow", "[nothing.*]", "--run", tmp_path
    )
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]["allow"] == ["nothing.*"]
    content = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert yaml.safe_load(content["osm"]["config"])["model"]["allow"] is None


def test_fast_dev_run_writes_nothing(tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = settings(shapes)
    monkeypatch.chdir(tmp_path)
    here("fit", *words, "--trainer.fast_dev_run", "1", "--run", tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# Validate


def test_checkpoint_alone_gives_the_scores_of_its_run(run: Path, tmp_path: Path) -> None:
    done = run_osm("validate", "--ckpt", run / "checkpoints" / "last.ckpt", "--run", tmp_path)
    assert done.returncode == 0, done.stderr
    assert scores(tmp_path)["scores"] == scores(run)["scores"]
    assert column(tmp_path, "val/loss/shapes") == pytest.approx(column(run, "val/loss/shapes"), rel=1e-6)


def test_fit_from_an_exported_folder_is_a_new_run_from_its_weights(
    run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here("fit", "--ckpt", exported, "--run", tmp_path / "on", "--trainer.max_steps", "6")
    assert f"{exported} has no optimizer state: a new run begins" in capsys.readouterr().out
    content = torch.load(tmp_path / "on" / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 6, "it counts from 0"
    assert yaml.safe_load(content["osm"]["config"])["model"]["weights"] == str(exported)
    before, after = column(run, "train/loss"), column(tmp_path / "on", "train/loss")
    assert abs(after[0] - before[-1]) < 0.5 * abs(before[0] - before[-1])


def test_exported_folder_gives_the_scores_of_its_run(run: Path, exported: Path, tmp_path: Path) -> None:
    here("validate", "--ckpt", exported, "--run", tmp_path)
    assert scores(tmp_path)["scores"] == scores(run)["scores"]
    assert column(tmp_path, "val/loss/shapes") == pytest.approx(column(run, "val/loss/shapes"), rel=1e-6)


def test_test_command_gives_the_scores_too(run: Path, exported: Path, tmp_path: Path) -> None:
    here("test", "--ckpt", exported, "--run", tmp_path, "--model.named_modes", "[agnostic]")
    assert scores(tmp_path)["scores"] == [row for row in scores(run)["scores"] if row["mode"] == "agnostic"]


# Predict


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images as they come: turned by EXIF, grey, with a palette, CMYK, large; and a PNG per mask."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: 60 x 40 in the file, 40 x 60 upright
    colours.save(folder / "images" / "turned.jpg", exif=exif)
    colours.convert("L").save(folder / "images" / "grey.png")
    colours.convert("P", palette=Image.Palette.ADAPTIVE, colors=16).save(folder / "images" / "palette.png")
    colours.convert("CMYK").save(folder / "images" / "print.jpg")
    colours.resize((900, 600)).save(folder / "images" / "large.png")
    colours.save(folder / "images" / "unsegmented.png")
    for stem, (width, height) in SIZES.items():
        (folder / "masks" / stem).mkdir(parents=True)
        for mask_id, (rows, columns) in MASKS.items():
            mask = np.zeros((height, width), np.uint8)
            mask[rows, columns] = 255
            Image.fromarray(mask).save(folder / "masks" / stem / f"{mask_id}.png")
    return folder


SIZES = {"grey": (60, 40), "large": (900, 600), "palette": (60, 40), "print": (60, 40), "turned": (40, 60)}
"""Width and height, upright, by stem in the order of the stems."""
MASKS = {"1": (slice(0, 20), slice(0, 30)), "2": (slice(5, 6), slice(7, 8))}
"""Rows and columns by id; the second is one pixel, of which the large image's scaling leaves nothing."""


@pytest.fixture(scope="module")
def named(exported: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "named"
    words = ["--images", photos / "images", "--masks", photos / "masks", "--modes", "any,shapes", "--out", out]
    done = run_osm("predict", "--ckpt", exported, *words)
    assert done.returncode == 0, done.stderr
    assert "named the masks of 5 images (1 images without masks were skipped)" in done.stdout
    return out


def test_every_mask_has_a_line_with_a_name_in_every_mode(named: Path) -> None:
    lines = [json.loads(line) for line in (named / "predictions.jsonl").read_text().splitlines()]
    assert [(Path(line["image"]).stem, line["mask_id"]) for line in lines] == [(s, m) for s in SIZES for m in MASKS]
    for line in lines:
        assert line.keys() == {"image", "mask_id", "bbox_xywh_px", "area_px", "names"}
        big = line["mask_id"] == "1"
        assert line["bbox_xywh_px"] == ([0, 0, 30, 20] if big else [7, 5, 1, 1])
        assert line["area_px"] == (600 if big else 1)
        assert tuple(line["names"]) == MODES
        for answer in line["names"].values():
            assert answer.keys() == {"name", "token_ids", "logprob", "logprob_no_eos"}
            assert len(answer["token_ids"]) <= 5
            assert answer["logprob"] <= answer["logprob_no_eos"] <= 0


def test_coco_file_agrees_with_the_lines(named: Path) -> None:
    coco = json.loads((named / "predictions.coco.json").read_text())
    lines = [json.loads(line) for line in (named / "predictions.jsonl").read_text().splitlines()]
    assert [(Path(i["file_name"]).stem, (i["width"], i["height"])) for i in coco["images"]] == list(SIZES.items())
    category = {row["id"]: row["name"] for row in coco["categories"]}
    for annotation, line in zip(coco["annotations"], lines, strict=True):
        names = {f"name_{mode}": answer["name"] for mode, answer in line["names"].items()}
        assert annotation["attributes"] == {"mask_id": line["mask_id"], **names}
        assert category[annotation["category_id"]] == names["name_agnostic"]
        assert annotation["score"] == pytest.approx(np.exp(line["names"]["agnostic"]["logprob"]))


def test_every_segmented_image_has_an_overlay_of_its_upright_size(named: Path) -> None:
    pictures = {path.stem: Image.open(path).size for path in (named / "overlay").iterdir()}
    assert pictures == SIZES


def test_prediction_is_the_same_bit_by_bit_when_run_again(named: Path, exported: Path, photos: Path) -> None:
    again = named.parent / "again"
    words = ["--images", photos / "images", "--masks", photos / "masks", "--modes", "any,shapes", "--out", again]
    here("predict", "--ckpt", exported, *words)
    assert digests(again) == digests(named)


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# Help


def test_help_lists_every_command_at_once() -> None:
    start_s = time.perf_counter()
    done = run_osm("--help")
    passed_s = time.perf_counter() - start_s
    assert done.returncode == 0
    for command in (*TRAINER_COMMANDS, *OFFLINE_COMMANDS):
        assert f"\n  {command} " in done.stdout
    assert passed_s < 2, f"{passed_s:.1f} s: does it import torch?"


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("fit", ["--ckpt", "--run", "--model.qformer.num_queries", "--data.masks_per_image", "--model.optim.lr"]),
        ("predict", ["--ckpt", "--images", "--masks", "--modes", "--out"]),
        ("validate", ["--ckpt", "--run", "--model.named_modes"]),
    ],
)
def test_help_of_a_command_explains_our_options(
    command: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    here(command, "--help")
    text = capsys.readouterr().out
    assert "Namespace" not in text
    for option in options:
        assert f"{option} " in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    here("--version")
    assert capsys.readouterr().out.startswith("osm ")


def test_the_module_is_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["osm"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("usage: osm COMMAND")
