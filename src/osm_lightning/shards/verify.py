"""Whether a shard folder is sound: its files are those of the index, and every sample is what it says, to the pixel.

All that is wrong is counted by kind; nothing is changed. `check_record` also gives the record as it should be, where
that takes no guessing: areas and boxes measured anew, segments without pixels dropped. Nothing else can be mended.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import tarfile
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread

import numpy as np

from osm_lightning.datasets import ignored_ids
from osm_lightning.picture import decode_image
from osm_lightning.record import Record, Segment, box_of, encode_segment_map
from osm_lightning.rle import area_and_box, check_fills, decode_runs
from osm_lightning.shard_index import ShardInfo
from osm_lightning.shard_tar import MAX_MEMBER_BYTES, Entry, Member, read_record
from osm_lightning.shards.inspect import Split
from osm_lightning.shards.source import Findings

Box = tuple[int, int, int, int]  # x, y, width, height


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard to check. Small: worker processes receive it."""

    path: Path
    info: ShardInfo
    class_ids: Set[int] | None
    """Classes that segments may have; None where there is no vocabulary."""


@dataclass(slots=True)
class CheckedShard:
    """What is wrong with a shard, and what of it is usable."""

    shard: Shard
    findings: Findings = field(default_factory=Findings)
    keys: list[str] = field(default_factory=list)
    """Of every sample, in order."""
    usable: dict[int, bool] = field(default_factory=dict)
    """From the place of a usable sample to whether it needs mending."""


@dataclass(slots=True)
class Verification:
    """What is wrong with a shard folder, and what of it is usable."""

    findings: Findings = field(default_factory=Findings)
    shards: dict[str, list[CheckedShard]] = field(default_factory=dict)
    """From split to those of its shards that are there, in order."""


def verify(splits: Sequence[Split], workers: int, on_samples: Callable[[int], object]) -> Verification:
    """Checks splits of one shard folder, in parallel over shards.

    Args:
        splits: what to check.
        workers: number of processes.
        on_samples: called after each shard with the number of its samples.

    Raises:
        ValueError: a worker process died.
    """
    found = Verification()
    jobs: dict[str, list[Shard]] = {split.name: [] for split in splits}
    for split in splits:
        known = None if split.vocabulary is None else {*split.vocabulary.by_id, *ignored_ids(split.index.dataset)}
        for info in split.info.shards:
            if (split.folder / info.file).is_file():
                jobs[split.name].append(Shard(split.folder / info.file, info, known))
            else:
                found.findings.add("shards that are missing", info.file)
    for name in _unlisted(splits):
        found.findings.add("tars that index.json does not list", name)
    results = _check_all([shard for of in jobs.values() for shard in of], workers)
    for name, shards in jobs.items():
        found.shards[name] = []
        for shard in shards:
            found.shards[name].append(next(results))
            found.findings.merge(found.shards[name][-1].findings)
            on_samples(shard.info.num_samples)
        _check_keys(found.shards[name], found.findings)
    return found


def _unlisted(splits: Sequence[Split]) -> list[str]:
    """Tars of the folder, or of the splits if these are not all of it, that the index does not list."""
    index, names = splits[0].index, {split.name for split in splits}
    listed = {shard.file for info in index.splits.values() for shard in info.shards}
    tars = sorted({path.name for path in splits[0].folder.glob("*.tar")} - listed)
    return [tar for tar in tars if names == set(index.splits) or tar.rpartition("-")[0] in names]


