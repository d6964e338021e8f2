import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from coco_folder import LICENCE, SPLIT, CocoFolder, colours_of
from PIL import Image

from osm_lightning.commands.shards import main
from osm_lightning.record import box_of, decode
from osm_lightning.shard_index import read_index
from osm_lightning.shards.layouts import LAYOUTS as ALL_LAYOUTS
from osm_lightning.shards.panoptic import LAYOUTS, read_split
from osm_lightning.vocabulary import load_vocabulary

EXIF_ORIENTATION = 0x0112


@pytest.fixture
def folder(tmp_path):
    """Two images, the later id first; ids above 256 and 65536, nothing at the border, one crowd."""
    rng = np.random.default_rng(0)
    coco = CocoFolder(tmp_path / "coco")
    for image_id in (20, 7):
        colours = np.zeros((24, 31), int)
        for segment_id in (5, 300, 70_000, 16_777_215):
            colours[tuple(np.sort(rng.integers(1, 22, 40)).reshape(2, 20))] = segment_id
        coco.add(image_id, colours, crowd={300})
    return coco


def build(folder, out, *options):
    words = ["--src", str(folder.save().root), "--split", SPLIT, "--out", str(out), "--workers", "1"]
    return main(["build", "coco", *words, *options])


def read_back(out, split=SPLIT):
    shards = [str(out / shard.file) for shard in read_index(out).splits[split].shards]
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        yield decode(sample["__key__"], {k: v for k, v in sample.items() if not k.startswith("__")})


def assert_same_pixels(record, colours):
    """Every pixel belongs to the segment of its colour, and to no other."""
    segment_map = record.segment_map()
    ids = np.array([0, *(int(segment.id) for segment in record.segments)])
    np.testing.assert_array_equal(ids[segment_map], colours)
    for index, segment in enumerate(record.segments):
        mask = record.mask(index, segment_map)
        assert (segment.area_px, segment.bbox_xywh_px) == (mask.sum(), box_of(mask))


def test_round_trip_keeps_pixels_classes_and_bytes(folder, tmp_path):
    assert build(folder, tmp_path / "out") == 0
    records = list(read_back(tmp_path / "out"))
    assert [record.key for record in records] == ["000000000007", "000000000020"]
    for record, annotation in zip(records, folder.annotations[::-1], strict=True):
        assert_same_pixels(record, folder.colours[record.key])
        raw = [(str(s["id"]), s["category_id"], bool(s["iscrowd"])) for s in annotation["segments_info"]]
        assert [(s.id, s.class_id, s.iscrowd) for s in record.segments] == raw
        assert record.image_bytes == (folder.root / f"{SPLIT}/{record.key}.jpg").read_bytes()
        assert record.image().size == (31, 24)
    assert records[0].source == {
        "file_name": "000000000007.jpg",
        "image_id": 7,
        "licence": LICENCE["name"],
        "licence_url": LICENCE["url"],
        "coco_url": "u",
    }


def test_index_counts_masks_without_crowds(folder, tmp_path):
    build(folder, tmp_path / "out")
    split = read_index(tmp_path / "out").splits[SPLIT]
    raw = [s for a in folder.annotations for s in a["segments_info"] if not s["iscrowd"]]
    assert split.num_masks == len(raw) < sum(len(a["segments_info"]) for a in folder.annotations)
    assert split.masks_per_class == Counter(s["category_id"] for s in raw)


def test_more_than_255_segments(tmp_path):
    colours = (1000 + np.arange(300)).repeat(4).reshape(30, 40)
    (record,) = CocoFolder(tmp_path).add(1, colours).read().records()
    assert len(record.segments) == 300
    assert_same_pixels(record, colours)


def test_segment_maps_may_lie_in_annotations(folder):
    (folder.root / f"panoptic_{SPLIT}").rename(folder.root / f"annotations/panoptic_{SPLIT}")
    assert len(list(folder.read().records())) == 2


def test_pixels_win_over_the_json_and_differences_are_counted(folder):
    folder.annotations[0]["segments_info"][0]["area"] += 1
    folder.annotations[1]["segments_info"][1]["bbox"] = [0, 0, 1, 1]
    split = folder.read()
    for record in split.records():
        assert_same_pixels(record, folder.colours[record.key])
    assert split.notes.counts["segments whose area or box differs from the JSON, measured anew"] == 2
    assert split.notes.counts["crowd segments, kept but not counted as masks"] == 2


def test_segments_without_pixels_are_left_out_and_counted(folder):
    empty = {"id": 99, "category_id": 1, "iscrowd": 0, "bbox": [0, 0, 0, 0], "area": 0}
    folder.annotations[0]["segments_info"].insert(1, empty)
    split = folder.read()
    for record in split.records():
        assert "99" not in {segment.id for segment in record.segments}
        assert_same_pixels(record, folder.colours[record.key])
    assert "segments without pixels, left out: 1 (99 in 000000000020.png)" in split.notes.lines()


