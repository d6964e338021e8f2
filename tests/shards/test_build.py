"""Builds: in parallel, killed and gone on with, with pictures that are broken. The bytes never differ."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from coco_folder import SPLIT, coco_of_noise

from osm_lightning.commands.shards import main
from osm_lightning.shard_index import read_index
from osm_lightning.shards.build import build_split
from osm_lightning.shards.conversion import RawSplit
from osm_lightning.shards.lock import exclusive
from osm_lightning.shards.panoptic import LAYOUTS, read_split
from osm_lightning.shards.write import ShardWriter
from osm_lightning.vocabulary import load_vocabulary

NUM_IMAGES = 24
SHARD_BYTES = 30_000
"""A few images each."""


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A dataset, and the shards that one process makes of it without a stop."""
    root = tmp_path_factory.mktemp("clean")
    coco_of_noise(root / "raw", NUM_IMAGES)
    build(root / "raw", root / "shards")
    assert len(read_index(root / "shards").splits[SPLIT].shards) > 4
    return root


@pytest.fixture
def raw(tmp_path):
    """A dataset of the same images, to be broken."""
    return coco_of_noise(tmp_path / "raw", NUM_IMAGES).root


def read(raw):
    return read_split(LAYOUTS["coco"], raw, SPLIT, load_vocabulary("coco"))


def new_writer(out, **options):
    options = {"max_shard_bytes": SHARD_BYTES, **options}
    return ShardWriter(out, dataset="coco", split=SPLIT, vocabulary="coco", **options)


def build(raw, out, console=None, **options):
    return build_split(read(raw), new_writer(out), console=console, **options)


class Lines(list):
    """A console that only remembers what was said."""

    def print(self, line, **style):
        self.append(line)


@pytest.fixture
def console(monkeypatch):
    monkeypatch.setattr("osm_lightning.shards.build.track", lambda outcomes, *args, **options: outcomes)
    return Lines()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def cut(raw, number, share=0.6):
    """Cuts the JPEG of one image; its header stays."""
    path = raw / SPLIT / f"{number:012}.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    return lambda: path.write_bytes(whole)


def interrupt_after(monkeypatch, num_images):
    """Interrupts the next build when it writes the record after so many."""
    write, written = ShardWriter.write, []

    def interrupted(writer, record):
        if len(written) == num_images:
            monkeypatch.setattr(ShardWriter, "write", write)
            raise KeyboardInterrupt
        written.append(record.key)
        write(writer, record)

    monkeypatch.setattr(ShardWriter, "write", interrupted)


# In parallel


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_do_not_change_the_bytes(clean, tmp_path, workers):
    report = build(clean / "raw", tmp_path, workers=workers)
    assert contents(tmp_path) == contents(clean / "shards")
    assert (report.num_images, report.num_resumed, report.num_skipped) == (NUM_IMAGES, 0, 0)


class Deadly:
    """An image whose conversion takes its process down, as the kernel does when memory runs out."""

    key = "deadly"

    def convert(self, errors, notes):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_told(clean, tmp_path):
    split = read(clean / "raw")
    split = RawSplit(split.source, [*split.images[:3], Deadly(), *split.images[3:]])
    with pytest.raises(ValueError, match=r"a worker died near sample .* fewer --workers"):
        build_split(split, new_writer(tmp_path), workers=2)
    assert not (tmp_path / "index.json").exists()


# Killed


BUILD = """
import sys
from pathlib import Path
from rich.console import Console
from osm_lightning.shards.build import build_split
from osm_lightning.shards.panoptic import LAYOUTS, read_split
from osm_lightning.shards.write import ShardWriter
from osm_lightning.vocabulary import load_vocabulary

if __name__ == "__main__":
    raw, out, split, size = sys.argv[1:]
    writer = ShardWriter(Path(out), dataset="coco", split=split, vocabulary="coco", max_shard_bytes=int(size))
    images = read_split(LAYOUTS["coco"], Path(raw), split, load_vocabulary("coco"))
    build_split(images, writer, workers=2, console=Console())
"""


