"""Acc and NIV: corner cases of the protocol, a literal restatement of it, and counting over processes."""

import math
import pickle
import random
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from osm_lightning.batch import FREE_TEXT
from osm_lightning.evaluation.naming import NamingAccuracy, ScoreRow, format_scores
from osm_lightning.vocabulary import Class, Vocabulary, load_vocabulary

SMALL = Vocabulary(
    "small",
    (
        Class(3, "thing", ("cat", "kitten")),
        Class(7, "thing", ("Puppy",)),
        Class(8, "thing", ("shelf", "leaf")),
        Class(20, "stuff", ("knives", "glasses")),
    ),
)


def score(names: list[str], class_ids: list[int], vocabulary: Vocabulary = SMALL) -> dict[str, float]:
    metric = NamingAccuracy(vocabulary)
    metric.update(names, class_ids)
    return {key: value.item() for key, value in metric.compute().items()}


@pytest.mark.parametrize(
    ("name", "class_id", "right", "strict", "outside"),
    [
        ("cat", 3, 1, 1, 0),
        ("CAT", 3, 1, 1, 0),
        (" cat\n", 3, 1, 1, 0),
        ("kitten", 3, 1, 0, 0),
        ("cats", 3, 1, 0, 1),  # right and outside the vocabulary at once
        ("cates", 3, 1, 0, 1),  # naive: every name takes -es
        ("puppies", 7, 1, 0, 1),
        ("puppy", 7, 1, 1, 0),  # the vocabulary's own capital is no difference
        ("shelves", 8, 1, 0, 1),
        ("leaves", 8, 1, 0, 1),
        ("knife", 20, 1, 0, 1),
        ("knif", 20, 1, 0, 1),  # naive: -ves gives both -f and -fe
        ("glass", 20, 1, 0, 1),
        ("glasse", 20, 1, 0, 1),
        ("kitten", 7, 0, 0, 0),  # another class's name: wrong, yet inside
        ("a cat", 3, 0, 0, 1),  # no matching of parts
        ("", 3, 0, 0, 1),
    ],
)
def test_one_mask(name: str, class_id: int, right: int, strict: int, outside: int) -> None:
    scores = score([name], [class_id])
    assert (scores["acc"], scores["acc_strict"], scores["niv"]) == (right, strict, outside)


def test_shared_names_are_right_for_every_class_that_has_them() -> None:
    vocabulary = load_vocabulary("a847")
    owners = [entry for entry in vocabulary if "double door" in entry.names]
    assert len(owners) == 2
    scores = score(["double door"] * 2, [entry.id for entry in owners], vocabulary)
    assert scores["acc"] == 1.0
    assert scores["acc_strict"] == sum(entry.names[0] == "double door" for entry in owners) / 2 < 1


def test_kinds_of_accuracy_differ() -> None:
    scores = score(["cat", "cat", "kitten", "dog", "puppies", "cat"], [3, 3, 3, 3, 7, 8])
    assert scores["acc"] == pytest.approx(4 / 6)
    assert scores["acc_strict"] == pytest.approx(2 / 6)
    assert scores["acc_balanced"] == pytest.approx((3 / 4 + 1 + 0) / 3)  # class 20 does not occur
    assert scores["niv"] == pytest.approx(2 / 6)
    assert scores["majority"] == pytest.approx(4 / 6)
    assert scores["num_masks"] == 6


def restated(names: list[str], class_ids: list[int], vocabulary: Vocabulary) -> dict[str, float]:
    """The protocol, one mask at a time, from its description; shares nothing with the package but the class lists."""
    everything = [name for entry in vocabulary.classes for name in entry.names]
    right, strict, outside, per_class = 0, 0, 0, {}
    for name, class_id in zip(names, class_ids, strict=True):
        own = next(list(entry.names) for entry in vocabulary.classes if entry.id == class_id)
        candidates = list(own)
        for true in own:
            candidates += [true + "s", true + "es"]
            candidates += [true[:-1] + "ies"] if true[-1:] == "y" else []
            candidates += [true[:-1] + "ves"] if true[-1:] == "f" else []
            candidates += [true[:-2] + "ves"] if true[-2:] == "fe" else []
            candidates += [true[:-1]] if true[-1:] == "s" else []
            candidates += [true[:-2]] if true[-2:] == "es" else []
            candidates += [true[:-3] + "y"] if true[-3:] == "ies" else []
            candidates += [true[:-3] + "f", true[:-3] + "fe"] if true[-3:] == "ves" else []
        hit = name.lower() in candidates
        right += hit
        strict += name.lower() == own[0]
        outside += name.lower() not in everything
        per_class.setdefault(class_id, []).append(hit)
    return {
        "acc": right / len(names),
        "acc_strict": strict / len(names),
        "niv": outside / len(names),
        "acc_balanced": sum(sum(hits) / len(hits) for hits in per_class.values()) / len(per_class),
        "majority": max(map(len, per_class.values())) / len(names),
        "num_masks": len(names),
        "num_right": right,
        "num_outside": outside,
    }


