from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from naive_geometry import coverage
from tiny_shards import CAR, DOG, LEFT, PERSON, RIGHT, SMALL, make_record, rectangle

from osm_lightning.batch import FREE_TEXT
from osm_lightning.data import geometry
from osm_lightning.data.sample import Labels, View, draw_sample, generator, whole_sample
from osm_lightning.data.text import TextCodec
from osm_lightning.instructions import MASK_QUESTIONS, TEST_QUESTION, prompt
from osm_lightning.record import Segment
from osm_lightning.vocabulary import load_vocabulary

CODEC = TextCodec("builtin:300")
LABELS = Labels("mine", load_vocabulary("coco"))
VIEW = View(image_size_px=56, patch_size_px=14, context=0.5, min_mask_px=20)


def same(first, second):
    """Whether two samples are equal in every field."""
    pairs = [(getattr(first, field.name), getattr(second, field.name)) for field in fields(first)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def drawn(record, num_masks=8, seed=0, labels=LABELS, view=VIEW):
    return draw_sample(record, labels, view, CODEC, num_masks, generator(seed))


def names_of(sample):
    return [CODEC.decode(ids[p:]) for ids, p in zip(sample.text_ids, sample.prompt_tokens, strict=True)]


def questions_of(sample):
    return [CODEC.decode(ids[:p]) for ids, p in zip(sample.text_ids, sample.prompt_tokens, strict=True)]


def masks_px(sample):
    """Pixels of each mask on the input."""
    return (sample.coverage_KGG.double().sum(dim=(1, 2)) * 14**2).round().int().tolist()


def test_a_draw_is_replayed_by_its_generator():
    record = make_record()
    assert same(drawn(record, seed=3), drawn(record, seed=3))
    assert not any(same(drawn(record, seed=3), drawn(record, seed=seed)) for seed in range(4, 9))


@pytest.mark.parametrize("num_masks", [1, 2, 3, 8])
def test_masks_are_drawn_without_repeats_and_no_more_than_asked(num_masks):
    record = make_record()
    seen = set()
    for seed in range(40):
        sample = drawn(record, num_masks, seed)
        assert 1 <= sample.num_masks <= num_masks
        assert len(set(sample.mask_ids)) == sample.num_masks
        assert sample.num_masks <= 3 - sample.num_vanished
        assert sample.num_masks == num_masks or sample.num_masks == 3 - sample.num_vanished
        assert all(pixels > VIEW.min_mask_px for pixels in masks_px(sample))
        seen |= set(sample.mask_ids)
    assert seen == {"s1", "s2", "s3"}  # the small one is large enough in the larger crops


def test_a_mask_of_exactly_the_minimum_is_skipped():
    exact = replace(VIEW, scale=(1.0, 1.0))  # 32 x 24 px to 56 x 42 px, never cropped
    for min_mask_px, expected in [
        (28 * 21 - 1, {("s1", 28 * 42), ("s2", 28 * 21)}),
        (28 * 21, {("s1", 28 * 42)}),
    ]:
        sample = drawn(make_record(), view=replace(exact, min_mask_px=min_mask_px))
        assert set(zip(sample.mask_ids, masks_px(sample), strict=True)) == expected
        assert sample.num_vanished == 3 - len(expected)


def test_every_mask_has_a_question_and_its_first_name():
    questions = set()
    for seed in range(60):
        sample = drawn(make_record(), seed=seed)
        expected = {"s1": (PERSON, " person"), "s2": (CAR, " car"), "s3": (DOG, " dog")}
        found = list(zip(sample.class_ids, names_of(sample), strict=True))
        assert found == [expected[mask_id] for mask_id in sample.mask_ids]
        assert all(ids[-1] == CODEC.eos_ids[0] for ids in sample.text_ids)
        questions |= set(questions_of(sample))
    assert questions == {prompt(question) for question in MASK_QUESTIONS}


def test_coverage_and_boxes_are_those_of_the_placed_masks():
    whole = whole_sample(make_record(), LABELS, VIEW, CODEC)  # 32 x 24 px lie on 56 x 42 px
    assert whole.mask_ids == ("s1", "s2", "s3")
    left = np.zeros((56, 56), dtype=bool)
    left[:42, :28] = True
    np.testing.assert_array_equal(whole.coverage_KGG[0].numpy(), coverage(left, 14))
    assert whole.context_box_px_K4[0].tolist() == [0, 0, 41, 55]  # 28 x 42 px, enlarged by 14 and 21
    assert whole.context_box_px_K4[1].tolist() == [14, 0, 55, 30]  # x 28 to 55, y 0 to 20, enlarged by 14 and 10.5
    assert whole.coverage_KGG.dtype == torch.float16
    assert whole.context_box_px_K4.dtype == torch.int32
    placed = geometry.place_image(make_record().image(), geometry.fit(32, 24, 56))
    assert torch.equal(whole.image_3SS.permute(1, 2, 0), torch.from_numpy(placed))


@pytest.mark.parametrize("as_rle", [False, True])
def test_crowds_and_ignored_classes_are_never_taken(as_rle):
    segments = [Segment("crowd", PERSON, iscrowd=True), Segment("ignored", CAR), Segment("good", DOG)]
    record = make_record(masks=[LEFT, RIGHT, rectangle(16, 12, 32, 24)], segments=segments, as_rle=as_rle)
    labels = replace(LABELS, ignored_ids=(CAR,))
    assert {drawn(record, seed=seed, labels=labels).mask_ids for seed in range(20)} == {("good",)}
    whole = whole_sample(record, labels, VIEW, CODEC, keep_vanished=True)
    assert (whole.mask_ids, whole.num_vanished) == (("good",), 0)


def test_nothing_is_drawn_from_masks_without_a_name():
    for name in (None, "", "  \t"):
        record = make_record(masks=[LEFT, RIGHT], segments=[Segment("s1", name=name), Segment("s2", name="Red kite")])
        sample = drawn(record, labels=Labels("mine"))
        assert (sample.mask_ids, sample.class_ids, names_of(sample)) == (("s2",), (FREE_TEXT,), [" red kite"])


def test_an_image_of_tiny_masks_is_given_up_after_the_tries(monkeypatch):
    tried = []
    monkeypatch.setattr(geometry, "draw", lambda *args, draw=geometry.draw: tried.append(args) or draw(*args))
    record = make_record(masks=[SMALL], segments=[Segment("s", DOG)])
    assert drawn(record, view=replace(VIEW, min_mask_px=1000, max_tries=7)) is None
    assert len(tried) == 7


def test_an_image_without_usable_segments_is_not_tried_at_all(monkeypatch):
    monkeypatch.setattr(geometry, "draw", lambda *args: pytest.fail("a crop was drawn"))
    assert drawn(make_record(masks=[], segments=[])) is None
    assert drawn(make_record(masks=[LEFT], segments=[Segment("s", PERSON, iscrowd=True)])) is None


@pytest.mark.parametrize("take", [drawn, lambda record: whole_sample(record, LABELS, VIEW, CODEC)])
def test_a_class_that_is_not_in_the_vocabulary_is_named(take):
    record = make_record("x7", masks=[LEFT], segments=[Segment("s9", 12)])
    with pytest.raises(ValueError, match=r"^sample x7, segment s9: class 12 is not in .*'coco'.*mine\.vocabulary"):
        take(record)


def test_a_whole_sample_asks_the_protocols_question_of_all_masks_in_their_order():
    record = make_record(masks=[RIGHT, LEFT], segments=[Segment("z", CAR), Segment("a", PERSON)])
    sample = whole_sample(record, LABELS, VIEW, CODEC)
    assert sample.mask_ids == ("z", "a")
    assert sample.class_ids == (CAR, PERSON)
    assert names_of(sample) == [" car", " person"]
    assert questions_of(sample) == [prompt(TEST_QUESTION)] * 2
    assert sample.dataset == "mine"
    assert sample.key == "a"


@pytest.mark.parametrize("as_rle", [False, True])
def test_masks_that_vanish(as_rle):
    # 300 px wide, shown 56 px wide: a column of one pixel falls between two samples.
    thin, wide = rectangle(150, 100, 151, 104, 200, 300), rectangle(0, 0, 100, 200, 200, 300)
    segments = [Segment("thin", DOG), Segment("wide", CAR)]
    record = make_record(masks=[thin, wide], segments=segments, as_rle=as_rle)
    counted = whole_sample(record, LABELS, VIEW, CODEC)
    assert (counted.mask_ids, counted.num_vanished) == (("wide",), 1)
    kept = whole_sample(record, LABELS, VIEW, CODEC, keep_vanished=True)
    assert (kept.mask_ids, kept.num_vanished) == (("thin", "wide"), 0)
    # Its centre, (150.5, 102) of 300 x 200 px, lies at (28.09, 18.87) of 56 x 37 px.
    assert kept.context_box_px_K4[0].tolist() == [27, 17, 28, 18]
    assert masks_px(kept)[0] == 1
    assert kept.coverage_KGG[0, 1, 2] > 0


def test_an_empty_mask_is_kept_where_all_are():
    record = make_record(masks=[rectangle(0, 0, 0, 0), LEFT], segments=[Segment("none", DOG), Segment("left", CAR)])
    assert whole_sample(record, LABELS, VIEW, CODEC).mask_ids == ("left",)
    assert whole_sample(record, LABELS, VIEW, CODEC, keep_vanished=True).mask_ids == ("none", "left")


def test_a_mask_that_vanishes_at_the_far_corner_stays_on_the_input():
    corner = rectangle(299, 199, 300, 200, 200, 300)
    record = make_record(masks=[corner], segments=[Segment("s", DOG)])
    assert masks_px(whole_sample(record, LABELS, VIEW, CODEC, keep_vanished=True)) == [1]


def test_an_image_without_masks_makes_an_empty_sample():
    sample = whole_sample(make_record(masks=[], segments=[]), LABELS, VIEW, CODEC)
    assert (sample.num_masks, sample.coverage_KGG.shape, sample.context_box_px_K4.shape) == (0, (0, 4, 4), (0, 4))


def test_rles_and_segment_maps_give_the_same_samples():
    by_map, by_rle = make_record(), make_record(as_rle=True)
    assert same(whole_sample(by_map, LABELS, VIEW, CODEC), whole_sample(by_rle, LABELS, VIEW, CODEC))
    for seed in range(15):
        assert same(drawn(by_map, 2, seed), drawn(by_rle, 2, seed))


def test_overlapping_masks_keep_all_their_pixels():
    record = make_record(masks=[LEFT, LEFT], segments=[Segment("s1", CAR), Segment("s2", DOG)], as_rle=True)
    assert masks_px(whole_sample(record, LABELS, VIEW, CODEC)) == [28 * 42, 28 * 42]


def test_what_has_vanished_is_counted_in_training():
    sizes = [(s.num_masks, s.num_vanished) for s in (drawn(make_record(), 8, seed) for seed in range(30))]
    assert all(masks + vanished == 3 for masks, vanished in sizes)
    assert len(set(sizes)) > 1


def test_generators_differ_in_every_part():
    parts = [(1, "a", "bc"), (1, "ab", "c"), (2, "a", "bc"), (1, "a", "bd"), (1, "a", "")]
    draws = [tuple(generator(*part).integers(1 << 30, size=4)) for part in parts]
    assert len(set(draws)) == len(parts)
    assert tuple(generator(*parts[0]).integers(1 << 30, size=4)) == draws[0]
