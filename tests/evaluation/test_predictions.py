"""Names on disk: what stands in the files, that a run which fails makes none, and that memory does not grow."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from osm_lightning.batch import Answer, NamedMask
from osm_lightning.evaluation.prediction_journal import PredictionJournal
from osm_lightning.evaluation.predictions import publish, write_image
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


IMAGES = {
    "b": (record("b", as_map=True), [named("b", "x", "zebra", "horse"), named("b", "7", "tin\u2028can", "cup")]),
    "a": (record("a", as_map=False), [named("a", "7", "dog", "dog"), named("a", "x", "zebra", "horse")]),
}
PLAN = {"modes": "agnostic,coco"}


def write(out: Path, *ranks: str, **settings: bool) -> int:
    """Names images on as many ranks as there are texts of keys, and makes the files.

    Returns:
        How many images are named now.
    """
    journal = PredictionJournal(out)
    beginning = journal.begin(PLAN)
    for rank, keys in enumerate(ranks):
        part = journal.join(beginning, rank)
        for key in keys:
            write_image(part, *IMAGES[key])
            part.commit()
        part.close()
    num_named = publish(journal, list(IMAGES), **settings)
    journal.close()
    return num_named


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_lines(tmp_path: Path) -> None:
    write(tmp_path / "out", "ba")
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


def test_scores_are_of_the_name_and_its_end_or_of_the_name_alone(tmp_path: Path) -> None:
    scores = {}
    for score_eos in (True, False):
        write(tmp_path / "out", "ba", score_eos=score_eos)
        coco = json.loads((tmp_path / "out/predictions.coco.json").read_text())
        scores[score_eos] = coco["annotations"][0]["score"]
    assert scores == {True: pytest.approx(math.exp(-0.5)), False: pytest.approx(math.exp(-0.25))}


def test_coco_json_is_read_by_pycocotools(tmp_path: Path) -> None:
    write(tmp_path / "out", "ba")
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
    write(tmp_path / "out", "ba")
    assert sorted(path.name for path in (tmp_path / "out/overlay").iterdir()) == ["a.png", "b.png"]
    picture = np.asarray(Image.open(tmp_path / "out/overlay/a.png"))
    assert picture.shape == (HEIGHT, WIDTH, 3)
    assert (picture[LEFT] != 90).any(axis=-1).all()
    assert (picture[0, 0] == 90).all()


@pytest.mark.parametrize("ranks", [("b", "a"), ("a", "b"), ("", "ab"), ("ba", "a")])
def test_any_ranks_write_the_same_bytes_and_nothing_else(tmp_path: Path, ranks: tuple[str, ...]) -> None:
    """The last ones name an image twice, as where a rank's share is filled up."""
    write(tmp_path / "one", "ba")
    write(tmp_path / "ranks", *ranks)
    write(tmp_path / "ranks", *ranks)  # in the place of an earlier run's
    assert files(tmp_path / "ranks") == files(tmp_path / "one")
    assert sorted(files(tmp_path / "one")) == [
        "overlay/a.png",
        "overlay/b.png",
        "predictions.coco.json",
        "predictions.jsonl",
    ]


def test_part_of_the_images_makes_no_files(tmp_path: Path) -> None:
    write(tmp_path / "one", "ba")
    assert write(tmp_path / "parts", "", "a") == 1
    assert list((tmp_path / "parts").iterdir()) == [tmp_path / "parts/.predictions"]
    assert write(tmp_path / "parts", "b") == 2
    assert files(tmp_path / "parts") == files(tmp_path / "one")


def test_files_of_an_earlier_run_stay_until_all_is_named(tmp_path: Path) -> None:
    write(tmp_path, "ba")
    before = files(tmp_path)
    write(tmp_path, "a")
    assert before.items() <= files(tmp_path).items()


@pytest.mark.parametrize("replaced", range(4))
def test_files_are_made_again_when_that_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: int
) -> None:
    """Two pictures and two files take their places; stopped before each."""
    write(tmp_path / "one", "ba")
    replace_file = Path.replace

    def stop(self: Path, target: Path) -> Path:
        if target.name != "plan.json" and not left.pop():
            raise KeyboardInterrupt
        return replace_file(self, target)

    left = [0, *[1] * replaced]
    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "two", "ba")
    monkeypatch.undo()
    assert not (tmp_path / "two/predictions.jsonl").exists()
    assert write(tmp_path / "two", "") == 2
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_image_that_cannot_be_drawn(tmp_path: Path) -> None:
    broken = replace(record("c", as_map=False), image_bytes=b"no image")
    journal = PredictionJournal(tmp_path / "out")
    part = journal.join(journal.begin(PLAN), 0)
    with pytest.raises(ValueError, match="image c cannot be decoded"):
        write_image(part, broken, [named("c", "7", "cat", "cat")])
    part.close()
    journal.close()
    assert not (tmp_path / "out").exists()


def test_probability_that_is_no_number(tmp_path: Path) -> None:
    journal = PredictionJournal(tmp_path / "out")
    part = journal.join(journal.begin(PLAN), 0)
    with pytest.raises(ValueError, match="image a, mask 7, mode agnostic: the log probability of 'dog' is nan"):
        write_image(part, record("a", as_map=False), [named("a", "7", "dog", "dog", logprob=float("nan"))])


MEMORY = """
import json, resource, sys
from pathlib import Path
from osm_lightning.evaluation.prediction_journal import PredictionJournal
from osm_lightning.evaluation.predictions import publish

num_images, num_masks, out = int(sys.argv[1]), 100, Path(sys.argv[2])
journal = PredictionJournal(out)
part = journal.join(journal.begin({}), 0)
answer = {"name": "zebra", "token_ids": [4, 5], "logprob": -0.5, "logprob_no_eos": -0.25}
mask = {"mask_id": "1", "bbox_xywh_px": [0, 0, 9, 9], "area_px": 81, "counts": "x" * 400, "names": {"agnostic": answer}}
for number in range(num_images):
    facts = {"key": f"{number:06}", "file_name": f"{number:06}.png", "width": 60, "height": 40}
    part.append({**facts, "masks": [mask] * num_masks})
part.commit()
part.close()
assert publish(journal, [f"{number:06}" for number in range(num_images)]) == num_images
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_what_is_named(tmp_path: Path) -> None:
    """The files of the larger run are 41 MB; as Python objects its masks were several times as much."""
    peaks_mb = []
    for num_images in (50, 500):
        command = [sys.executable, "-c", MEMORY, str(num_images), str(tmp_path / str(num_images))]
        peaks_mb.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    size_mb = sum(path.stat().st_size for path in (tmp_path / "500").glob("predictions*")) / 1e6
    assert size_mb > 40
    assert peaks_mb[1] - peaks_mb[0] < 10
