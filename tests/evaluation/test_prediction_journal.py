"""The journal of a prediction: what is believed of it, who may write to it, and that it is not left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from osm_lightning.evaluation.prediction_journal import PredictionJournal

PLAN = {"modes": "agnostic"}


def begun(out: Path, keys: str = "", plan: dict[str, str] = PLAN) -> PredictionJournal:
    """A journal that names images by their letters in one run."""
    journal = PredictionJournal(out)
    part = journal.join(journal.begin(plan), 0)
    for key in keys:
        part.append({"key": key})
    part.commit()
    part.close()
    return journal


def keys(out: Path) -> list[str]:
    return [row["key"] for _, row in PredictionJournal(out).rows()]


def test_runs_go_on_behind_each_other(tmp_path: Path) -> None:
    for letters, before in (("ab", ""), ("c", "ab"), ("", "abc")):
        journal = PredictionJournal(tmp_path)
        assert journal.begin(PLAN).named == frozenset(before)
        journal.close()
        begun(tmp_path, letters).close()
    assert keys(tmp_path) == ["a", "b", "c"]


@pytest.mark.parametrize("kept_bytes", range(1, 12))
def test_line_that_was_cut_off_counts_as_none(tmp_path: Path, kept_bytes: int) -> None:
    begun(tmp_path, "ab").close()
    (part,) = (tmp_path / ".predictions").glob("*.jsonl")
    first, second = part.read_bytes().splitlines(keepends=True)
    assert len(second) == 13
    part.write_bytes(first + second[:kept_bytes])
    assert PredictionJournal(tmp_path).begin(PLAN).named == {"a"}
    begun(tmp_path, "c").close()
    assert keys(tmp_path) == ["a", "c"]


def test_zeros_that_a_crash_left_count_as_none(tmp_path: Path) -> None:
    begun(tmp_path, "ab").close()
    (part,) = (tmp_path / ".predictions").glob("*.jsonl")
    first, second = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"\0" * (len(first) - 1) + b"\n" + second)
    journal = PredictionJournal(tmp_path)
    ((place, row),) = journal.rows()
    assert (row, place.offset) == ({"key": "b"}, len(first))


def test_lines_count_when_they_are_committed(tmp_path: Path) -> None:
    journal = PredictionJournal(tmp_path)
    part = journal.join(journal.begin(PLAN), 0)
    part.append({"key": "a"})
    assert keys(tmp_path) == []
    part.commit()
    assert keys(tmp_path) == ["a"]


def test_other_plan_is_refused_where_something_is_named(tmp_path: Path) -> None:
    begun(tmp_path, "ab").close()
    with pytest.raises(
        ValueError, match=r"holds 2 images .* \(modes: agnostic then, coco now; size: None then, 7 now\)"
    ):
        begun(tmp_path, plan={"modes": "coco", "size": "7"})
    assert keys(tmp_path) == ["a", "b"]


def test_other_plan_replaces_one_without_names(tmp_path: Path) -> None:
    journal = PredictionJournal(tmp_path)
    journal.begin(PLAN)  # and no more: as if it had been killed
    begun(tmp_path, "a", plan={"modes": "coco"}).close()
    assert begun(tmp_path, plan={"modes": "coco"}).begin({"modes": "coco"}).named == {"a"}


def test_nothing_is_left_of_a_run_that_named_nothing(tmp_path: Path) -> None:
    begun(tmp_path / "new").close()
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    begun(tmp_path / "old").close()
    assert list((tmp_path / "old").iterdir()) == []


@pytest.mark.parametrize("inside", ["", ".predictions"])
def test_folder_that_is_a_file(tmp_path: Path, inside: str) -> None:
    out = tmp_path / "out"
    if inside:
        out.mkdir()
    (out / inside).touch()
    with pytest.raises(ValueError, match=r"out: .*/out is no folder to write to"):
        PredictionJournal(out).begin(PLAN)


def test_folder_that_this_node_does_not_see(tmp_path: Path) -> None:
    beginning = PredictionJournal(tmp_path / "here").begin(PLAN)
    with pytest.raises(ValueError, match=r"rank 3 does not see .*/there/\.predictions.*All nodes must share"):
        PredictionJournal(tmp_path / "there").join(beginning, 3)


# Other processes

WRITER = """
import sys
from pathlib import Path
from osm_lightning.evaluation.prediction_journal import Beginning, PredictionJournal
journal, rank = PredictionJournal(Path(sys.argv[1])), int(sys.argv[2])
beginning = Beginning(1, frozenset()) if rank else journal.begin({"modes": "agnostic"})
part = journal.join(beginning, rank)
print("ready", flush=True)
sys.stdin.read()
"""


def writer(out: Path, rank: int) -> subprocess.Popen[str]:
    """A process that holds a part open."""
    command = [sys.executable, "-c", WRITER, str(out), str(rank)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("dead", [0, 1])
def test_any_living_rank_keeps_another_run_out(tmp_path: Path, dead: int) -> None:
    ranks = [writer(tmp_path, 0), writer(tmp_path, 1)]
    ranks[dead].kill()
    ranks[dead].communicate()
    with pytest.raises(ValueError, match="another `osm predict` writes to"):
        begun(tmp_path)
    ranks[1 - dead].kill()
    ranks[1 - dead].communicate()
    begun(tmp_path, "a").close()


def test_waiting_ends_when_the_last_one_has_ended(tmp_path: Path) -> None:
    ranks = [writer(tmp_path, 0), writer(tmp_path, 1)]
    waiting = subprocess.Popen([sys.executable, "-c", WAITING, str(tmp_path)])
    for process, how in zip(ranks, (signal.SIGKILL, None), strict=True):
        time.sleep(0.3)
        assert waiting.poll() is None
        if how is not None:
            os.kill(process.pid, how)
        process.communicate("")
    assert waiting.wait(60) == 0


WAITING = """
import sys
from pathlib import Path
from osm_lightning.evaluation.prediction_journal import Beginning, PredictionJournal
PredictionJournal(Path(sys.argv[1])).wait(Beginning(1, frozenset()), 2)
"""
