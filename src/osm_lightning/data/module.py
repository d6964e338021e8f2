"""The LightningDataModule: which sources there are, and loaders for fit, validation and prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning
from torch.utils.data import DataLoader

from osm_lightning.batch import MaskBatch, mode_index, mode_names
from osm_lightning.data.collate import collate
from osm_lightning.data.geometry import Context, MaskRule
from osm_lightning.data.loader import EpochLoader
from osm_lightning.data.mixture import Mixture, Source
from osm_lightning.data.sample import PREDICTED, Labels, View
from osm_lightning.data.stream import ShardSet, Share
from osm_lightning.data.text import TextCodec
from osm_lightning.data.whole import Whole
from osm_lightning.data.worker import end_workers_at_exit, start_worker
from osm_lightning.datasets import DATASETS, ignored_ids
from osm_lightning.record import Record
from osm_lightning.vocabulary import load_vocabulary


@dataclass
class SourceConfig:
    """One data source. Its key in `data.sources` names it in logs, and its mode unless `mode` does."""

    shards: str
    """Shard folder with its index.json; or a file:, http(s):, s3: or pipe: url of one (docs/remote_shards.md)."""
    train: str | None = "train"
    """Split to train on; None leaves the source out of the mixture."""
    val: str | None = "val"
    """Split to validate on; None leaves it out of validation."""
    quota: int | None = None
    """Masks per step and process; None takes the dataset table's, or 4."""
    mode: str | None = None
    """The mode that stands for its vocabulary; None takes the source's key."""
    vocabulary: str | None = None
    """Key or TSV; None takes what the shards say."""
    weight: float = 1.0
    """Weight of its part of the loss."""
    max_skipped: float = 0.0
    """Share of its images that training may skip because they are broken; they are named and counted."""
    repeat_threshold: float | None = None
    """Read images with rare classes more often: a class that a share f < t of images have gives its images a factor of
    sqrt(t / f). 0.001 is usual for LVIS; None reads all images alike."""


