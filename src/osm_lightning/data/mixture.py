"""The mixture: every step holds each data source's quota of masks, half of them in the source's own mode.

Quotas and halves are exact in every batch, whatever images give: an image gives up to K masks, the last one no more
than are missing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from osm_lightning.batch import AGNOSTIC, MaskBatch, MaskSample
from osm_lightning.data.collate import collate
from osm_lightning.data.sample import Labels, View, draw_sample, generator
from osm_lightning.data.stream import Place, ShardSet, Share, stream
from osm_lightning.data.text import TextCodec
from osm_lightning.record import Record

MAX_IN_VAIN = 1000
"""Images in a row without a usable mask after which a source is given up. More than a reader's share of one pass, which
may be a few images that happen to have none."""


@dataclass(frozen=True)
class Source:
    """A data source, resolved: where its records are, what its names mean, how much of it a step holds."""

    labels: Labels
    shards: ShardSet
    quota: int
    """Masks of it in every batch."""
    mode: int
    """Index of its own mode."""
    max_skipped: float = 0.0
    """Share of its images that a reader may skip because they are broken; the first one beyond ends the run."""
    repeat_threshold: float | None = None
    """Images with a class that fewer than this share of images have are read more often; None reads all alike."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an epoch has come on one rank."""

    epoch: int = 0
    delivered: int = 0
    """Batches that have been handed out."""
    places: Mapping[int, tuple[Place, ...]] = field(default_factory=dict)
    """From reader (rank and worker) to its place in every source, after the last batch of its that was handed out."""


@dataclass(frozen=True, slots=True)
class Mixed:
    """A batch, and where its reader stands after it. They travel together: what is prefetched has not been seen."""

    batch: MaskBatch
    reader: int
    places: tuple[Place, ...]

    def pin_memory(self) -> Mixed:
        """Pins the batch."""
        return replace(self, batch=self.batch.pin_memory())


class Mixture(IterableDataset[Mixed]):
    """Batches of all sources, for one epoch at a time."""

    def __init__(
        self,
        sources: Sequence[Source],
        view: View,
        codec: TextCodec,
        *,
        masks_per_image: int,
        agnostic_share: float,
        num_batches: int,
        seed: int,
        rank: Share,
    ) -> None:
        """Only remembers; reading starts with iteration.

        Args:
            sources: what is mixed.
            view: how records are turned into what the model sees.
            codec: tokenizers.
            masks_per_image: masks that an image gives at most (K).
            agnostic_share: share of every source's masks that is trained in the agnostic mode.
            num_batches: batches of an epoch on this rank.
            seed: run's seed.
            rank: this process among all.
        """
        super().__init__()
        self.sources, self.view, self.codec = sources, view, codec
        self.masks_per_image, self.agnostic_share = masks_per_image, agnostic_share
        self.num_batches, self.seed, self.rank = num_batches, seed, rank
        self.progress = Progress()

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Mixed]:
        # The progress is read here, not when the first batch is asked for: by then it may have gone on.
        return self._batches(self.progress)

    def draw(self, source: Source, record: Record, epoch: int, number: int) -> MaskSample | None:
        """What training makes of a record in a pass of an epoch, whoever reads it; None if no mask of it is usable.

        Raises:
            ValueError: the record is broken, or a class is not in the vocabulary.
        """
        rng = generator(self.seed, epoch, number, source.labels.dataset, record.key)
        return draw_sample(record, source.labels, self.view, self.codec, self.masks_per_image, rng)

    def _batches(self, begun: Progress) -> Iterator[Mixed]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info is not None else (0, 1)
        # A loader asks its first worker first; the batch that is due may be another's.
        turn = (worker + begun.delivered) % num_workers
        share = Share(self.rank.index * num_workers + turn, self.rank.count * num_workers)
        names = [source.labels.dataset for source in self.sources]
        starts = begun.places.get(share.index, (Place(),) * len(self.sources))
        readers = [
            _Reader(self, source, begun.epoch, share, start) for source, start in zip(self.sources, starts, strict=True)
        ]
        for number in range(begun.delivered + worker, self.num_batches, num_workers):
            rng = generator(self.seed, begun.epoch, "modes", share.index, number)
            samples: list[MaskSample] = []
            modes: list[int] = []
            skipped = sum(len(reader.place.broken) for reader in readers)
            for source, reader in zip(self.sources, readers, strict=True):
                samples += take(reader, source.quota)
                modes += halve(source, self.agnostic_share, rng)
            skipped = sum(len(reader.place.broken) for reader in readers) - skipped
            batch = replace(collate(samples, names, modes), num_skipped=skipped)
            yield Mixed(batch, share.index, tuple(reader.place for reader in readers))


