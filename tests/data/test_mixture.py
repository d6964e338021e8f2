from collections import Counter
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from tiny_shards import CAR, DOG, LEFT, PERSON, RIGHT, SMALL, make_record, rectangle, write_sizes, write_split

from osm_lightning.batch import AGNOSTIC
from osm_lightning.data import mixture as mixture_module
from osm_lightning.data.loader import EpochLoader
from osm_lightning.data.mixture import Mixed, Mixture, Progress, Source
from osm_lightning.data.sample import Labels, View
from osm_lightning.data.stream import ShardSet, Share, epoch_order
from osm_lightning.data.text import TextCodec
from osm_lightning.record import Segment
from osm_lightning.shard_index import write_index
from osm_lightning.vocabulary import load_vocabulary

CODEC = TextCodec("builtin:300")
COCO = load_vocabulary("coco")
ALONE = Share(0, 1)
VIEW = View(image_size_px=28, patch_size_px=14, context=0.5, min_mask_px=4)


def make_source(folder, name="mine", quota=4, mode=1, sizes=(4, 4)):
    folder = folder if (folder / "index.json").exists() else write_sizes(folder, sizes)
    return Source(Labels(name, COCO), ShardSet(folder, "train"), quota, mode)


def make_mixture(*sources, masks_per_image=2, agnostic_share=0.5, num_batches=6, seed=0, rank=ALONE):
    return Mixture(
        sources,
        VIEW,
        CODEC,
        masks_per_image=masks_per_image,
        agnostic_share=agnostic_share,
        num_batches=num_batches,
        seed=seed,
        rank=rank,
    )


def batches_of(mixture):
    return [mixed.batch for mixed in mixture]


def facts(batches):
    """What tells batches apart."""
    batches = [batch.batch if isinstance(batch, Mixed) else batch for batch in batches]
    return [
        (b.keys, b.mask_ids, b.mode_M.tolist(), b.text_ids_ML.tolist(), b.images_I3SS.sum(dim=(1, 2, 3)).tolist())
        for b in batches
    ]


def act_as_worker(monkeypatch, index, count):
    monkeypatch.setattr(mixture_module, "get_worker_info", lambda: SimpleNamespace(id=index, num_workers=count))


@pytest.mark.parametrize("masks_per_image", [1, 2, 3, 8])
def test_quotas_are_exact_in_every_batch(tmp_path, masks_per_image):
    first = make_source(tmp_path / "a", "first", quota=5, mode=2)
    second = make_source(tmp_path / "b", "second", quota=2, mode=1)
    mixture = make_mixture(first, second, masks_per_image=masks_per_image, agnostic_share=0.0)
    batches = batches_of(mixture)
    assert len(batches) == len(mixture) == 6
    for batch in batches:
        assert batch.datasets == ("first", "second")
        assert batch.dataset_M.tolist() == [0] * 5 + [1] * 2
        assert batch.mode_M.tolist() == [2] * 5 + [1] * 2
        assert batch.num_masks == 7
        per_image = Counter(batch.image_index_M.tolist())
        assert set(per_image) == set(range(batch.num_images))
        assert max(per_image.values()) <= masks_per_image
        assert batch.image_index_M.tolist() == sorted(batch.image_index_M.tolist())
    if masks_per_image == 1:
        assert {batch.num_images for batch in batches} == {7}
    if masks_per_image == 3:
        assert any(batch.num_images < 7 for batch in batches)


@pytest.mark.parametrize(("agnostic_share", "agnostic"), [(0.0, 0), (0.25, 1), (0.5, 2), (1.0, 4)])
def test_the_agnostic_share_is_exact_in_every_source_of_every_batch(tmp_path, agnostic_share, agnostic):
    first = make_source(tmp_path / "a", "first", mode=2)
    second = make_source(tmp_path / "b", "second", mode=1)
    orders = set()
    for batch in batches_of(make_mixture(first, second, agnostic_share=agnostic_share, num_batches=12)):
        modes = batch.mode_M.tolist()
        assert Counter(modes[:4]) == Counter({AGNOSTIC: agnostic, 2: 4 - agnostic})
        assert Counter(modes[4:]) == Counter({AGNOSTIC: agnostic, 1: 4 - agnostic})
        orders.add(tuple(modes[:4]))
    assert (len(orders) > 1) == (0 < agnostic < 4)  # which masks are agnostic changes


