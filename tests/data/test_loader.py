"""Going on in the middle of an epoch, batch for batch."""

import json

import pytest
from test_mixture import facts, make_mixture, make_source

from osm_lightning.data import loader as loader_module
from osm_lightning.data.loader import EpochLoader
from osm_lightning.data.stream import Share

ALONE = Share()


def make_loader(source, num_workers=0, rank=ALONE, num_batches=7, **settings):
    return EpochLoader(make_mixture(source, num_batches=num_batches, rank=rank), num_workers, **settings)


@pytest.mark.parametrize(("num_workers", "cuts"), [(0, range(8)), (2, (1, 4, 7)), (3, (2, 5))])
def test_a_resumed_loader_goes_on_exactly(tmp_path, num_workers, cuts):
    source = make_source(tmp_path, sizes=[4, 3, 5])
    whole = make_loader(source, num_workers)
    first, second = facts(whole), facts(whole)
    for cut in cuts:
        broken_off = make_loader(source, num_workers)
        iterator = iter(broken_off)
        assert facts([next(iterator) for _ in range(cut)]) == first[:cut]
        state = json.loads(json.dumps(broken_off.state()))
        resumed = make_loader(source, num_workers)
        resumed.resume(state)
        assert facts(resumed) == (first[cut:] or second)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_ranks_that_are_resumed_again_and_again_go_on_exactly(tmp_path, monkeypatch, num_workers):
    source = make_source(tmp_path, sizes=[4, 3, 5])
    ranks = [Share(0, 2), Share(1, 2)]
    whole = [facts(make_loader(source, num_workers, rank)) for rank in ranks]

    def gather(gathered, _mine):
        gathered[:] = [loader.own_places() for loader in loaders]

    monkeypatch.setattr(loader_module.dist, "all_gather_object", gather)
    loaders = [make_loader(source, num_workers, rank) for rank in ranks]
    for step in range(6):
        for loader, expected in zip(loaders, whole, strict=True):
            assert facts([next(iter(loader))]) == expected[step : step + 1]
        states = [json.loads(json.dumps(loader.state())) for loader in loaders]
        assert states[0] == states[1]
        loaders = [make_loader(source, num_workers, rank) for rank in ranks]
        for loader, state in zip(loaders, states, strict=True):
            loader.resume(state)


def test_what_workers_prepared_ahead_is_not_taken_for_seen(tmp_path):
    source = make_source(tmp_path, sizes=[6, 6])
    loader = make_loader(source, 2)
    iterator = iter(loader)
    next(iterator)
    assert loader.state()["delivered"] == 1
    assert list(loader.state()["places"]) == [0]


def test_an_epoch_that_the_trainer_cuts_short_is_over(tmp_path):
    source = make_source(tmp_path)
    whole = make_loader(source, batches_taken=3)
    next(iter(whole))
    second = facts(whole)
    short = make_loader(source, batches_taken=3)
    iterator = iter(short)
    for _ in range(3):
        next(iterator)
    resumed = make_loader(source, batches_taken=3)
    resumed.resume(short.state())
    assert facts(resumed) == second


@pytest.mark.parametrize(
    ("num_workers", "rank", "changed"),
    [(3, Share(), "num_workers was 2, is 3"), (2, Share(0, 2), "processes was 1, is 2")],
)
def test_other_readers_are_refused_or_go_on_approximately(tmp_path, num_workers, rank, changed):
    source = make_source(tmp_path, sizes=[6, 6])
    loader = make_loader(source, 2)
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    state = loader.state()
    with pytest.raises(ValueError, match=f"{changed}: .*data.resume_approximately"):
        make_loader(source, num_workers, rank).resume(state)
    approximate = make_loader(source, num_workers, rank, resume_approximately=True)
    with pytest.warns(UserWarning, match=f"Resuming approximately: {changed}"):
        approximate.resume(state)
    assert len(facts(approximate)) == 4
