"""Names on disk: what stands in the files, and that a run which fails leaves none."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from osm_lightning.batch import Answer, NamedMask
from osm_lightning.evaluation.predictions import PredictionWriter
from osm_lightning.record import Record, Segment, box_of, encode_segment_map
from osm_lightning.rle import encode_rle

HEIGHT, WIDTH = 40, 60
LEFT = np.zeros((HEIGHT, WIDTH), dtype=bool)
LEFT[5:20, 2:20] = True
RIGHT = np.zeros((HEIGHT, WIDTH), dtype=bool)
RIGHT[10:38, 30:58] = True


def record(key: str, as_map: bool) -> Record:
    image = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT), (90, 90, 90)).save(image, format="PNG")
    segments = tuple(
        Segment(mask_id, area_px=int(mask.sum()), bbox_xywh_px=box_of(mask), rle=None if as_map else encode_rle(mask))
        for mask_id, mask in (("7", LEFT), ("x", RIGHT))
    )
    segment_map = encode_segment_map(LEFT + np.uint16(2) * RIGHT) if as_map else None
    source = {"file_name": f"{key}.png"}
    return Record(key, image.getvalue(), "png", HEIGHT, WIDTH, segments, segment_map, source)


def named(key: str, mask_id: str, agnostic: str, coco: str, logprob: float = -0.5) -> NamedMask:
    answers = {"agnostic": Answer(agnostic, (4, 5), logprob, -0.25), "coco": Answer(coco, (6,), -2.0, -1.0)}
    return NamedMask(key, mask_id, answers)


def write(out: Path) -> None:
    with PredictionWriter(out) as writer:
        writer.write(
            record("b", as_map=True), [named("b", "x", "zebra", "horse"), named("b", "7", "tin\u2028can", "cup")]
        )
        writer.write(record("a", as_map=False), [named("a", "7", "dog", "dog"), named("a", "x", "zebra", "horse")])


def test_lines(tmp_path: Path) -> None:
    write(tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert [(line["image"], line["mask_id"]) for line in lines] == [
        ("b.png", "x"),
        ("b.png", "7"),
        ("a.png", "7"),
        ("a.png", "x"),
    ]
    assert lines[0] == {
        "image": "b.png",
        "mask_id": "x",
        "bbox_xywh_px": [30, 10, 28, 28],
        "area_px": 784,
        "names": {
            "agnostic": {"name": "zebra", "token_ids": [4, 5], "logprob": -0.5, "logprob_no_eos": -0.25},
            "coco": {"name": "horse", "token_ids": [6], "logprob": -2.0, "logprob_no_eos": -1.0},
        },
    }
    assert lines[1]["names"]["agnostic"]["name"] == "tin\u2028can"


def test_coco_json_is_read_by_pycocotools(tmp_path: Path) -> None:
    write(tmp_path / "out")
    coco = COCO(str(tmp_path / "out/predictions.coco.json"))
    assert {row["id"]: row["name"] for row in coco.cats.values()} == {1: "dog", 2: "tin\u2028can", 3: "zebra"}
    assert [(row["file_name"], row["width"], row["height"]) for row in coco.imgs.values()] == [
        ("b.png", WIDTH, HEIGHT),
        ("a.png", WIDTH, HEIGHT),
    ]
    annotations = list(coco.anns.values())
    assert [(row["image_id"], row["category_id"]) for row in annotations] == [(1, 3), (1, 2), (2, 1), (2, 3)]
    for row, mask in zip(annotations, (RIGHT, LEFT, LEFT, RIGHT), strict=True):
        np.testing.assert_array_equal(coco.annToMask(row), mask)
        assert (row["area"], row["bbox"], row["iscrowd"]) == (mask.sum(), list(box_of(mask)), 0)
        assert row["score"] == pytest.approx(math.exp(-0.5))
    assert annotations[0]["attributes"] == {"mask_id": "x", "name_agnostic": "zebra", "name_coco": "horse"}


def test_overlays_show_the_masks(tmp_path: Path) -> None:
    write(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out/overlay").iterdir()) == ["a.png", "b.png"]
    picture = np.asarray(Image.open(tmp_path / "out/overlay/a.png"))
    assert picture.shape == (HEIGHT, WIDTH, 3)
    assert (picture[LEFT] != 90).any(axis=-1).all()
    assert (picture[0, 0] == 90).all()


def test_two_runs_write_the_same_bytes_and_nothing_else(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name)
    write(tmp_path / "two")
    files = {
        name: {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("one", "two")
    }
    assert files["one"] == files["two"]
    assert sorted(map(str, files["one"])) == [
        "overlay/a.png",
        "overlay/b.png",
        "predictions.coco.json",
        "predictions.jsonl",
    ]


def test_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    def interrupted_run() -> None:
        with PredictionWriter(tmp_path / "out") as writer:
            writer.write(record("a", as_map=False), [named("a", "7", "dog", "dog")])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_run()
    assert not (tmp_path / "out").exists()


def test_failed_run_leaves_an_earlier_one_alone(tmp_path: Path) -> None:
    write(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    broken = record("c", as_map=False)
    broken = Record(broken.key, b"no image", "png", HEIGHT, WIDTH, broken.segments)

    def failing_run() -> None:
        with PredictionWriter(tmp_path) as writer:
            writer.write(record("a", as_map=False), [named("a", "7", "cat", "cat")])
            writer.write(broken, [named("c", "7", "cat", "cat")])

    with pytest.raises(ValueError, match="image c cannot be decoded"):
        failing_run()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.glob(".*"))


def test_probability_that_is_no_number(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="image a, mask 7, mode agnostic: the log probability of 'dog' is nan"),
        PredictionWriter(tmp_path / "out") as writer,
    ):
        writer.write(record("a", as_map=False), [named("a", "7", "dog", "dog", logprob=float("nan"))])


def test_output_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match=r"out: .*/out is no folder to write to"), PredictionWriter(tmp_path / "out"):
        pass