def test_ranks_and_workers_read_other_images_within_a_pass(tmp_path, monkeypatch):
    for sizes in ([6, 6, 6, 6], [24]):  # shards of their own, and one shard for all
        source = make_source(tmp_path / str(len(sizes)), quota=2, sizes=sizes)
        read = Counter()
        for rank in range(2):
            for worker in range(2):
                act_as_worker(monkeypatch, worker, 2)
                mixture = make_mixture(source, masks_per_image=1, num_batches=6, rank=Share(rank, 2))
                batches = batches_of(mixture)
                assert len(batches) == 3  # the other worker makes the other half
                read.update(key for batch in batches for key in batch.keys)
        assert read == Counter({f"train-{n}": 1 for n in range(24)})


def test_batches_repeat_with_seed_and_epoch_and_differ_otherwise(tmp_path):
    source = make_source(tmp_path, sizes=[6, 6])
    assert facts(make_mixture(source)) == facts(make_mixture(source))
    assert facts(make_mixture(source, seed=1)) != facts(make_mixture(source))
    later = make_mixture(source)
    later.progress = Progress(epoch=1)
    assert facts(later) != facts(make_mixture(source))


def test_an_iterator_keeps_the_epoch_that_it_was_made_in(tmp_path):
    source = make_source(tmp_path)
    mixture = make_mixture(source)
    iterator = iter(mixture)
    mixture.progress = Progress(epoch=1)
    assert facts(iterator) == facts(make_mixture(source))


def test_the_loader_gives_each_epoch_new_batches(tmp_path):
    source = make_source(tmp_path)
    loader = EpochLoader(make_mixture(source))
    epochs = [facts(loader) for _ in range(3)]
    assert len(loader) == 6
    for number, epoch in enumerate(epochs):
        mixture = make_mixture(source)
        mixture.progress = Progress(epoch=number)
        assert epoch == facts(mixture)
    assert epochs[0] != epochs[1] != epochs[2]


def test_one_worker_gives_what_no_worker_gives(tmp_path):
    source = make_source(tmp_path)
    loaders = [EpochLoader(make_mixture(source), num_workers=count) for count in (0, 1)]
    for _ in range(2):
        without, with_one = (facts(loader) for loader in loaders)
        assert without == with_one


def test_two_workers_take_turns(tmp_path, monkeypatch):
    source = make_source(tmp_path, sizes=[4, 4, 4])
    batches = list(EpochLoader(make_mixture(source, num_batches=5), num_workers=2))
    assert len(batches) == 5
    assert all(batch.num_masks == 4 for batch in batches)
    for worker in range(2):
        act_as_worker(monkeypatch, worker, 2)
        assert facts(batches[worker::2]) == facts(make_mixture(source, num_batches=5))


def test_a_source_without_usable_masks_is_an_error_and_not_an_endless_search(tmp_path):
    crowds = [make_record(f"k{n}", [LEFT], [Segment("s", PERSON, iscrowd=True)]) for n in range(3)]
    source = make_source(write_split(tmp_path / "crowds", [crowds]), "crowded")
    with pytest.raises(ValueError, match=r"data\.sources\.crowded: .*mask of more than 4 px.*min_mask_px"):
        next(iter(make_mixture(source)))


def test_images_without_usable_masks_are_passed_over(tmp_path):
    # Six readers of one usable image in six: in a pass five of them find nothing.
    bad = [make_record(f"bad{n}", [LEFT], [Segment("s", PERSON, iscrowd=True)]) for n in range(5)]
    source = make_source(write_split(tmp_path / "rare", [[*bad, make_record("good", [LEFT], [Segment("s", DOG)])]]))
    for index in range(6):
        batches = batches_of(make_mixture(source, num_batches=1, rank=Share(index, 6)))
        assert {key for batch in batches for key in batch.keys} == {"good"}