class OSMData(lightning.LightningDataModule):
    """Masks of any number of data sources: mixed for training, all of each for validation."""

    def __init__(
        self,
        sources: dict[str, SourceConfig],
        tokenizer: str,
        instruction_tokenizer: str | None = None,
        modes: Sequence[str] = (),
        image_size_px: int = 1120,
        patch_size_px: int = 14,
        context: Context = 0.5,
        mask_rule: MaskRule = "touched",
        masks_per_image: int = 1,
        agnostic_share: float = 0.5,
        masks_per_epoch: int = 6_000_000,
        scale: tuple[float, float] = (0.5, 1.5),
        min_mask_px: int = 100,
        max_text_tokens: int | None = None,
        chat_template: bool = False,
        images_per_val_batch: int = 1,
        num_workers: int = 4,
        seed: int = 0,
        resume_approximately: bool = False,
    ) -> None:
        """Remembers the settings; nothing is opened before a loader is asked for.

        Args:
            sources: data sources by name.
            tokenizer: the LLM's tokenizer (linked to the model's).
            instruction_tokenizer: the Q-Former's (linked to the model's).
            modes: modes of the model, beside the agnostic one (linked to the model's).
            image_size_px: side of the input (linked to the model's).
            patch_size_px: side of a patch (linked to the model's).
            context: context ratio (linked to the model's).
            mask_rule: how masks lie on the grid of patches (linked to the model's).
            masks_per_image: masks that an image gives to a step at most (K). The paper and the released code use 1;
                more make a step cheaper per mask.
            agnostic_share: share of every source's masks that is trained in the agnostic mode.
            masks_per_epoch: masks of an epoch, over all sources and processes.
            scale: range of the long side in training, as a share of the input's.
            min_mask_px: masks of no more pixels than this after the crop are skipped in training.
            max_text_tokens: ids that a mask's prompt and name, and an instruction, are cut to (released: 32); null cuts
                nothing.
            chat_template: ask in the turns of the tokenizer's chat template (linked to the model's).
            images_per_val_batch: images of a validation or prediction batch, each with all its masks.
            num_workers: processes that prepare batches.
            seed: seed of shuffling, augmentation and prompts.
            resume_approximately: let a run that is resumed in the middle of an epoch go on with another number of
                workers or processes than it had. Its next batches are then not those of the uninterrupted run.

        Raises:
            ValueError: a setting is out of its range.
        """
        super().__init__()
        self.sources = sources
        self.modes = mode_names(modes)
        self.tokenizer, self.instruction_tokenizer = tokenizer, instruction_tokenizer
        self.max_text_tokens, self.chat_template = max_text_tokens, chat_template
        self.view = View(image_size_px, patch_size_px, context, scale, min_mask_px, mask_rule=mask_rule)
        self.masks_per_image, self.agnostic_share = masks_per_image, agnostic_share
        self.masks_per_epoch, self.images_per_val_batch = masks_per_epoch, images_per_val_batch
        self.num_workers, self.seed = num_workers, seed
        self.resume_approximately = resume_approximately
        self.in_step = False
        """Whether every process must have the same number of validation batches; the task sets it."""
        self.predicted: Sequence[Record] | None = None
        self._opened: dict[tuple[str | None, ...], tuple[Labels, ShardSet]] = {}
        self._loader: EpochLoader | None = None
        self._resumed: dict[str, Any] | None = None
        self._check()

    def _check(self) -> None:
        """Refuses settings that no data could make work."""
        low, high = self.view.scale
        for setting, value, rule, holds in (
            ("masks_per_image", self.masks_per_image, "at least 1", self.masks_per_image >= 1),
            ("images_per_val_batch", self.images_per_val_batch, "at least 1", self.images_per_val_batch >= 1),
            ("min_mask_px", self.view.min_mask_px, "at least 0", self.view.min_mask_px >= 0),
            ("agnostic_share", self.agnostic_share, "a share from 0 to 1", 0 <= self.agnostic_share <= 1),
            ("scale", self.view.scale, "a range of positive numbers, the lower one first", 0 < low <= high),
        ):
            if not holds:
                raise ValueError(f"data.{setting} is {value}, but must be {rule}.")
        for name, source in self.sources.items():
            threshold = source.repeat_threshold
            for setting, given, rule, holds in (
                ("max_skipped", source.max_skipped, "a share from 0 to 1", 0 <= source.max_skipped <= 1),
                ("repeat_threshold", threshold, "more than 0, or null", threshold is None or threshold > 0),
            ):
                if not holds:
                    raise ValueError(f"data.sources.{name}.{setting} is {given}, but must be {rule}.")
            if not source.weight > 0:
                raise ValueError(
                    f"data.sources.{name}.weight is {source.weight}, but must be more than 0. To leave a source out of "
                    "training, set its `train` to null."
                )

    @property
    def codec(self) -> TextCodec:
        """Both tokenizers; loaded on first use."""
        if not hasattr(self, "_codec"):
            self._codec = TextCodec(
                self.tokenizer, self.instruction_tokenizer, self.max_text_tokens, self.chat_template
            )
        return self._codec

    @property
    def rank(self) -> Share:
        """This process among all of the trainer's."""
        return Share() if self.trainer is None else Share(self.trainer.global_rank, self.trainer.world_size)

    def labels(self, name: str, split: str | None = None) -> Labels:
        """What the names of a source mean."""
        return self._open(name, split or self.sources[name].val or self.sources[name].train or "")[0]

    def val_names(self) -> tuple[str, ...]:
        """Sources that are validated, in the order of the loaders."""
        return tuple(name for name, source in self.sources.items() if source.val is not None)

    def train_dataloader(self) -> EpochLoader:
        """The mixture.

        Raises:
            ValueError: a quota that the mode halves don't divide, an unknown mode, or missing shards.
        """
        mixture = Mixture(
            self._train_sources(),
            self.view,
            self.codec,
            masks_per_image=self.masks_per_image,
            agnostic_share=self.agnostic_share,
            num_batches=self._num_batches(),
            seed=self.seed,
            rank=self.rank,
        )
        self._loader = EpochLoader(mixture, self.num_workers, self.resume_approximately, self.batches_per_epoch)
        if self._resumed is not None:
            self._loader.resume(self._resumed)
            self._resumed = None
        return self._loader

    def state_dict(self) -> dict[str, Any]:
        """How far training is. Not left to Lightning, which gives a loader its state back only in some resumed runs."""
        return {} if self._loader is None else {"loader": self._loader.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps it for the training loader, which is made later."""
        self._resumed = state_dict.get("loader")

    @property
    def batches_per_epoch(self) -> int:
        """Batches of an epoch that the trainer takes: `limit_train_batches` is a number, or a share of all."""
        limit = 1.0 if self.trainer is None else self.trainer.limit_train_batches
        num_batches = self._num_batches()
        return min(num_batches, limit) if isinstance(limit, int) else int(num_batches * limit)

    def _num_batches(self) -> int:
        per_step = sum(source.quota for source in self._train_sources()) * self.rank.count
        return max(1, self.masks_per_epoch // per_step)

    def _train_sources(self) -> list[Source]:
        sources = [self._source(name) for name, config in self.sources.items() if config.train is not None]
        if not sources:
            raise ValueError("data.sources holds nothing to train on: give at least one source a `train` split.")
        return sources

    def val_dataloader(self) -> list[DataLoader[MaskBatch]]:
        """One loader per source: all masks of every image of its `val` split, split by rank without padding."""
        loaders = []
        for name in self.val_names():
            labels, shards = self._open(name, self.sources[name].val or "")
            loaders.append(self._whole(Whole(shards, labels, self.view, self.codec)))
        return loaders

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> DataLoader[MaskBatch]:
        """All masks of the records in `predicted`, in their order.

        Raises:
            ValueError: there are no records.
        """
        if self.predicted is None:
            raise ValueError("there is nothing to predict: give --images and --masks.")
        return self._whole(Whole(self.predicted, PREDICTED, self.view, self.codec, keep_vanished=True))

    def _whole(self, dataset: Whole) -> DataLoader[MaskBatch]:
        # Processes that share the weights need as many batches each, all others at least one, or Lightning would leave
        # the loop out where the rest waits; what pads has no masks and counts nowhere.
        pads = self.in_step or len(dataset) < self.rank.count
        end = -(-len(dataset) // self.rank.count) * self.rank.count if pads else len(dataset)
        mine = range(self.rank.index, end, self.rank.count)
        end_workers_at_exit()
        return DataLoader(
            dataset,  # type: ignore[arg-type]
            batch_size=self.images_per_val_batch,
            sampler=mine,
            num_workers=self.num_workers,
            worker_init_fn=start_worker,
            collate_fn=partial(collate, datasets=(dataset.labels.dataset,)),
        )

    def _source(self, name: str) -> Source:
        config = self.sources[name]
        labels, shards = self._open(name, config.train or "")
        quota = config.quota
        if quota is None:
            quota = DATASETS[shards.index.dataset].quota if shards.index.dataset in DATASETS else 4
        if quota < 1 or abs(quota * self.agnostic_share - round(quota * self.agnostic_share)) > 1e-9:
            raise ValueError(
                f"data.sources.{name}.quota is {quota}, but a quota must be a whole number of masks of which "
                f"data.agnostic_share ({self.agnostic_share}) is whole too: that part is named with the agnostic mode, "
                "the rest with its own. Use a multiple of 2 for halves, or set data.agnostic_share to 0."
            )
        mode = mode_index(config.mode or name, self.modes)
        return Source(labels, shards, quota, mode, config.max_skipped, config.repeat_threshold)

    def _open(self, name: str, split: str) -> tuple[Labels, ShardSet]:
        config = self.sources[name]
        asked = (name, split, config.shards, config.vocabulary)
        if asked not in self._opened:  # a remote folder's index is fetched anew whenever it is opened
            self._opened[asked] = self._open_anew(name, config, split)
        return self._opened[asked]

    @staticmethod
    def _open_anew(name: str, config: SourceConfig, split: str) -> tuple[Labels, ShardSet]:
        shards = ShardSet(config.shards, split)
        key = config.vocabulary or shards.index.vocabulary
        beside = None if key is None else shards.folder.side_file(key)
        key = key if beside is None else str(beside)
        vocabulary = None if key is None else load_vocabulary(key)
        return Labels(name, vocabulary, ignored_ids(shards.index.dataset)), shards
