"""Samples of the data pipeline as cards: what training draws, what validation shows, and any of it again by its key.

A training sample depends on seed, epoch, pass, data source and key alone. Which step it comes in, and in which mode,
also depends on how many processes and workers read; here one process reads, without workers.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from osm_lightning.commands.browse_page import Card, ShownMask
from osm_lightning.record import Record
from osm_lightning.shard_tar import Entry, read_record, read_table

if TYPE_CHECKING:  # commands are imported for their --help, which need not wait for torch
    from torch import Tensor

    from osm_lightning.batch import MaskBatch, MaskSample
    from osm_lightning.data.mixture import Mixture, Source
    from osm_lightning.data.module import OSMData
    from osm_lightning.data.stream import ShardSet
    from osm_lightning.data.whole import Whole


def train_cards(data: OSMData, epoch: int, num: int) -> Iterator[Card]:
    """Images of an epoch's first batches. Of the last batch every data source shows as many as any other."""
    mixture = _mixture(data, epoch)
    records = [_places(source.shards) for source in mixture.sources]
    missing = num
    for step, mixed in enumerate(mixture):
        batch = mixed.batch
        datasets = [int(batch.dataset_M[batch.image_index_M == image][0]) for image in range(batch.num_images)]
        for image in _spread(datasets, missing):
            dataset, key = datasets[image], batch.keys[image]
            last = mixed.places[dataset].number
            record = read_record(*records[dataset][key])
            number, sample = _find_draw(
                mixture, mixture.sources[dataset], record, epoch, last, batch.images_I3SS[image]
            )
            origin, options = f"epoch {epoch}, pass {number}, step {step}", f"--epoch {epoch} --num {number + 1}"
            yield _card(data, batch, image, origin, options, sample.num_vanished)
        missing -= batch.num_images
        if missing <= 0:
            return


def replayed_cards(data: OSMData, epoch: int, name: str, num_passes: int) -> Iterator[Card]:
    """One image as the first passes of an epoch draw it. Modes are left out: a step draws them, not a sample.

    Raises:
        ValueError: there is no such image, or none of the draws has a usable mask.
    """
    from osm_lightning.data.collate import collate

    mixture = _mixture(data, epoch)
    sources = {source.labels.dataset: source for source in mixture.sources}
    dataset, key = _split_name(name, list(sources))
    record = _find(sources[dataset].shards, dataset, key)
    draws = [(number, mixture.draw(sources[dataset], record, epoch, number)) for number in range(num_passes)]
    if all(sample is None for _, sample in draws):
        raise ValueError(
            f"--key {name}: training passes over this image, because none of {mixture.view.max_tries} crops leaves a "
            f"mask of more than {mixture.view.min_mask_px} px that has a name and may be trained on. Lower "
            "--data.min_mask_px to see it."
        )
    for number, sample in draws:
        if sample is not None:
            origin, options = f"epoch {epoch}, pass {number}", f"--epoch {epoch} --num {number + 1}"
            yield _card(data, collate([sample], (dataset,)), 0, origin, options, sample.num_vanished, with_modes=False)


