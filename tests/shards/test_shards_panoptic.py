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
from PIL import Image

from osm_lightning.commands.shards import main
from osm_lightning.record import box_of, decode
from osm_lightning.shard_index import read_index
from osm_lightning.shards.panoptic import LAYOUTS, read_split
from osm_lightning.vocabulary import load_vocabulary

SPLIT = "val2017"
EXIF_ORIENTATION = 0x0112
LICENCE = {"id": 4, "name": "Attribution License", "url": "http://creativecommons.org/licenses/by/2.0/"}


def colours_of(png_path):
    rgb = np.asarray(Image.open(png_path)).astype(int)
    return rgb[..., 0] + rgb[..., 1] * 256 + rgb[..., 2] * 65536


class CocoFolder:
    """A small folder in COCO's panoptic layout, written by `save` and bent by the tests before."""

    def __init__(self, root):
        self.root = root
        self.images, self.annotations, self.colours = [], [], {}

    def add(self, image_id, colours, crowd=()):
        """Adds an image whose segment ids are int[H, W]; the JSON is true to them."""
        name = f"{image_id:012}"
        height, width = colours.shape
        for folder in ("annotations", f"panoptic_{SPLIT}", SPLIT):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        rgb = np.stack([colours % 256, colours // 256 % 256, colours // 65536], axis=-1).astype(np.uint8)
        Image.fromarray(rgb).save(self.root / f"panoptic_{SPLIT}/{name}.png")
        pixels = np.random.default_rng(image_id).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(self.root / f"{SPLIT}/{name}.jpg")
        self.images.append(
            {
                "id": image_id,
                "file_name": f"{name}.jpg",
                "height": height,
                "width": width,
                "license": 4,
                "coco_url": "u",
            }
        )
        segments = [
            {
                "id": int(segment_id),
                "category_id": 1 + index % 3,
                "iscrowd": int(segment_id in crowd),
                "area": int((colours == segment_id).sum()),
                "bbox": box_of(colours == segment_id),
            }
            for index, segment_id in enumerate(s for s in np.unique(colours)[::-1] if s)
        ]
        self.annotations.append({"image_id": image_id, "file_name": f"{name}.png", "segments_info": segments})
        self.colours[name] = colours
        return self

    def save(self):
        content = {"images": self.images, "annotations": self.annotations, "licenses": [LICENCE]}
        (self.root / f"annotations/panoptic_{SPLIT}.json").write_text(json.dumps(content))
        return self

    def read(self):
        return read_split(LAYOUTS["coco"], self.save().root, SPLIT, load_vocabulary("coco"))


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
    return main(["build", "coco", "--src", str(folder.save().root), "--split", SPLIT, "--out", str(out), *options])


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
    with pytest.raises(ValueError, match=r"missing files: 7 \(") as caught:
        coco.read()
    assert str(caught.value).count(".jpg") == 5
    assert "classes that vocabulary coco lacks: 1" in str(caught.value)


@pytest.mark.parametrize("content", [b"[]", b"{}", b"{", b'{"images": [{"id": "1"}], "annotations": []}', b"\xff"])
def test_json_of_another_format_is_refused(folder, content):
    folder.save()
    (folder.root / f"annotations/panoptic_{SPLIT}.json").write_bytes(content)
    with pytest.raises(ValueError, match="not in COCO's panoptic format"):
        read_split(LAYOUTS["coco"], folder.root, SPLIT, load_vocabulary("coco"))


def test_a_wrong_folder_is_told_what_it_lacks(folder, tmp_path):
    with pytest.raises(ValueError, match=r"lacks .*panoptic_train2017\.json and .*train2017"):
        main(
            ["build", "coco", "--src", str(folder.save().root), "--split", "train2017", "--out", str(tmp_path / "out")]
        )


def test_summary_says_what_was_written_and_left_out(folder, tmp_path, capsys):
    del folder.annotations[0]
    build(folder, tmp_path / "out")
    printed = capsys.readouterr().out
    assert re.search(r"│ 1 +│ 3 +│ 2 of 133 │ 1 ", printed)
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


@pytest.mark.skipif("OSM_SHARED_DATA" not in os.environ, reason="OSM_SHARED_DATA is not set: no real COCO images")
def test_round_trip_of_real_images(tmp_path):
    src = Path(os.environ["OSM_SHARED_DATA"]) / "coco_mini"
    main(["build", "coco", "--src", str(src), "--split", SPLIT, "--out", str(tmp_path)])
    records = list(read_back(tmp_path))
    assert len(records) == 50
    assert sum(len(record.segments) for record in records) == 544
    for record in records:
        assert_same_pixels(record, colours_of(src / f"panoptic_{SPLIT}/{record.key}.png"))
        assert record.image_bytes == (src / f"{SPLIT}/{record.key}.jpg").read_bytes()
        assert record.image().size == (record.width_px, record.height_px)
