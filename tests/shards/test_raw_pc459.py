import io
import pickle
import struct

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from osm_lightning.record import box_of
from osm_lightning.shards.pascal_context import LISTS, MAX_MAT_BYTES, read
from osm_lightning.shards.source import Findings
from osm_lightning.vocabulary import load_vocabulary

VOCABULARY = load_vocabulary("pc459")
UNKNOWN = 431
"""In the files, which count from 1."""
MAIN = LISTS[-1]


def mat(**variables):
    out = io.BytesIO()
    savemat(out, variables, do_compression=True)
    return out.getvalue()


class Voc:
    """A small VOCdevkit/VOC2010."""

    def __init__(self, root):
        self.root = root

    def add(self, name, label_map, data=None):
        for path in (self.image_path(name), self.map_path(name)):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", label_map.shape[::-1]).save(self.image_path(name))
        self.map_path(name).write_bytes(mat(LabelMap=label_map) if data is None else data)

    def image_path(self, name):
        return self.root / f"JPEGImages/{name}.jpg"

    def map_path(self, name):
        return self.root / f"trainval/{name}.mat"

    def list(self, *names, split="val", template=MAIN):
        path = self.root / template.format(split=split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{name}\n" for name in names))

    def read(self, split="val"):
        return read(self.root, split, VOCABULARY)

    def complaint(self, data):
        """What stands against an image with this .mat."""
        self.add("2008_000002", np.ones((4, 5), np.uint16), data)
        self.list("2008_000002")
        errors = Findings()
        (image,) = self.read().images
        assert image.convert(errors, Findings()) is None
        (line,) = errors.lines()
        assert str(self.map_path("2008_000002")) in line or self.map_path("2008_000002").name in line
        return line


@pytest.fixture
def voc(tmp_path):
    return Voc(tmp_path / "VOC2010")


def random_map(seed):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 460, (7, 9))
    blocks.flat[:5] = (0, 1, 459, UNKNOWN, 432)
    return np.repeat(np.repeat(blocks, 3, 0), 4, 1).astype(np.uint16)


@pytest.mark.parametrize("template", LISTS)
@pytest.mark.parametrize("split", ["train", "training"])
def test_one_segment_for_each_class_as_prepared(voc, template, split):
    """As prepare_pascal_ctx_full_sem_seg.py numbers them: 1 is 0, 0 is no class; "unknown" is ignored besides."""
    maps = {f"2008_{seed:06}": random_map(seed) for seed in (2, 1, 3)}
    for name, label_map in maps.items():
        voc.add(name, label_map)
    voc.list("2008_000002", "2008_000001", split="train", template=template)
    records = list(voc.read(split).records())
    assert [record.key for record in records] == ["2008_000002", "2008_000001"]
    for record in records:
        prepared = maps[record.key].astype(int) - 1
        expected = [
            (str(class_id), class_id, (prepared == class_id).sum(), box_of(prepared == class_id))
            for class_id in range(459)
            if class_id != 430 and (prepared == class_id).any()
        ]
        assert [(s.id, s.class_id, s.area_px, s.bbox_xywh_px) for s in record.segments] == expected
        class_ids = np.array([-1, *(segment.class_id for segment in record.segments)])[record.segment_map()]
        np.testing.assert_array_equal(class_ids, np.where(prepared == 430, -1, prepared))


def test_image_is_small_and_picklable(voc):
    voc.add("2008_000002", random_map(0))
    voc.list("2008_000002")
    (image,) = voc.read().images
    assert len(pickle.dumps(image)) < 2000
    assert pickle.loads(pickle.dumps(image)).convert(Findings(), Findings()) == image.convert(Findings(), Findings())


def test_missing_partner_is_named(voc):
    for name in ("2008_000002", "2008_000003", "2008_000008"):
        voc.add(name, random_map(0))
    voc.list("2008_000002", "2008_000003", "2008_000008")
    voc.map_path("2008_000002").unlink()
    voc.image_path("2008_000008").unlink()
    split = voc.read()
    assert [image.key for image in split.images] == ["2008_000003"]
    assert split.num_unusable == 2
    missing = f"{voc.map_path('2008_000002')}, {voc.image_path('2008_000008')}"
    assert split.errors.lines() == [f"missing files: 2 ({missing})"]


