"""The mixture: every step holds each data source's quota of masks, half of them in the source's own mode.

Quotas and halves are exact in every batch, whatever images give: an image gives up to K masks, the last one no more
than are missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from osm_lightning.batch import AGNOSTIC, MaskBatch, MaskSample
from osm_lightning.data.collate import collate
from osm_lightning.data.sample import Labels, View, draw_sample, generator
from osm_lightning.data.stream import ShardSet, Share, stream
from osm_lightning.data.text import TextCodec

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


class Mixture(IterableDataset[MaskBatch]):
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
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[MaskBatch]:
        # The epoch is read here, not when the first batch is asked for: by then it may be the next one's.
        return self._batches(self.epoch)

    def _batches(self, epoch: int) -> Iterator[MaskBatch]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info is not None else (0, 1)
        share = Share(self.rank.index * num_workers + worker, self.rank.count * num_workers)
        names = [source.labels.dataset for source in self.sources]
        streams = [self._samples(source, epoch, share) for source in self.sources]
        for number in range(worker, self.num_batches, num_workers):
            rng = generator(self.seed, epoch, "modes", share.index, number)
            samples: list[MaskSample] = []
            modes: list[int] = []
            for source, drawn in zip(self.sources, streams, strict=True):
                samples += take(drawn, source.quota)
                modes += halve(source, self.agnostic_share, rng)
            yield collate(samples, names, modes)

    def _samples(self, source: Source, epoch: int, share: Share) -> Iterator[MaskSample]:
        """Drawn samples of one source, without end.

        Raises:
            ValueError: MAX_IN_VAIN images in a row gave not one usable mask.
        """
        dataset, in_vain = source.labels.dataset, 0
        for number, record in stream(source.shards, self.seed, epoch, share):
            rng = generator(self.seed, epoch, number, dataset, record.key)
            sample = draw_sample(record, source.labels, self.view, self.codec, self.masks_per_image, rng)
            if sample is not None:
                in_vain = 0
                yield sample
                continue
            in_vain += 1
            if in_vain == MAX_IN_VAIN:
                raise ValueError(
                    f"data.sources.{dataset}: {in_vain} images in a row had no mask of more than "
                    f"{self.view.min_mask_px} px that has a name and may be trained on. Lower data.min_mask_px, set "
                    f"data.sources.{dataset}.vocabulary, or look at the shards."
                )


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