def test_images_without_annotation_are_left_out_and_counted(folder):
    del folder.annotations[0]
    split = folder.read()
    assert [record.key for record in split.records()] == ["000000000007"]
    assert split.notes.counts["images without annotation, left out"] == 1


@pytest.mark.parametrize("annotated", ["upright", "as stored"])
def test_masks_lie_on_the_upright_image(tmp_path, annotated):
    stored = np.zeros((40, 64), np.uint8)
    stored[0:8, 16:40] = stored[8:24, 16:24] = 255
    upright = np.rot90(stored, -1)
    coco = CocoFolder(tmp_path).add(1, np.where((upright if annotated == "upright" else stored) > 0, 300, 5))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    Image.fromarray(stored).save(tmp_path / f"{SPLIT}/000000000001.jpg", exif=exif, quality=95)
    (record,) = coco.read().records()
    assert_same_pixels(record, np.where(upright > 0, 300, 5))
    np.testing.assert_array_equal(record.mask(0), np.asarray(record.image().convert("L")) > 127)


JPG, PNG = f"{SPLIT}/000000000020.jpg", f"panoptic_{SPLIT}/000000000020.png"


def first_segments(coco):
    return coco.annotations[0]["segments_info"]


@pytest.mark.parametrize(
    ("bend", "message"),
    [
        (
            lambda c: c.images[0].update(file_name="../20.jpg"),
            "file names that lead out of their folder: 1 ('../20.jpg')",
        ),
        (lambda c: c.annotations[0].update(file_name="/etc/passwd"), "lead out of their folder: 1 ('/etc/passwd')"),
        (lambda c: (c.root / JPG).unlink(), "missing files: 1 ("),
        (lambda c: (c.root / PNG).unlink(), "missing files: 1 ("),
        (lambda c: c.images.append(c.images[0]), "image ids that stand twice: 1 (20)"),
        (lambda c: c.annotations.append(c.annotations[0]), "images annotated twice: 1 (20)"),
        (lambda c: c.annotations[0].update(image_id=8), "annotations of images that the JSON does not list: 1 (8)"),
        (lambda c: first_segments(c)[0].update(category_id=12), "vocabulary coco lacks: 1 (12 in image 20)"),
        (lambda c: first_segments(c)[0].update(id=256**3), "segment ids that are no colour: 1 (16777216 in image 20)"),
        (lambda c: first_segments(c).append(first_segments(c)[0]), "segment ids that stand twice: 1 (20)"),
        (lambda c: first_segments(c).pop(0), "ids that the JSON lacks: 1 (000000000020.png: [16777215])"),
        (lambda c: Image.new("RGB", (9, 24)).save(c.root / JPG), "1 (000000000020.png: 31 x 24 px, not 9 x 24)"),
        (lambda c: Image.new("L", (31, 24)).save(c.root / PNG), "is a PNG of mode L, not RGB"),
        (lambda c: os.truncate(c.root / PNG, 90), "pictures that can't be read: 1 ("),
        (lambda c: (c.root / JPG).write_text("<html>not found</html>"), "pictures that can't be read: 1 ("),
    ],
)
def test_a_broken_source_is_named_and_nothing_is_written(folder, tmp_path, bend, message):
    bend(folder)
    with pytest.raises(ValueError, match=re.escape(message)):
        build(folder, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_all_problems_are_gathered_with_five_examples_each(tmp_path):
    coco = CocoFolder(tmp_path)
    for image_id in range(1, 8):
        coco.add(image_id, np.full((4, 4), 9))
        (coco.root / f"{SPLIT}/{image_id:012}.jpg").unlink()
    first_segments(coco)[0].update(category_id=12)
    with pytest.raises(ValueError, match=r"7 of 7 images cannot be converted(.|\n)*missing files: 7 \(") as caught:
        build(coco, tmp_path / "out")
    assert str(caught.value).count(".jpg") == 5
    assert "classes that vocabulary coco lacks: 1" in str(caught.value)


NO_ID = b'{"images": [{"id": null}], "annotations": []}'
MIXED = b'{"images": [{"id": 1}, {"id": "1"}], "annotations": [{"image_id": 1}, {"image_id": "1"}]}'


@pytest.mark.parametrize(
    "content", [b"[]", b"{}", b"{", b'{"images": [{"id": null}], "annotations": []}', MIXED, b"\xff"]
)
def test_json_of_another_format_is_refused(folder, content):
    folder.save()
    (folder.root / f"annotations/panoptic_{SPLIT}.json").write_bytes(content)
    with pytest.raises(ValueError, match="not in COCO's panoptic format"):
        read_split(LAYOUTS["coco"], folder.root, SPLIT, load_vocabulary("coco"))


def test_a_wrong_folder_is_told_what_it_lacks(folder, tmp_path):
    words = ["--src", str(folder.save().root), "--split", "train2017", "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="does not hold split train2017 of coco") as caught:
        main(["build", "coco", *words])
    lacking = str(caught.value).splitlines()[2:-1]
    assert [line.split(" (")[0].strip() for line in lacking] == [
        "annotations/panoptic_train2017.json",
        "annotations/panoptic_train2017 or panoptic_train2017",
        "train2017",
    ]
    assert "(panoptic_annotations_trainval2017.zip)" in lacking[0]
    with pytest.raises(ValueError, match=r"lacks .*panoptic_train2017\.json and .*train2017"):
        read_split(LAYOUTS["coco"], folder.root, "train2017", load_vocabulary("coco"))


def test_images_that_the_tables_make_unusable_are_not_among_the_images(folder):
    (folder.root / JPG).unlink()
    first_segments(folder)[0].update(category_id=12)
    split = folder.read()
    assert [image.key for image in split.images] == ["000000000007"]
    assert (split.num_unusable, split.errors.counts.total()) == (1, 2)
    with pytest.raises(ValueError, match="missing files: 1"):
        next(split.records())


# Others' layouts of the same format


def write_other(root, json_path, map_path, image_path, image, annotation, colours):
    """One image of another dataset: where its files lie, its rows in the JSON, and int[H, W] of segment ids."""
    for path in (json_path, map_path, image_path):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / json_path).write_text(json.dumps({"images": [image], "annotations": [annotation], "categories": []}))
    rgb = np.stack([colours % 256, colours // 256 % 256, colours // 65536], axis=-1).astype(np.uint8)
    Image.fromarray(rgb).save(root / map_path)
    Image.fromarray(rgb[..., ::-1]).save(root / image_path)


def row(segment_id, class_id, **more):
    return {"id": segment_id, "category_id": class_id, "area": 1, "bbox": [0, 0, 1, 1], "iscrowd": 0, **more}


def build_other(dataset, root, out):
    words = ["--src", str(root), "--split", "val", "--out", str(out), "--workers", "1"]
    assert main(["build", dataset, *words]) == 0
    return list(read_back(out, "val"))


def test_cityscapes_as_its_scripts_prepare_it(tmp_path):
    """Ids are texts, the JSON's file names are those of no file, and ids below 1000 are stuff or groups."""
    stem = "frankfurt_000000_000294"
    colours = np.zeros((8, 12), int)
    colours[:4], colours[4:6], colours[6:, :6] = 7, 26, 26_001
    write_other(
        tmp_path / "raw",
        "gtFine/cityscapes_panoptic_val.json",
        f"gtFine/cityscapes_panoptic_val/{stem}_gtFine_panoptic.png",
        f"leftImg8bit/val/frankfurt/{stem}_leftImg8bit.png",
        {"id": stem, "file_name": f"{stem}_gtFine_leftImg8bit.png", "width": 12, "height": 8},
        {
            "image_id": stem,
            "file_name": f"{stem}_gtFine_panoptic.png",
            "segments_info": [row(7, 7), row(26, 26, iscrowd=1), row(26_001, 26)],
        },
        colours,
    )
    (record,) = build_other("cityscapes", tmp_path / "raw", tmp_path / "out")
    assert record.key == f"{stem}_leftImg8bit"
    assert record.source == {"file_name": f"{stem}_leftImg8bit.png", "image_id": stem}
    assert [(s.id, s.class_id, s.iscrowd) for s in record.segments] == [
        ("7", 7, False),
        ("26", 26, True),
        ("26001", 26, False),
    ]
    assert_same_pixels(record, colours)


ROAD_AND_SKYSCRAPER = 140 + 140 * 256 + 140 * 65536


def test_ade20k_as_mask2former_prepares_it(tmp_path, capsys):
    """Ids are texts; road (6) and skyscraper (48) have one colour, so that no pixel says which of them it is."""
    colours = np.full((8, 12), 120 + 120 * 256 + 120 * 65536)
    colours[2:], colours[5:, 3:] = ROAD_AND_SKYSCRAPER, 150 + 5 * 256 + 61 * 65536
    wall, person = int(colours[0, 0]), int(colours[7, 11])
    write_other(
        tmp_path / "raw",
        "ade20k_panoptic_val.json",
        "ade20k_panoptic_val/ADE_val_00000001.png",
        "images/validation/ADE_val_00000001.jpg",
        {"id": "ADE_val_00000001", "file_name": "ADE_val_00000001.jpg", "width": 12, "height": 8},
        {
            "image_id": "ADE_val_00000001",
            "file_name": "ADE_val_00000001.png",
            "segments_info": [
                row(wall, 0),
                row(ROAD_AND_SKYSCRAPER, 6),
                row(ROAD_AND_SKYSCRAPER, 48),
                row(person, 12),
            ],
        },
        colours,
    )
    (record,) = build_other("ade20k", tmp_path / "raw", tmp_path / "out")
    assert record.key == "ADE_val_00000001"
    assert [segment.class_id for segment in record.segments] == [0, 12]
    assert_same_pixels(record, np.where(colours == ROAD_AND_SKYSCRAPER, 0, colours))
    assert f"share their id, left out: 2 ({ROAD_AND_SKYSCRAPER} in image ADE_val_00000001" in capsys.readouterr().out


def test_an_id_does_not_lead_out_of_the_folder_of_images(tmp_path):
    write_other(
        tmp_path,
        "gtFine/cityscapes_panoptic_val.json",
        "gtFine/cityscapes_panoptic_val/a.png",
        "leftImg8bit/val/a/a_leftImg8bit.png",
        {"id": "../a", "file_name": "a.png"},
        {"image_id": "../a", "file_name": "a.png", "segments_info": []},
        np.zeros((2, 2), int),
    )
    split = read_split(LAYOUTS["cityscapes"], tmp_path, "val", load_vocabulary("cityscapes"))
    assert split.errors.counts == {"file names that lead out of their folder": 1}


# The command


def test_summary_says_what_was_written_and_left_out(folder, tmp_path, capsys):
    del folder.annotations[0]
    build(folder, tmp_path / "out")
    printed = capsys.readouterr().out
    assert re.search(r"│ 1 +│ 3 +│ 2 of 133 │ 1 +│ [0-9.]+ │ [0-9.]+ +│ [0-9.]+ ", printed)
    assert "images without annotation, left out: 1 (20)" in printed
    with pytest.raises(ValueError, match="already has a split"):
        build(folder, tmp_path / "out")
    assert build(folder, tmp_path / "out", "--overwrite") == 0


def test_help_has_an_example_and_does_not_wait_for_torch():
    code = (
        "import sys; from osm_lightning.commands.shards import main\n"
        "try: main(['build', '--help'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "osm shards build coco --src" in done.stdout
    for dataset, layouts in ALL_LAYOUTS.items():
        assert f"\n{dataset}\n" in done.stdout
        assert all(layout.title in done.stdout for layout in layouts)
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_lvis_val_images_are_left_out(folder, tmp_path, capsys):
    (tmp_path / "lvis.json").write_text(json.dumps({"images": [{"id": 20}, {"id": 99}]}))
    build(folder, tmp_path / "out", "--exclude-lvis-val", str(tmp_path / "lvis.json"))
    assert [record.key for record in read_back(tmp_path / "out")] == ["000000000007"]
    assert "images of lvis.json, left out: 1 (000000000020)" in capsys.readouterr().out
    (tmp_path / "lvis.json").write_text(json.dumps({"images": [{"id": 99}]}))
    build(folder, tmp_path / "out2", "--exclude-lvis-val", str(tmp_path / "lvis.json"))
    assert "had no effect" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", '{"images": [1]}'])
def test_another_file_than_lvis_is_refused(folder, tmp_path, content):
    (tmp_path / "lvis.json").write_text(content)
    with pytest.raises(ValueError, match=r"lvis\.json has no list of images"):
        build(folder, tmp_path / "out", "--exclude-lvis-val", str(tmp_path / "lvis.json"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: COMMAND"),
        (["imagenet"], "invalid choice: 'imagenet'"),
    ],
)
def test_what_is_no_subcommand(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_source_is_asked_for():
    with pytest.raises(ValueError, match="--src is missing: it is the folder of coco"):
        main(["build", "coco", "--split", SPLIT])


@pytest.mark.skipif("OSM_SHARED_DATA" not in os.environ, reason="OSM_SHARED_DATA is not set: no real COCO images")
def test_round_trip_of_real_images(tmp_path):
    src = Path(os.environ["OSM_SHARED_DATA"]) / "coco_mini"
    main(["build", "coco", "--src", str(src), "--split", SPLIT, "--out", str(tmp_path), "--workers", "1"])
    records = list(read_back(tmp_path))
    assert len(records) == 50
    assert sum(len(record.segments) for record in records) == 544
    for record in records:
        assert_same_pixels(record, colours_of(src / f"panoptic_{SPLIT}/{record.key}.png"))
        assert record.image_bytes == (src / f"{SPLIT}/{record.key}.jpg").read_bytes()
        assert record.image().size == (record.width_px, record.height_px)