def test_lists_and_folders_that_do_not_fit(voc):
    voc.add("2008_000002", random_map(0))
    with pytest.raises(ValueError, match="no list of split val"):
        voc.read()
    voc.list()
    with pytest.raises(ValueError, match="no images"):
        voc.read()
    voc.list("2008_000002", "2008_000002")
    with pytest.raises(ValueError, match="stand twice"):
        voc.read()
    voc.list("../../elsewhere")
    with pytest.raises(ValueError, match=r"names an image '\.\./\.\./elsewhere'"):
        voc.read()
    (voc.root / MAIN.format(split="val")).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is no list of images"):
        voc.read()
    voc.map_path("2008_000002").unlink()
    voc.map_path("2008_000002").parent.rmdir()
    with pytest.raises(ValueError, match=r"trainval \(trainval\.tar\.gz"):
        voc.read()


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"LabelMap": np.full((4, 5), 460, np.uint16)}, "class 460, but PASCAL-Context has 459"),
        ({"LabelMap": np.ones((5, 4), np.uint16)}, "4 x 5 px, not 5 x 4"),
        ({"LabelMap": np.ones((4, 5))}, "LabelMap is double 4 x 5, but must be uint16"),
        ({"LabelMap": np.ones((4, 5, 2), np.uint16)}, "LabelMap is uint16 4 x 5 x 2"),
        ({"LabelMap": np.ones((0, 5), np.uint16)}, "LabelMap is uint16 0 x 5"),
        ({"LabelMap": {"a": 1}}, "LabelMap is struct 1 x 1"),
        ({"Labels": np.ones((4, 5), np.uint16)}, "LabelMap is missing"),
    ],
)
def test_maps_that_do_not_fit(voc, variables, says):
    assert says in voc.complaint(mat(**variables))


def headed(version, body):
    return b"MATLAB MAT-file".ljust(124) + version + b"IM" + body


def test_map_that_is_stored_in_narrower_numbers(voc):
    """MATLAB may store the elements of a uint16 array as uint8 where they are small."""

    def element(kind, data):
        return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)

    label_map = np.arange(1, 21, dtype=np.uint16).reshape(4, 5)
    head = element(6, struct.pack("<II", 11, 0)) + element(5, struct.pack("<ii", 4, 5)) + element(1, b"LabelMap")
    data = headed(b"\x00\x01", element(14, head + element(2, label_map.astype(np.uint8).tobytes("F"))))
    voc.add("2008_000002", label_map, data)
    voc.list("2008_000002")
    (record,) = voc.read().records()
    np.testing.assert_array_equal(record.segment_map(), label_map)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no MATLAB file that can be read"),
        (b"nonsense" * 99, "no MATLAB file that can be read"),
        (headed(b"\x00\x01", b"\xff" * 300), "no MATLAB file that can be read"),
        (headed(b"\x00\x01", b"\x0e\0\0\0\xff\xff\xff\x7f" + b"\x01" * 300), "no MATLAB file that can be read"),
        (mat(LabelMap=random_map(0))[:-40], "no MATLAB file that can be read"),
        (headed(b"\x00\x02", b"\x89HDF\r\n\x1a\n" + bytes(500)), "version 7.3 (HDF5)"),
        (bytes(MAX_MAT_BYTES + 1), "1,000,001 bytes; maps of VOC's pictures stay below 1,000,000"),
    ],
)
def test_nonsense_is_named(voc, data, says):
    assert says in voc.complaint(data)


def test_huge_map_in_a_small_file_is_not_inflated(voc, monkeypatch):
    """A map of 6,000 x 6,000 px takes 70 kB in a .mat and 72 MB out of it; its head says so."""
    data = mat(LabelMap=np.zeros((1200, 1200), np.uint16))
    monkeypatch.setattr("osm_lightning.shards.pascal_context.MAX_IMAGE_PIXELS", 1_000_000)
    monkeypatch.setattr("scipy.io.loadmat", lambda *args, **kwargs: pytest.fail("inflated"))
    assert "LabelMap is uint16 1200 x 1200" in voc.complaint(data)
