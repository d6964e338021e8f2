import json
import os
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from osm_lightning.record import box_of
from osm_lightning.shards import ade20k_full
from osm_lightning.shards.ade20k_full import index_of_class, read
from osm_lightning.shards.source import Findings
from osm_lightning.vocabulary import load_vocabulary

VOCABULARY = load_vocabulary("a847")
WINDOW = 3050
"""An index in the full list that A-847 leaves out."""
SOME_CLASSES = {2978: 0, 312: 1, 401: 14, 3148: 846, 10: 210, 1831: 11}
"""From index in the full list to class, out of prepare_ade20k_full_sem_seg.py: wall, building, car, adding machine, air
conditioner, person."""


def code(indices, blue=0):
    """uint8[H, W, 3] of a `_seg.png`."""
    indices = np.asarray(indices)
    return np.stack([indices // 256 * 10, indices % 256, np.broadcast_to(blue, indices.shape)], -1).astype(np.uint8)


class FullAde:
    """A small ADE20K_2021_17_01."""

    def __init__(self, root):
        self.root = root

    def stem(self, name, scene, folder):
        return self.root / "images/ADE" / folder / scene / name

    def add(self, name, indices, *, scene="urban/street", folder="validation"):
        stem = self.stem(name, scene, folder)
        stem.mkdir(parents=True)  # the folder of objects' masks, which is not walked
        for file in (f"instance_000_{name}.png", f"{name}.jpg"):
            Image.new("L", (2, 2)).save(stem / file)
        indices = np.asarray(indices)
        Image.new("RGB", indices.shape[::-1]).save(f"{stem}.jpg")
        blue = np.random.default_rng(0).integers(0, 256, indices.shape)
        Image.fromarray(code(indices, blue)).save(f"{stem}_seg.png")
        for ending in ("_parts_1.png", ".json"):
            stem.with_name(name + ending).write_text("not opened")
        return stem

    def index(self, names):
        (self.root / "index_ade20k.pkl").write_bytes(pickle.dumps({"objectnames": names, "counts": np.eye(3)}, 4))

    def read(self, split="val"):
        return read(self.root, split, VOCABULARY)

    def complaint(self):
        """What stands against the only image."""
        errors = Findings()
        (image,) = self.read().images
        assert image.convert(errors, Findings()) is None
        (line,) = errors.lines()
        return line


@pytest.fixture
def ade(tmp_path):
    return FullAde(tmp_path / "ADE20K_2021_17_01")


def full_list():
    """A name for each index of the full list, as ADE20K writes them; the first index is 1."""
    names = [f"nothing {index}" for index in range(1, 3689)]
    for class_id, index in index_of_class().items():
        names[index - 1] = ", ".join(VOCABULARY.by_id[class_id].names).title()
    return names


def test_indices_are_those_of_the_common_script():
    assert {index_of_class()[class_id]: class_id for class_id in SOME_CLASSES.values()} == SOME_CLASSES
    assert sorted(index_of_class()) == [entry.id for entry in VOCABULARY] == list(range(847))
    assert len(set(index_of_class().values())) == 847
    assert WINDOW not in index_of_class().values()


@pytest.mark.parametrize("split", ["train", "training"])
def test_one_segment_for_each_class(ade, split):
    rng = np.random.default_rng(0)
    choice = [0, WINDOW, *index_of_class().values()]
    maps = {}
    scenes = {"ADE_train_00000002": "a", "ADE_frame_00000001": "urban/street", "ADE_train_00000001": "b/c"}
    for name, scene in scenes.items():
        indices = np.repeat(np.repeat(rng.choice(choice, (6, 7)), 3, 0), 4, 1)
        indices[0, :4] = (0, WINDOW, 2978, 3148)
        maps[name] = indices
        ade.add(name, indices, scene=scene, folder="training")
    records = list(ade.read(split).records())
    assert [record.key for record in records] == sorted(maps)
    for record in records:
        indices = maps[record.key]
        expected = [
            (str(class_id), class_id, (indices == index).sum(), box_of(indices == index))
            for class_id, index in index_of_class().items()
            if (indices == index).any()
        ]
        assert [(s.id, s.class_id, s.area_px, s.bbox_xywh_px) for s in record.segments] == expected
        class_ids = [-1, *(segment.class_id for segment in record.segments)]
        naive = np.full(indices.shape, -1)
        for y, x in np.ndindex(naive.shape):
            for class_id, index in index_of_class().items():
                if indices[y, x] == index:
                    naive[y, x] = class_id
        np.testing.assert_array_equal(np.array(class_ids)[record.segment_map()], naive)


def test_real_maps_say_what_their_json_says(ade, shared_data):
    """The JSONs name the classes: each segment is a class of an object there, and names are the vocabulary's."""
    sample = shared_data / "ade_samples/full"
    folder = ade.root / "images/ADE/training/urban/street"
    folder.mkdir(parents=True)
    for path in sample.iterdir():
        shutil.copy(path, folder)
    class_of_index = {index: class_id for class_id, index in index_of_class().items()}
    records = {record.key: record for record in ade.read("train").records()}
    assert sorted(records) == [f"ADE_train_000{number}" for number in (16869, 16900, 16964)]
    for key, record in records.items():
        objects = json.loads((sample / f"{key}.json").read_bytes().decode("latin-1"))["annotation"]["object"]
        indexed = {entry["name_ndx"]: entry["name"] for entry in objects}
        names = {class_of_index[index]: name for index, name in indexed.items() if index in class_of_index}
        assert len(record.segments) >= 10
        assert {segment.class_id for segment in record.segments} <= names.keys()
        for class_id, name in names.items():
            assert not set(name.split(", ")).isdisjoint(VOCABULARY.by_id[class_id].names), name
        seg = np.asarray(Image.open(sample / f"{key}_seg.png")).astype(int)
        by_class = np.array([0, *(index_of_class()[segment.class_id] for segment in record.segments)])
        indices = seg[..., 0] // 10 * 256 + seg[..., 1]
        wanted = np.where(np.isin(indices, list(class_of_index)), indices, 0)
        np.testing.assert_array_equal(by_class[record.segment_map()], wanted)


def test_names_of_the_index_are_compared(ade):
    ade.add("ADE_val_00000001", [[2978]])
    for names in (full_list(), np.array(full_list()), np.array(full_list(), dtype=object)):
        ade.index(names)
        assert not ade.read().notes.counts
    other = full_list()
    other[2978 - 1] = "fence, fencing"
    ade.index(other)
    (line,) = ade.read().notes.lines()
    assert line == "classes that ADE20K calls by other names: 1 (2978 is 'fence, fencing', here 'wall')"


@pytest.mark.parametrize("names", [["nothing", *full_list()], full_list()[:100], [7] * 3688])
def test_another_numbering_is_refused(ade, names):
    ade.add("ADE_val_00000001", [[2978]])
    ade.index(names)
    with pytest.raises(ValueError, match="numbers its classes otherwise"):
        ade.read()


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_without_an_index_that_can_be_trusted_the_vocabulary_counts(ade, tmp_path, monkeypatch):
    """Also a hostile one: it is refused with what it wanted, and nothing of it runs."""
    ade.add("ADE_val_00000001", [[2978]])
    kind = "class numbers not compared with the download's own"
    path = ade.root / "index_ade20k.pkl"

    def note():
        split = ade.read()
        assert len(list(split.records())) == 1
        (line,) = split.notes.lines()
        assert line.startswith(kind)
        return line

    assert f"{path} is not there" in note()
    path.write_bytes(pickle.dumps({"objectnames": Touch(tmp_path / "touched")}))
    assert "it asks for posix.system" in note()
    assert not (tmp_path / "touched").exists()
    path.write_bytes(pickle.dumps(["wall"]))
    assert "has no list objectnames" in note()
    ade.index(np.eye(3))
    assert "no array of texts" in note()
    monkeypatch.setattr(ade20k_full, "MAX_INDEX_BYTES", 10)
    assert "must have 1 to 10" in note()


def test_image_is_small_and_picklable(ade):
    ade.add("ADE_val_00000001", [[2978, 401]])
    (image,) = ade.read().images
    assert len(pickle.dumps(image)) < 2000
    assert pickle.loads(pickle.dumps(image)).convert(Findings(), Findings()) == image.convert(Findings(), Findings())


@pytest.mark.parametrize("ending", [".jpg", "_seg.png"])
def test_missing_partner_is_named(ade, ending):
    for number in (1, 2):
        stem = ade.add(f"ADE_val_{number:08}", [[2978]])
    path = stem.with_name(stem.name + ending)
    path.unlink()
    split = ade.read()
    assert [image.key for image in split.images] == ["ADE_val_00000001"]
    assert (split.num_unusable, split.errors.lines()) == (1, [f"missing files: 1 ({path})"])


def test_folders_that_do_not_fit(ade):
    stem = ade.add("ADE_val_00000001", [[2978]])
    with pytest.raises(ValueError, match="images/ADE/training"):
        ade.read("train")
    ade.add("ADE_val_00000001", [[2978]], scene="another")
    with pytest.raises(ValueError, match="stand twice"):
        ade.read()
    shutil.rmtree(ade.root / "images/ADE/validation")
    stem.mkdir(parents=True)
    with pytest.raises(ValueError, match="no images"):
        ade.read()


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.ones((2, 3), np.uint8), "is a PNG 8-bit grey, but the dataset's maps are 8-bit RGB"),
        (np.ones((2, 3), np.uint16), "is a PNG 16-bit grey"),
        (code(np.full((3, 2), 401)), "2 x 3 px, not 3 x 2"),
    ],
)
def test_maps_of_another_kind_or_size(ade, array, says):
    stem = ade.add("ADE_val_00000001", np.full((2, 3), 401))
    Image.fromarray(array).save(f"{stem}_seg.png")
    assert says in ade.complaint()