def num_kept(out):
    try:
        return len(json.loads((out / f".{SPLIT}.journal").read_bytes())["finished"]["shards"])
    except OSError:
        return 0


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def wait_until(condition, process=None, timeout_s=120):
    end = time.monotonic() + timeout_s
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.001)


def stop(process, how):
    """Kills the process alone, or interrupts all of its group as a terminal does; returns what it said."""
    workers = children_of(process.pid)
    assert workers
    if how == signal.SIGINT:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.kill()
    said = process.communicate(timeout=60)
    wait_until(lambda: not any(map(is_alive, workers)), timeout_s=30)
    return said


def test_a_build_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path):
    raw, out = coco_of_noise(tmp_path / "raw", 120).root, tmp_path / "shards"
    (tmp_path / "build.py").write_text(BUILD)
    words = [sys.executable, tmp_path / "build.py", raw, out, SPLIT, str(SHARD_BYTES)]
    for moment, how in [(1, signal.SIGKILL), (5, signal.SIGKILL), (9, signal.SIGINT)]:
        before = num_kept(out)
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        wait_until(lambda moment=moment: num_kept(out) >= moment, process)
        output, errors = stop(process, how)
        assert process.returncode == -how
        assert not (out / "index.json").exists()
        assert (f"which are in {before} finished shards" in output) == (before > 0)
        if how == signal.SIGINT:
            assert errors.count("Traceback") == 1, errors
            assert f"Kept {num_kept(out)} finished shards" in output
            assert sorted(path.name for path in out.iterdir()) == [
                *(f".{SPLIT}-{number:05d}.tar.partial" for number in range(num_kept(out))),
                f".{SPLIT}.journal",
            ]
    assert build(raw, out).num_resumed > 0
    build(raw, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_the_command_goes_on_after_a_kill(tmp_path):
    """Before its first shard is finished there is nothing to go on from, and nothing in the way."""
    raw, out = coco_of_noise(tmp_path / "raw", 40).root, tmp_path / "shards"
    words = [
        sys.executable,
        "-m",
        "osm_lightning",
        "shards",
        "build",
        "coco",
        "--src",
        raw,
        "--split",
        SPLIT,
        "--out",
        out,
    ]
    process = subprocess.Popen(
        [*words, "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_until(lambda: (out / f".{SPLIT}-00000.tar.partial").exists(), process)
    stop(process, signal.SIGKILL)
    assert list(out.glob("*.tar")) == []
    subprocess.run(words, check=True, capture_output=True, timeout=120)
    build_split(read(raw), new_writer(tmp_path / "whole", max_shard_bytes=64_000_000))
    assert contents(out) == contents(tmp_path / "whole")


# Gone on with, or not


def test_an_interrupted_build_goes_on_behind_the_last_finished_shard(clean, tmp_path, monkeypatch, console):
    interrupt_after(monkeypatch, 13)
    with pytest.raises(KeyboardInterrupt):
        build(clean / "raw", tmp_path, console)
    kept = num_kept(tmp_path)
    assert console == [f"Kept {kept} finished shards: the same command goes on behind them."]
    report = build(clean / "raw", tmp_path, console)
    assert console[1] == f"Going on behind {report.num_resumed} images, which are in {kept} finished shards."
    assert 0 < report.num_resumed <= 13
    assert contents(tmp_path) == contents(clean / "shards")


def test_findings_of_the_first_half_are_in_the_report(raw, tmp_path, monkeypatch):
    path = raw / f"annotations/panoptic_{SPLIT}.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation["segments_info"][0]["area"] += 1
    path.write_text(json.dumps(content))
    interrupt_after(monkeypatch, 13)
    with pytest.raises(KeyboardInterrupt):
        build(raw, tmp_path / "out")
    report = build(raw, tmp_path / "out")
    assert list(report.notes.counts.values()) == [NUM_IMAGES]


@pytest.mark.parametrize("change", ["table", "images", "settings", "classes", "journal", "shard"])
def test_another_plan_starts_over_and_says_so(raw, tmp_path, monkeypatch, console, change):
    out, table = tmp_path / "out", raw / f"annotations/panoptic_{SPLIT}.json"
    interrupt_after(monkeypatch, 13)
    with pytest.raises(KeyboardInterrupt):
        build(raw, out)
    options, classes = {}, {}
    if change == "table":
        table.write_text(table.read_text().replace('"category_id": 1', '"category_id": 5'))
    elif change == "images":
        stat = table.stat()
        (raw / SPLIT / f"{1:012}.jpg").rename(raw / SPLIT / f"{0:012}.jpg")
        table.write_text(table.read_text().replace(f"{1:012}.jpg", f"{0:012}.jpg"))
        os.utime(table, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "settings":
        options["max_shard_bytes"] = SHARD_BYTES + 512
    elif change == "classes":
        classes["vocabulary"] = load_vocabulary("lvis")
    elif change == "journal":
        (out / f".{SPLIT}.journal").write_text("{")
    else:
        partial = out / f".{SPLIT}-00000.tar.partial"
        partial.write_bytes(partial.read_bytes().replace(b"area", b"aera", 1))
    report = build_split(read(raw), new_writer(out, **options), console=console, **classes)
    assert report.num_resumed == 0
    assert [line.startswith("Starting over") for line in console] == [True] * (change != "journal")
    build_split(read(raw), new_writer(tmp_path / "whole", **options))
    assert contents(out) == contents(tmp_path / "whole")


# Broken pictures


def test_a_broken_picture_fails_the_build_at_its_end(raw, tmp_path):
    for number in (3, 5, 6, 7, 8, 20):
        cut(raw, number)
    (raw / f"panoptic_{SPLIT}/{22:012}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"7 of 24 images cannot be converted, but --max-skipped is 0") as caught:
        build(raw, tmp_path / "out")
    lines = str(caught.value).splitlines()
    assert len(lines) == 4, "one line for each kind"
    assert lines[1].startswith("  pictures that can't be decoded: 6 (image 000000000003 cannot be decoded (")
    assert lines[1].count("image 0") == 5
    assert lines[2].startswith("  pictures that can't be read: 1 (")
    assert list((tmp_path / "out").iterdir()) == [], "no shard was finished before the first of them"


def test_what_was_finished_before_a_broken_picture_is_not_made_again(clean, raw, tmp_path):
    mend = cut(raw, 20)
    with pytest.raises(ValueError, match="1 of 24 images"):
        build(raw, tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()
    mend()
    assert 0 < build(raw, tmp_path / "out").num_resumed < 20
    assert contents(tmp_path / "out") == contents(clean / "shards")


def test_a_share_of_broken_pictures_may_be_left_out(raw, tmp_path):
    cut(raw, 3)
    (raw / SPLIT / f"{9:012}.jpg").unlink()
    report = build(raw, tmp_path / "out", max_skipped=2 / 24, workers=2)
    assert (report.num_images, report.num_skipped) == (24, 2)
    assert [line.split(":")[0] for line in report.errors.lines()] == ["missing files", "pictures that can't be decoded"]
    table = raw / f"annotations/panoptic_{SPLIT}.json"
    content = json.loads(table.read_text())
    content["images"] = [image for image in content["images"] if image["id"] not in (3, 9)]
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] not in (3, 9)]
    table.write_text(json.dumps(content))
    build(raw, tmp_path / "without")
    assert contents(tmp_path / "out") == contents(tmp_path / "without")


def test_more_broken_pictures_than_the_share_fail_the_build(raw, tmp_path):
    for number in (3, 9, 21):
        cut(raw, number)
    with pytest.raises(ValueError, match=r"3 of 24 images cannot be converted, but --max-skipped is 0\.1"):
        build(raw, tmp_path / "out", max_skipped=0.1)
    assert not (tmp_path / "out" / "index.json").exists()
    assert list((tmp_path / "out").glob("*.tar")) == []


def test_more_missing_files_than_the_share_are_told_before_any_picture_is_opened(raw, tmp_path, monkeypatch):
    for number in (3, 9):
        (raw / SPLIT / f"{number:012}.jpg").unlink()
    monkeypatch.setattr("osm_lightning.shards.build.convert_all", None)
    with pytest.raises(ValueError, match="2 of 24 images"):
        build(raw, tmp_path / "out", max_skipped=0.05)


@pytest.mark.parametrize("mended", [False, True])
def test_a_picture_that_was_left_out_is_looked_at_again(raw, tmp_path, monkeypatch, mended, console):
    mend = cut(raw, 3)
    interrupt_after(monkeypatch, 13)
    with pytest.raises(KeyboardInterrupt):
        build(raw, tmp_path / "out", max_skipped=0.1)
    if mended:
        mend()
    report = build(raw, tmp_path / "out", console, max_skipped=0.1)
    assert (report.num_resumed > 0, report.num_skipped) == (not mended, not mended)
    assert ("an image that it left out has been mended" in console[0]) == mended
    build(raw, tmp_path / "whole", max_skipped=0.1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# Refused


def test_a_full_disk_keeps_what_is_finished(clean, tmp_path, monkeypatch):
    synced = []

    def fsync(descriptor):
        synced.append(descriptor)
        if len(synced) > 5:  # two or three shards, each with its journal
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=r"cannot be written to \(No space left on device\) after [0-9,]{5,} bytes"):
            build(clean / "raw", tmp_path)
    assert not (tmp_path / "index.json").exists()
    assert build(clean / "raw", tmp_path).num_resumed > 0
    assert contents(tmp_path) == contents(clean / "shards")


def test_two_builds_of_one_split(clean, tmp_path):
    lock = tmp_path / f".{SPLIT}.lock"
    with exclusive(lock, wait=False), pytest.raises(ValueError, match="is being built by another process"):
        build(clean / "raw", tmp_path)
    assert contents(tmp_path) == {}
    lock.write_bytes(b"")  # what a process leaves that was killed
    build(clean / "raw", tmp_path)
    assert contents(tmp_path) == contents(clean / "shards")


def test_keys_are_checked_before_anything_is_converted(clean, tmp_path):
    split = read(clean / "raw")
    with pytest.raises(ValueError, match="would have the same sample key: 1 \\(2 times 000000000001\\)"):
        build_split(RawSplit(split.source, [*split.images, split.images[0]]), new_writer(tmp_path))
    spaced = Deadly()
    spaced.key = "my photo.1"
    with pytest.raises(ValueError, match=r"whose sample key is not 1 to 80 letters.*'my photo\.1'"):
        build_split(RawSplit(split.source, [spaced]), new_writer(tmp_path))


def test_your_own_data_by_yaml(tmp_path, capsys):
    """Its classes go along, so that the shard folder needs nothing beside it."""
    coco = coco_of_noise(tmp_path / "raw", 3).root
    (coco / "mine.yaml").write_text(
        "dataset: mine\nformat: coco_panoptic\nvocabulary: classes.txt\nsplits:\n  train:\n"
        f"    annotations: annotations/panoptic_{SPLIT}.json\n"
        f"    images: {SPLIT}\n"
        f"    segment_maps: panoptic_{SPLIT}\n"
    )
    (coco / "classes.txt").write_text("nothing\nteapot\nkettle\ncup\n")
    out = tmp_path / "shards"
    words = ["build", str(coco / "mine.yaml"), "--split", "train", "--out", str(out), "--workers", "1"]
    assert main(words) == 0
    index = read_index(out)
    assert (index.dataset, index.vocabulary) == ("mine", "vocabulary.tsv")
    assert load_vocabulary(str(out / "vocabulary.tsv")).by_id[1].names == ("teapot",)
    assert set(index.splits["train"].masks_per_class) <= {1, 2, 3}
    assert "of 4 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"), [({"workers": 0}, "--workers is 0"), ({"max_skipped": 1}, "--max-skipped is 1")]
)
def test_settings_that_make_no_sense(clean, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build(clean / "raw", tmp_path, **options)