def _check_all(shards: Sequence[Shard], workers: int) -> Iterator[CheckedShard]:
    if min(workers, len(shards)) <= 1:
        yield from map(check_shard, shards)
        return
    spawn = multiprocessing.get_context("spawn")  # not fork: a progress bar has a thread
    pool = ProcessPoolExecutor(min(workers, len(shards)), spawn, _end_with_parent)
    try:
        yield from pool.map(check_shard, shards)
    except BrokenProcessPool as error:
        raise ValueError(
            f"a process of --workers {workers} was killed, most likely for lack of memory. Use fewer workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Ends this worker when its parent is killed, and at once on Ctrl-C: what happened, the parent says."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    Thread(target=follow, daemon=True).start()


def _check_keys(shards: Sequence[CheckedShard], findings: Findings) -> None:
    file_of: dict[str, str] = {}
    for file, key in ((checked.shard.info.file, key) for checked in shards for key in checked.keys):
        if key in file_of:
            findings.add("sample keys that stand twice in a split", f"{key} in {file_of[key]} and {file}")
        file_of.setdefault(key, file)


def check_shard(shard: Shard) -> CheckedShard:
    """Checks one tar and every sample in it."""
    checked = CheckedShard(shard)
    info, findings = shard.info, checked.findings
    try:
        with shard.path.open("rb") as file:
            sha256, num_bytes = hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
    except OSError as error:
        findings.add("shards that cannot be read", f"{info.file}: {error}")
        return checked
    if num_bytes != info.bytes:
        findings.add("shards of another size", f"{info.file}: {num_bytes:,} bytes, but index.json says {info.bytes:,}")
    elif sha256 != info.sha256:
        findings.add("shards of another sha256 than index.json says", info.file)
    entries, broken_by = scan(shard.path)
    if broken_by is not None:
        findings.add("shards that break off", f"{info.file}: {broken_by}")
    num_masks = [_check_sample(entry, place, checked) for place, entry in enumerate(entries)]
    holds = len(entries), sum(num or 0 for num in num_masks)
    if broken_by is None and None not in num_masks and holds != (info.num_samples, info.num_masks):
        findings.add("shards that index.json miscounts", f"{info.file}: {holds[0]} samples, {holds[1]} masks")
    return checked


def scan(path: Path) -> tuple[list[Entry], str | None]:
    """Finds the samples of a tar as far as it can be read, and says what broke it off, if anything did.

    `shard_tar.read_table` would give nothing of a broken tar, and one sample where two share a key.
    """
    entries: list[Entry] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for file in tar:
                if not file.isfile():
                    continue
                if file.size > MAX_MEMBER_BYTES:
                    return entries, f"{file.name} has {file.size:,} bytes; more than {MAX_MEMBER_BYTES:,} are refused"
                key, _, ending = file.name.partition(".")
                member = Member(ending, file.offset_data, file.size)
                if entries and entries[-1].key == key and all(m.ending != ending for m in entries[-1].members):
                    entries[-1] = Entry(key, (*entries[-1].members, member))
                else:
                    entries.append(Entry(key, (member,)))
    except (OSError, tarfile.TarError, ValueError, OverflowError) as error:
        return entries, str(error)
    return entries, None


def _check_sample(entry: Entry, place: int, checked: CheckedShard) -> int | None:
    """Checks a sample; returns how many masks it says it has, None if it can't be read."""
    shard, findings = checked.shard, checked.findings
    checked.keys.append(entry.key)
    try:
        record = read_record(shard.path, entry)
    except ValueError as error:
        findings.add("samples that cannot be read", f"{shard.info.file}: {error}")
        return None
    where = f"{shard.info.file}, sample {record.key}"
    try:
        good = check_record(record, shard.class_ids, where, findings)
        if good is not None:
            checked.usable[place] = good is not record
    except Exception as error:  # what a library raises over a hostile file is that sample's fault, not the end of all
        findings.add("samples that cannot be decoded", f"{where}: {error!r}")
    return sum(segment.is_mask for segment in record.segments)


def check_record(record: Record, class_ids: Set[int] | None, where: str, findings: Findings) -> Record | None:
    """Checks a sample, pixels and all.

    Args:
        record: the sample.
        class_ids: classes that segments may have; None where there is no vocabulary.
        where: what findings call the sample.
        findings: takes what is wrong.

    Returns:
        The record itself if nothing is wrong, a mended one, or None where mending would be guessing.
    """
    is_image_good = _check_image(record, where, findings)
    num_misnamed = sum(not _check_name(segment, class_ids, where, findings) for segment in record.segments)
    measure = _measure_rle if record.segment_map_png is None else _measure_map
    measured = measure(record, where, findings)
    if measured is None:
        return None
    segments = []
    for segment, (area_px, box) in zip(record.segments, measured, strict=True):
        which = f"{where}, segment {segment.id}"
        if area_px == 0:
            findings.add("segments without pixels", which)
            continue
        if segment.area_px != area_px:
            findings.add("segments of another area", f"{which}: {area_px} px, not {segment.area_px}")
        if segment.bbox_xywh_px != box:
            findings.add("segments with another box", f"{which}: {box}, not {segment.bbox_xywh_px}")
        segments.append(replace(segment, area_px=area_px, bbox_xywh_px=box))
    if num_misnamed or not is_image_good:
        return None
    if tuple(segments) == record.segments:
        return record
    if (segment_map := record.segment_map()) is None:
        return replace(record, segments=tuple(segments))
    is_kept = np.array([False, *(area_px > 0 for area_px, _ in measured)])
    numbers = np.cumsum(is_kept).astype(np.uint16)  # those of dropped segments are met at no pixel
    return replace(record, segments=tuple(segments), segment_map_png=encode_segment_map(numbers[segment_map]))


def _check_image(record: Record, where: str, findings: Findings) -> bool:
    try:
        width_px, height_px = decode_image(record.image_bytes, record.key).size
    except ValueError as error:
        findings.add("images that cannot be decoded", f"{where}: {error}")
        return False
    if (width_px, height_px) != (record.width_px, record.height_px):
        says = f"{width_px} x {height_px} px, not {record.width_px} x {record.height_px}"
        findings.add("images of another size than recorded", f"{where}: {says}")
        return False
    return True


def _check_name(segment: Segment, class_ids: Set[int] | None, where: str, findings: Findings) -> bool:
    """Whether a segment can be named: by its class or, without class or vocabulary, by free text. Crowds need not."""
    if segment.class_id is None or class_ids is None:
        kind, is_good = "segments without class or name", segment.iscrowd or bool((segment.name or "").strip())
    else:
        kind, is_good = "segments of a class that the vocabulary lacks", segment.class_id in class_ids
    if not is_good:
        findings.add(kind, f"{where}, segment {segment.id}: class {segment.class_id}")
    return is_good


def _measure_map(record: Record, where: str, findings: Findings) -> list[tuple[int, Box]] | None:
    """Area and box of every segment of a segment map; None, and a finding, where the map can't be trusted."""
    try:
        segment_map = record.segment_map()
    except ValueError as error:
        findings.add("segment maps that do not fit", f"{where}: {error}")
        return None
    assert segment_map is not None
    if segment_map.max(initial=0) < 256 and any(segment.area_px > 0 for segment in record.segments[255:]):
        # Pixels of the later segments lie in the earlier ones, so that even those are not what they say.
        findings.add("segment maps cut from 16 bits to 8", f"{where}: {len(record.segments)} segments")
        return None
    areas_px = np.bincount(segment_map.ravel(), minlength=len(record.segments) + 1)[1:].tolist()
    return [(area_px, box_of(segment_map == number)) for number, area_px in enumerate(areas_px, start=1)]


def _measure_rle(record: Record, where: str, findings: Findings) -> list[tuple[int, Box]] | None:
    """Area and box of every segment by its RLE; None, and findings, where some are broken."""
    measured = []
    for segment in record.segments:
        counts = segment.rle or ""
        try:
            check_fills(decode_runs(counts), record.height_px, record.width_px)
            measured.append(area_and_box(counts, record.height_px))
        except ValueError as error:
            findings.add("segments with broken RLE", f"{where}, segment {segment.id} {error}")
    return measured if len(measured) == len(record.segments) else None