class _Reader(Iterator[MaskSample]):
    """Drawn samples of one source, without end, and the place that the last one was found at."""

    def __init__(self, mixture: Mixture, source: Source, epoch: int, share: Share, start: Place) -> None:
        self.place = start
        self._mixture, self._source, self._epoch = mixture, source, epoch
        self._stream = stream(source.shards, mixture.seed, epoch, share, start, source.repeat_threshold)

    def __next__(self) -> MaskSample:
        """Draws on, past images without a usable mask.

        Raises:
            ValueError: MAX_IN_VAIN images in a row gave not one usable mask, or too many are broken.
        """
        mixture, labels = self._mixture, self._source.labels
        for _ in range(MAX_IN_VAIN):
            place, (shard, position) = next(self._stream)
            self.place = replace(place, broken=self.place.broken)
            self._source.shards.path(shard)  # a server that does not answer is no broken sample
            try:
                record = self._source.shards.read(shard, position)
                sample = mixture.draw(self._source, record, self._epoch, place.number)
            except ValueError as error:
                self._skip(self._source.shards.name(shard, position), error)
                continue
            if sample is not None:
                return sample
        raise ValueError(
            f"data.sources.{labels.dataset}: {MAX_IN_VAIN} images in a row had no mask of more than "
            f"{mixture.view.min_mask_px} px that has a name and may be trained on. Lower data.min_mask_px, set "
            f"data.sources.{labels.dataset}.vocabulary, or look at the shards."
        )

    def _skip(self, sample: str, error: ValueError) -> None:
        """Passes over a broken sample, once the source allows for it.

        Raises:
            ValueError: more samples are broken than the source's share of skips.
        """
        if sample in self.place.broken:
            return
        source = self._source
        broken = (*self.place.broken, sample)
        if len(broken) > source.max_skipped * len(source.shards):
            name = source.labels.dataset
            skips = "" if len(broken) == 1 else f" It is number {len(broken)}: {', '.join(broken[:5])} ..."
            raise ValueError(
                f"data.sources.{name}: {error}{skips} To skip broken images, and count them, raise "
                f"data.sources.{name}.max_skipped (now {source.max_skipped:g}, a share of its {len(source.shards)} "
                "images); `osm shards verify` finds them all."
            ) from error
        warnings.warn(f"data.sources.{source.labels.dataset}: skipped. {error}", stacklevel=2)
        self.place = replace(self.place, broken=broken)


def take(samples: Iterator[MaskSample], quota: int) -> Iterator[MaskSample]:
    """Samples that hold exactly `quota` masks together; the last one is cut to fit."""
    missing = quota
    while missing:
        sample = next(samples).take(missing)
        missing -= sample.num_masks
        yield sample


def halve(source: Source, agnostic_share: float, rng: np.random.Generator) -> list[int]:
    """Mode of each of a source's masks in a batch: exactly the share is agnostic, in random order."""
    num_agnostic = round(source.quota * agnostic_share)
    modes = np.full(source.quota, source.mode)
    modes[:num_agnostic] = AGNOSTIC
    return rng.permutation(modes).tolist()