def random_masks(vocabulary: Vocabulary, num_masks: int, seed: int) -> tuple[list[str], list[int]]:
    """Names that are right, plural, singular, another class's, upper case or nonsense; some classes far more often."""
    draw = random.Random(seed)
    names, class_ids = [], []
    for _ in range(num_masks):
        entry = vocabulary.classes[int(len(vocabulary) * draw.random() ** 3)]
        name = draw.choice(entry.names if draw.random() < 0.7 else draw.choice(vocabulary.classes).names)
        change = draw.choice([lambda n: n] * 4 + [str.upper, lambda n: n + "s", lambda n: n + "es", lambda n: n[:-1]])
        if draw.random() < 0.2:
            change = draw.choice(
                [lambda n: n[:-1] + "ies", lambda n: n[:-1] + "ves", lambda n: n[:-3] + "y", lambda _: ""]
            )
        names.append(change(name))
        class_ids.append(entry.id)
    return names, class_ids


@pytest.mark.parametrize("key", ["coco", "lvis", "a847", "pc459"])
def test_equals_a_literal_restatement(key: str) -> None:
    vocabulary = load_vocabulary(key)
    names, class_ids = random_masks(vocabulary, 600, seed=1)
    metric = NamingAccuracy(vocabulary)
    for start in range(0, 600, 77):  # batches of different sizes, ids as tensors
        batch = slice(start, start + 77)
        metric.update(names[batch], torch.tensor(class_ids[batch]))
    expected = restated(names, class_ids, vocabulary)
    assert {key: value.item() for key, value in metric.compute().items()} == pytest.approx(expected, rel=1e-6)
    assert 0.3 < expected["acc"] < 0.95, "the random names test nothing"
    assert 0.05 < expected["niv"] < 0.6, "the random names test nothing"


@pytest.mark.parametrize("class_id", [4, FREE_TEXT, 65535])
def test_unknown_class_is_refused_and_nothing_counted(class_id: int) -> None:
    metric = NamingAccuracy(SMALL)
    with pytest.raises(ValueError, match=rf"class ids {class_id} .* 'small'.*crowd, ignored"):
        metric.update(["cat", "cat"], [3, class_id])
    assert metric.total_C.sum() == 0
    assert metric.outside == 0


def test_names_and_classes_must_pair_up() -> None:
    metric = NamingAccuracy(SMALL)
    with pytest.raises(ValueError, match="2 names for 1 class ids"):
        metric.update(["cat", "dog"], [3])
    assert metric.total_C.sum() == 0


def test_no_masks_give_nan_and_no_warning() -> None:
    metric = NamingAccuracy(SMALL)
    metric.update([], torch.zeros(0, dtype=torch.int64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = metric.compute()
    assert [scores.pop(count) for count in ("num_masks", "num_right", "num_outside")] == [0, 0, 0]
    assert len(scores) == 5
    assert all(value.isnan() for value in scores.values())


def test_state_is_whole_numbers_and_leaves_checkpoints_alone() -> None:
    metric = NamingAccuracy(SMALL)
    metric.update(["cat"], [3])
    assert {getattr(metric, state).dtype for state in metric._defaults} == {torch.int64}
    assert metric.state_dict() == {}


def test_pickle_keeps_counts_and_reset_clears_them() -> None:
    metric = NamingAccuracy(SMALL)
    metric.update(["cat", "dog"], [3, 7])
    copy = pickle.loads(pickle.dumps(metric))
    copy.update(["puppy"], [7])
    assert copy.compute()["acc"] == pytest.approx(2 / 3)
    assert metric.compute()["num_masks"] == 2
    metric.reset()
    metric.update(["puppy"], [7])
    assert metric.compute()["acc"] == 1.0
    assert metric.compute()["majority"] == 1.0


def _count_on_one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        names, class_ids = random_masks(load_vocabulary("coco"), 101, seed=2)
        mine = slice(0, 97) if rank == 0 else slice(97, 101)
        metric = NamingAccuracy(load_vocabulary("coco"))
        metric.update(names[mine], class_ids[mine])
        torch.save(metric.compute(), f"{folder}/scores_{rank}.pt")
        torch.save(metric.total_C.sum(), f"{folder}/own_{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_with_uneven_shares_count_like_one(tmp_path: Path) -> None:
    mp.spawn(_count_on_one_rank, args=(str(tmp_path),), nprocs=2)
    vocabulary = load_vocabulary("coco")
    alone = NamingAccuracy(vocabulary)
    alone.update(*random_masks(vocabulary, 101, seed=2))
    for rank, own in ((0, 97), (1, 4)):
        scores = torch.load(tmp_path / f"scores_{rank}.pt")
        assert {key: value.item() for key, value in scores.items()} == {
            key: value.item() for key, value in alone.compute().items()
        }
        assert torch.load(tmp_path / f"own_{rank}.pt") == own, "syncing must not leave the other rank's masks behind"


def test_table_shows_percent_and_aligns() -> None:
    metric = NamingAccuracy(SMALL)
    metric.update([], [])
    empty = ScoreRow.of("b", "agnostic", metric.compute())
    assert empty.num_masks == 0
    assert math.isnan(empty.acc)
    metric.update(["cat", "dog", "cats"], [3, 3, 7])
    row = ScoreRow.of("a_long_name", "a_long_name", metric.compute())
    assert (row.num_masks, row.num_right, row.num_outside) == (3, 1, 2)
    assert format_scores([row, empty]).splitlines() == [
        "dataset      mode         masks  Acc %  strict %  balanced %  NIV %  majority %",
        "a_long_name  a_long_name      3  33.33     33.33       25.00  66.67       66.67",
        "b            agnostic         0      -         -           -      -           -",
    ]