def val_cards(data: OSMData, num: int, name: str | None) -> Iterator[Card]:
    """Validation images, spread evenly over every split that is validated; or the one that is named.

    Raises:
        ValueError: there is no such image.
    """
    from osm_lightning.data.collate import collate
    from osm_lightning.data.sample import whole_sample

    loaders = zip(data.val_names(), data.val_dataloader(), strict=True)
    splits = {dataset: cast("Whole", loader.dataset) for dataset, loader in loaders}
    if name is not None:
        dataset, key = _split_name(name, list(splits))
        split = splits[dataset]
        samples = iter([whole_sample(_find(split.records, dataset, key), split.labels, split.view, split.codec)])
    else:
        shares = {dataset: num // len(splits) + (i < num % len(splits)) for i, dataset in enumerate(splits)}
        samples = (
            split[number * len(split) // share]
            for split, share in ((splits[dataset], min(len(splits[dataset]), of)) for dataset, of in shares.items())
            for number in range(share)
        )
    for sample in samples:
        batch = collate([sample], (sample.dataset,))
        yield _card(data, batch, 0, "validation, whole image", "--val", sample.num_vanished, with_modes=False)


def _card(
    data: OSMData, batch: MaskBatch, image: int, origin: str, options: str, num_vanished: int, with_modes: bool = True
) -> Card:
    """One image of a batch and its masks, as the batch has them; texts are read back from their ids."""
    from osm_lightning.batch import FREE_TEXT

    masks, dataset = [], batch.datasets[0]
    for row in (batch.image_index_M == image).nonzero().flatten().tolist():
        ids, prompt_tokens = (
            batch.text_ids_ML[row, : batch.text_tokens_M[row]].tolist(),
            int(batch.prompt_tokens_M[row]),
        )
        class_id, dataset = int(batch.class_id_M[row]), batch.datasets[int(batch.dataset_M[row])]
        x0, y0, x1, y1 = batch.context_box_px_M4[row].tolist()
        masks.append(
            ShownMask(
                mask_id=batch.mask_ids[row],
                class_id=None if class_id == FREE_TEXT else class_id,
                answer=data.codec.decode(ids[prompt_tokens:]).strip(),
                prompt=data.codec.decode(ids[:prompt_tokens]),
                mode=data.modes[int(batch.mode_M[row])] if with_modes else None,
                shares_GG=batch.coverage_MGG[row].numpy(),
                context_box_px=(x0, y0, x1, y1),
            )
        )
    replay = f"--key {shlex.quote(f'{dataset}/{batch.keys[image]}')} {options}"
    pixels = batch.images_I3SS[image].permute(1, 2, 0).numpy()
    return Card(dataset, batch.keys[image], origin, replay, pixels, num_vanished, tuple(masks))


def _mixture(data: OSMData, epoch: int) -> Mixture:
    from osm_lightning.data.mixture import Progress

    mixture = data.train_dataloader().dataset
    mixture.progress = Progress(epoch)
    return mixture


def _find_draw(
    mixture: Mixture, source: Source, record: Record, epoch: int, last: int, image_3SS: Tensor
) -> tuple[int, MaskSample]:
    """The pass, `last` or one before, that drew an image of a batch, and all of that draw: a batch keeps neither."""
    for number in range(last, -1, -1):
        sample = mixture.draw(source, record, epoch, number)
        if sample is not None and sample.image_3SS.equal(image_3SS):
            return number, sample
    raise AssertionError(f"{source.labels.dataset}/{record.key} is drawn by another rule than the mixture's")


def _spread(datasets: Sequence[int], num: int) -> list[int]:
    """Places of at most `num` images, in order: the first of every dataset before the second of any."""
    turn = [datasets[:place].count(dataset) for place, dataset in enumerate(datasets)]
    return sorted(sorted(range(len(datasets)), key=turn.__getitem__)[:num])


def _places(shards: ShardSet) -> dict[str, tuple[Path, Entry]]:
    """From key to where a sample lies: reads the headers of all of the split's tars."""
    paths = [shards.path(shard) for shard in range(len(shards.shards))]
    return {entry.key: (path, entry) for path in paths for entry in read_table(path)}


def _find(shards: ShardSet, dataset: str, key: str) -> Record:
    places = _places(shards)
    if key not in places:
        raise ValueError(
            f"--key {dataset}/{key}: split {shards.split!r} of {shards.folder.location} has no such sample; its "
            f"{len(places):,} keys are like {', '.join(list(places)[:3])}. Give one of them; --val looks in the "
            "validation split."
        )
    return read_record(*places[key])


def _split_name(name: str, datasets: Sequence[str]) -> tuple[str, str]:
    dataset, _, key = name.partition("/")
    if dataset not in datasets or not key:
        raise ValueError(
            f"--key is {name!r}, but must be DATASET/KEY, with a data source of the config that has the split: "
            f"{', '.join(datasets)}."
        )
    return dataset, key
