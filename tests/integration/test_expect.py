"""`osm validate --expect`: the command's exit code, what it refuses before anything slow, and several processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shapes_run import run_osm, settings

from osm_lightning.__main__ import main

NUM_MASKS = 24


@pytest.fixture(scope="module")
def counted(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Score rows of an untrained model, by mode; seeded, so that every run has the same."""
    run = tmp_path_factory.mktemp("runs") / "first"
    assert validate("--run", run, *settings(shapes)) == 0
    rows = json.loads((run / "scores.json").read_text())["scores"]
    return {row["mode"]: row for row in rows}


def validate(*words: str | Path) -> object:
    """The command's exit code."""
    with pytest.raises(SystemExit) as stopped:
        main(["validate", *map(str, words)])
    return stopped.value.code


def test_scores_have_counts(counted: dict[str, dict]) -> None:
    for row in counted.values():
        assert row["num_masks"] == NUM_MASKS
        assert row["num_right"] == round(row["acc"] * NUM_MASKS)
        assert row["num_outside"] == round(row["niv"] * NUM_MASKS)


def test_what_was_counted_agrees_with_itself_and_not_with_more(
    counted: dict[str, dict], shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = {mode: row["num_right"] for mode, row in counted.items()}
    words = ["--run", tmp_path, *settings(shapes), "--expect", f"shapes={right['shapes']}/{NUM_MASKS}"]
    assert validate(*words, "--expect", f"shapes/any={right['agnostic']}/{NUM_MASKS}") == 0
    assert "2 of 2 agree" in capsys.readouterr().out
    off = right["agnostic"] + (1 if right["agnostic"] < NUM_MASKS else -1)
    assert validate(*words, "--expect", f"shapes/any={off}/{NUM_MASKS}") == 1
    assert "1 of 2 agree" in capsys.readouterr().out
    assert (tmp_path / "scores.json").is_file()
    assert validate(*words, "--expect", f"shapes/any={off}/{NUM_MASKS}", "--expect-within", "5") == 0
    assert validate(*words, "--expect", f"shapes/any={right['agnostic']}/{NUM_MASKS + 1}") == 1
    assert "other masks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--expect", "shapes"], "--expect shapes: give DATASET=RIGHT/MASKS"),
        (["--expect", "coco=1/2"], "'coco' is not validated; shapes is"),
        (["--expect", "shapes/coco=1/2"], "shapes is validated in shapes and agnostic, not in 'coco'"),
        (["--expect", "shapes=1/2", "--model.named_modes", "[agnostic]"], "validated in agnostic, not in 'shapes'"),
        (["--expect", "released"], "--expect released has figures of a847"),
        (["--expect", "shapes=1/2", "--expect-within", "-1"], "--expect-within is -1"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_built(
    words: list[str],
    reason: str,
    shapes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("osm_lightning.cli.OSMCLI.instantiate_classes", lambda *_: pytest.fail("it was built"))
    assert validate("--run", tmp_path / "run", *settings(shapes), *words) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1, said
    assert not (tmp_path / "run").exists()


def test_two_processes_compare_what_both_have_counted(counted: dict[str, dict], shapes: Path, tmp_path: Path) -> None:
    right = counted["shapes"]["num_right"]
    words = ["--run", tmp_path, *settings(shapes), "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    for expected, code in ((right, 0), (right + 1, 1)):
        done = run_osm("validate", *words, "--expect", f"shapes={expected}/{NUM_MASKS}")
        assert done.returncode == code, done.stderr
        assert done.stdout.count(" agree: as many masks") == 1, "once, and not once per process"
