"""Names on several ranks, and after a kill, are those of one process that never was stopped; none is made twice."""

import os
import random
import signal
from pathlib import Path

import pytest
from predicting import NUM_MASKS, Prediction, kept, names, said, write_photos

NUM_IMAGES = 24


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, NUM_IMAGES)
    return folder


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process leaves that is not disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    finish(photos, out)
    found = files(out)
    assert len(found["predictions.jsonl"].splitlines()) == NUM_IMAGES * NUM_MASKS
    assert len(found) == 2 + NUM_IMAGES
    return found


def files(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def finish(photos: Path, out: Path, ranks: int = 1) -> None:
    assert Prediction(photos, out, ranks).wait() == [0] * ranks, said(out).read_text()


def test_two_ranks_leave_what_one_process_does(photos: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    finish(photos, tmp_path / "out", ranks=2)
    assert files(tmp_path / "out") == whole
    assert set(names(tmp_path / "out").values()) == {1}


def killed_and_resumed(photos: Path, out: Path, kills: int, seed: int) -> None:
    """Kills prediction at random moments and resumes it with random numbers of ranks, until it ends."""
    rng = random.Random(seed)
    before = kept(out)
    for number in range(kills):
        run = Prediction(photos, out, ranks=rng.randint(1, 3), slow_s=0.05)
        more = rng.randint(0, 2 * (NUM_IMAGES - len(before)) // (kills - number + 1))
        assert run.wait_for_images(more), f"it ended before kill {number}: {said(out).read_text()}"
        run.processes[0].join(rng.uniform(0, 0.1))
        run.kill()
        assert not before & names(out), "what was in the journal was named again"
        before = kept(out)
        assert set(before.values()) <= {1}
        assert not (out / "predictions.jsonl").exists()
    finish(photos, out, ranks=rng.randint(1, 3))
    assert not before & names(out)
    assert len(before | names(out)) == NUM_IMAGES


def test_killed_prediction_goes_on(photos: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    killed_and_resumed(photos, tmp_path / "out", kills=3, seed=0)
    assert files(tmp_path / "out") == whole


def test_a_prediction_that_is_asked_to_end_ends_at_once(photos: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = Prediction(photos, out, slow_s=0.2)
    assert run.wait_for_images(3)
    run.processes[0].terminate()
    assert run.wait() == [-signal.SIGTERM]
    assert len(names(out)) < NUM_IMAGES
    finish(photos, out)
    assert files(out) == whole


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_twenty_kills_change_nothing(photos: Path, whole: dict[str, bytes], tmp_path: Path, seed: int) -> None:
    killed_and_resumed(photos, tmp_path / "out", kills=5, seed=seed)
    assert files(tmp_path / "out") == whole


@pytest.mark.cluster
def test_fewer_images_left_than_ranks(photos: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    limits = ["--trainer.limit_predict_batches", str(NUM_IMAGES - 1)]
    assert Prediction(photos, out, words=limits).wait() == [0]
    assert f"named {NUM_IMAGES - 1} of {NUM_IMAGES} images" in said(out).read_text()
    assert list(out.iterdir()) == [out / ".predictions"]
    finish(photos, out, ranks=3)
    assert names(out) == {f"{NUM_IMAGES - 1:03}": 1}
    assert f"Going on behind {NUM_IMAGES - 1} of {NUM_IMAGES} images" in said(out).read_text()
    assert files(out) == whole


# A full disk


def test_disk_that_is_full_on_the_way(photos: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    half = len(whole["predictions.jsonl"]) // 2
    assert Prediction(photos, out, most_bytes=half).wait() == [2]
    text = said(out).read_text()
    assert f"out: {out} cannot be written to" in text
    assert "What is named so far is kept" in text
    assert "Traceback" not in text
    before = kept(out)
    assert 0 < len(before) < NUM_IMAGES
    finish(photos, out)
    assert not before & names(out)
    assert files(out) == whole


@pytest.mark.cluster
@pytest.mark.parametrize("ranks", [1, 2])
def test_disk_that_is_full_at_the_end(photos: Path, whole: dict[str, bytes], tmp_path: Path, ranks: int) -> None:
    """Each of two parts fits, what is made of them does not. Then nothing is left to name, but the files to make."""
    out = tmp_path / "out"
    size = len(whole["predictions.jsonl"])
    assert Prediction(photos, out, ranks=2, most_bytes=size - 1).wait() == [2, 2]
    assert "What is named so far is kept" in said(out).read_text()
    assert len(kept(out)) == NUM_IMAGES
    finish(photos, out, ranks)
    assert not names(out)
    assert files(out) == whole


# Others in the same folder


@pytest.mark.cluster
def test_rank_that_outlives_the_first_one_keeps_others_out(
    photos: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = Prediction(photos, out, ranks=2, slow_s=0.2)
    assert first.wait_for_images(2)
    os.kill(first.processes[1].pid or 0, signal.SIGSTOP)  # else it might be through before the next run has begun
    os.killpg(first.processes[0].pid or 0, signal.SIGKILL)
    first.processes[0].join()
    assert Prediction(photos, out).wait() == [2]
    assert f"another `osm predict` writes to {out}" in said(out).read_text()
    os.killpg(first.processes[1].pid or 0, signal.SIGKILL)
    first.processes[1].join()
    finish(photos, out)
    assert files(out) == whole


@pytest.mark.cluster
def test_names_of_other_settings_are_not_gone_on_with(photos: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = Prediction(photos, out, slow_s=0.1)
    assert run.wait_for_images(3)
    run.kill()
    before = files(out)
    assert Prediction(photos, out, words=["--modes", "agnostic,coco", "--seed_everything", "1"]).wait() == [2]
    text = said(out).read_text()
    assert f"{out}/.predictions holds {len(kept(out))} images that were named otherwise" in text
    assert "(checkpoint: none, seed 0 then, none, seed 1 now; modes: agnostic then, agnostic,coco now)" in text
    assert files(out) == before


@pytest.mark.cluster
def test_interrupted_prediction_goes_on(photos: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = Prediction(photos, out, slow_s=0.1)
    assert run.wait_for_images(3)
    run.processes[0].join(0.1)
    assert run.processes[0].is_alive()
    os.kill(run.processes[0].pid or 0, signal.SIGINT)
    run.wait()
    before = kept(out)
    assert len(before) >= 3
    finish(photos, out)
    assert not before & names(out)
    assert files(out) == whole