def test_a_source_of_few_usable_images_repeats_them_in_other_crops(tmp_path):
    source = make_source(
        write_split(tmp_path / "one", [[make_record("only", [LEFT, RIGHT], [Segment("a", CAR), Segment("b", DOG)])]])
    )
    batches = batches_of(islice(make_mixture(source, masks_per_image=1), 3))
    assert {key for batch in batches for key in batch.keys} == {"only"}
    assert len(torch.unique(torch.cat([batch.images_I3SS for batch in batches]).flatten(1), dim=0)) > 6


def test_the_numbers_of_lost_masks_add_up(tmp_path):
    tiny = rectangle(20, 16, 21, 17)
    record = make_record("k", [LEFT, tiny], [Segment("a", CAR), Segment("b", DOG)])
    source = make_source(write_split(tmp_path / "tiny", [[record]]), quota=3)
    batch = next(iter(make_mixture(source, agnostic_share=0.0))).batch
    assert (batch.num_images, batch.num_vanished) == (3, 3)
    assert set(batch.mask_ids) == {"a"}
    assert SMALL.sum() == 4


def test_broken_images_are_skipped_and_counted_up_to_the_share_of_the_source(tmp_path):
    good = [make_record(f"good{n}") for n in range(4)]
    broken = replace(make_record("broken"), image_bytes=b"no picture")
    source = make_source(write_split(tmp_path / "some", [[*good, broken]]))
    with pytest.raises(ValueError, match=r"data\.sources\.mine: image broken cannot be decoded.*max_skipped \(now 0"):
        list(make_mixture(source))
    lenient = replace(source, max_skipped=0.2)
    with pytest.warns(UserWarning, match=r"data\.sources\.mine: skipped\. image broken"):
        batches = batches_of(make_mixture(lenient))
    assert sum(batch.num_skipped for batch in batches) == 1
    assert {key for batch in batches for key in batch.keys} == {record.key for record in good}


def test_more_broken_images_than_the_share_end_the_run(tmp_path):
    broken = [replace(make_record(f"broken{n}"), image_bytes=b"no picture") for n in range(3)]
    source = make_source(write_split(tmp_path / "many", [[*broken, make_record("good")]]))
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(ValueError, match=r"number 3: broken.*max_skipped \(now 0\.5, a share of its 4 images\)"),
    ):
        list(make_mixture(replace(source, max_skipped=0.5)))


def test_rare_classes_are_read_more_often(tmp_path):
    common = [make_record(f"common{n}", [LEFT], [Segment("s", PERSON)]) for n in range(9)]
    folder = write_split(tmp_path / "tail", [[*common, make_record("rare", [LEFT], [Segment("s", DOG)])]])
    # sqrt(0.4 / 0.1) = 2 for the dog, 1 for people.
    source = replace(make_source(folder), repeat_threshold=0.4)
    assert source.shards.repeat_factors(0, 0.4).tolist() == pytest.approx([1.0] * 9 + [2.0])
    read = Counter(key for mixed in make_mixture(source, num_batches=55) for key in mixed.batch.keys)
    assert read["rare"] / read.total() == pytest.approx(2 / 11, abs=0.01)


def test_fractions_of_a_repeat_factor_are_drawn_anew_in_every_pass(tmp_path):
    records = [
        make_record("rare", [LEFT], [Segment("s", DOG)]),
        *(make_record(f"c{n}", [LEFT], [Segment("s", PERSON)]) for n in range(9)),
    ]
    shards = ShardSet(write_split(tmp_path / "tail", [records]), "train")
    lengths = [len(list(epoch_order(shards, 0, epoch, ALONE, 0.225))) for epoch in range(200)]  # factor 1.5
    assert set(lengths) == {10, 11}
    assert sum(lengths) / 200 == pytest.approx(10.5, abs=0.1)


def test_an_index_without_images_per_class_cannot_repeat(tmp_path):
    source = make_source(tmp_path)
    split = source.shards.index.splits["train"]
    write_index(tmp_path, replace(source.shards.index, splits={"train": replace(split, images_per_class={})}))
    with pytest.raises(ValueError, match=r"how many images have each class.*leave repeat_threshold out"):
        ShardSet(tmp_path, "train").repeat_factors(0, 0.001)
