from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import pytest
import torch
import yaml

from osm_lightning.weights import checkpoint as checkpoints
from osm_lightning.weights.checkpoint import Checkpoint, find_checkpoint, read_checkpoint, write_folder

CONFIG = yaml.safe_dump({"trainer": {"devices": 8, "precision": "32"}, "model": {"modes": ["coco", "mine"]}})
CHECKPOINT = Checkpoint(
    tensors={"projection.weight": torch.arange(6.0).reshape(2, 3), "modes.query": torch.ones(3, 2)},
    config=CONFIG,
    frozen={"vision": "a" * 16, "language": "b" * 16},
)


def save(path: Path, **changes: object) -> Path:
    """A checkpoint as Lightning and the task write it, with other content where it is asked for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "state_dict": {f"osm.{name}": tensor for name, tensor in CHECKPOINT.tensors.items()},
        "osm": {"config": CHECKPOINT.config, "frozen": CHECKPOINT.frozen},
        "optimizer_states": [{}],
    }
    torch.save({**content, **changes}, path)
    return path


def assert_same(read: Checkpoint) -> None:
    assert read.tensors.keys() == CHECKPOINT.tensors.keys()
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in CHECKPOINT.tensors.items())
    assert (read.config, read.frozen) == (CHECKPOINT.config, CHECKPOINT.frozen)


def test_both_forms_hold_the_same(tmp_path: Path) -> None:
    assert_same(read_checkpoint(save(tmp_path / "run.ckpt")))
    write_folder(CHECKPOINT, tmp_path / "models" / "mine", "card")
    assert_same(read_checkpoint(tmp_path / "models" / "mine"))
    names = {path.name for path in (tmp_path / "models" / "mine").iterdir()}
    assert names == {"model.safetensors", "config.yaml", "frozen.json", "README.md"}
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["mine"]


def test_tensors_that_share_memory_can_be_written(tmp_path: Path) -> None:
    rows = torch.arange(8.0).reshape(4, 2)
    shared = Checkpoint({"a": rows[:2], "b": rows[1:], "c": rows.T}, CONFIG, {})
    write_folder(shared, tmp_path / "out", "card")
    read = read_checkpoint(tmp_path / "out").tensors
    assert all(torch.equal(read[name], tensor) for name, tensor in shared.tensors.items())


def test_modes_are_named_in_the_order_of_the_tables() -> None:
    assert CHECKPOINT.modes == ("agnostic", "coco", "mine")


@pytest.mark.parametrize("config", ["", "model: {}", "model: [", "- 1"])
def test_a_config_without_modes_is_an_error(config: str) -> None:
    with pytest.raises(ValueError, match=r"names no model\.modes"):
        _ = Checkpoint({}, config, {}).modes
    with pytest.raises(ValueError, match="is not a run's"):
        Checkpoint({}, config, {}).config_elsewhere()


def test_the_config_leaves_the_machine_behind() -> None:
    assert yaml.safe_load(CHECKPOINT.config_elsewhere()) == {
        "trainer": {"precision": "32"},
        "model": {"modes": ["coco", "mine"]},
    }


# Finding


def test_last_is_the_newest_of_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    old, new = (save(Path("runs") / run / "checkpoints" / "last.ckpt") for run in ("b-old", "a-new"))
    save(Path("runs") / "b-old" / "checkpoints" / "best.ckpt")
    os.utime(old, (time.time() - 100,) * 2)
    assert find_checkpoint("last") == new
    assert_same(read_checkpoint("last"))


def test_a_missing_checkpoint_is_answered_with_those_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"'nope\.ckpt' does not exist\. There are none under runs/ either"):
        read_checkpoint("nope.ckpt")
    for number in range(10):
        path = save(Path("runs") / f"{number}.ckpt")
        os.utime(path, (number, number))
    with pytest.raises(ValueError, match=r"runs/9\.ckpt, runs/8\.ckpt.*runs/2\.ckpt and 2 more\.$"):
        read_checkpoint("nope.ckpt")
    with pytest.raises(ValueError, match="'last' does not exist"):
        find_checkpoint("last")


# Foreign files


class Payload:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("packed", [True, False], ids=["torch.save", "pickle"])
def test_code_in_a_checkpoint_is_never_run(tmp_path: Path, packed: bool) -> None:
    path, trace = tmp_path / "evil.ckpt", tmp_path / "was-run"
    content = {"state_dict": {}, "osm": Payload(trace)}
    if packed:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"evil\.ckpt cannot be read: .*never run"):
        read_checkpoint(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Payload(trace)))
    assert trace.exists(), "the trap does not work, so that the test says nothing"


@pytest.mark.parametrize("kept", [0, 100, 0.5])
def test_a_cut_off_checkpoint_is_refused(tmp_path: Path, kept: float) -> None:
    path = save(tmp_path / "cut.ckpt")
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if kept < 1 else int(kept)])
    with pytest.raises(ValueError, match=r"cut\.ckpt cannot be read"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {}},
        {"osm": {"config": "", "frozen": {}}},
        {"osm": {"config": ""}, "state_dict": {}},
        {"osm": 5, "state_dict": {}},
        {"osm": {"config": "", "frozen": 5}, "state_dict": {}},
        {"osm": {"config": "", "frozen": {}}, "state_dict": 5},
        [1, 2],
        torch.zeros(3),
        None,
    ],
)
def test_another_programs_checkpoint_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt was not written by `osm fit`"):
        read_checkpoint(tmp_path / "other.ckpt")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", None),
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 40),
        ("config.yaml", None),
        ("config.yaml", b"\xff\xfe\x00"),
        ("frozen.json", None),
        ("frozen.json", b""),
        ("frozen.json", b"[1]"),
    ],
)
def test_an_incomplete_folder_is_refused(tmp_path: Path, name: str, content: bytes | None) -> None:
    folder = tmp_path / "mine"
    write_folder(CHECKPOINT, folder, "card")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"mine is no checkpoint .* It must hold model\.safetensors"):
        read_checkpoint(folder)


# Writing


def test_a_folder_that_exists_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out exists\. Remove it, or give another --out"):
        write_folder(CHECKPOINT, tmp_path / "out", "card")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_a_write_that_fails_leaves_no_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            write_folder(CHECKPOINT, tmp_path / "out", "card")
    assert not (tmp_path / "out").exists()
    write_folder(CHECKPOINT, tmp_path / "out", "card")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
