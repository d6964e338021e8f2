"""The training loader: one epoch of the mixture after another, and going on in the middle of one.

What a checkpoint keeps is not where the workers are, who read ahead, but where they were when they made the last batch
that was handed out.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import astuple, replace
from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader

from osm_lightning.batch import MaskBatch
from osm_lightning.data.mixture import Mixture, Progress
from osm_lightning.data.stream import Place
from osm_lightning.data.worker import end_workers_at_exit, start_worker


class EpochLoader(DataLoader[MaskBatch]):
    """A loader that knows how far it is. Iterated anew it begins the next epoch, if it has begun this one."""

    dataset: Mixture  # type: ignore[assignment]

    def __init__(
        self,
        mixture: Mixture,
        num_workers: int = 0,
        resume_approximately: bool = False,
        batches_taken: int | None = None,
    ) -> None:
        """Reads nothing before it is iterated.

        Args:
            mixture: what is loaded.
            num_workers: processes that prepare batches; 0 prepares them here.
            resume_approximately: take up the state of another number of readers.
            batches_taken: batches after which the trainer ends an epoch, if that is not all of them.
        """
        end_workers_at_exit()
        super().__init__(
            mixture,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=num_workers,
            worker_init_fn=start_worker,
        )
        self.resume_approximately = resume_approximately
        self.batches_taken = len(mixture) if batches_taken is None else batches_taken
        self.progress = Progress(epoch=-1)
        self._resumed = False

    def __iter__(self) -> Iterator[MaskBatch]:  # type: ignore[override]
        unfinished = self.progress.epoch >= 0 and self.progress.delivered < self.batches_taken
        # A run that is resumed in a validation makes an iterator and takes nothing from it.
        untouched = unfinished and not self.progress.delivered
        if not (untouched or (self._resumed and unfinished)):
            self.progress = Progress(epoch=self.progress.epoch + 1)
        self._resumed = False
        self.dataset.progress = self.progress
        return self._handed_out(super().__iter__())

    def _handed_out(self, batches: Iterator[Any]) -> Iterator[MaskBatch]:
        for mixed in batches:
            places = {**self.progress.places, mixed.reader: mixed.places}
            self.progress = replace(self.progress, delivered=self.progress.delivered + 1, places=places)
            yield mixed.batch

    @property
    def _num_readers(self) -> int:
        """Readers of this process: its workers, or itself."""
        return max(1, self.num_workers)

    @property
    def _readers(self) -> dict[str, Any]:
        """What must be the same for a state to be taken up exactly."""
        return {
            "processes": self.dataset.rank.count,
            "num_workers": self.num_workers,
            "sources": [source.labels.dataset for source in self.dataset.sources],
        }

    def own_places(self) -> dict[int, list[Any]]:
        """Where the readers of this process are; of the others it knows no more than what a run was resumed with."""
        first = self.dataset.rank.index * self._num_readers
        return {
            reader: [list(astuple(place)) for place in of]
            for reader, of in self.progress.places.items()
            if first <= reader < first + self._num_readers
        }

    def state(self) -> dict[str, Any]:
        """How far all processes are; every process must call it at the same batch.

        Returns:
            Plain numbers, texts and lists, as a checkpoint may hold.
        """
        places = self.own_places()
        if self.dataset.rank.count > 1:
            gathered: list[Any] = [None] * self.dataset.rank.count
            dist.all_gather_object(gathered, places)
            places = {reader: of for rank in gathered for reader, of in rank.items()}
        return {
            "epoch": self.progress.epoch,
            "delivered": self.progress.delivered,
            "readers": self._readers,
            "places": places,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on where a checkpoint left off.

        Raises:
            ValueError: the state is of another number of processes or workers, or of other sources, and
                `resume_approximately` is not set.
        """
        self._resumed = True
        places = {
            int(reader): tuple(Place(number, taken, tuple(broken)) for number, taken, broken in of)
            for reader, of in state["places"].items()
        }
        theirs, ours = state["readers"], self._readers
        if places and theirs != ours:
            changed = ", ".join(
                f"{what} was {theirs[what]}, is {ours[what]}" for what in ours if theirs[what] != ours[what]
            )
            if not self.resume_approximately:
                raise ValueError(
                    f"the checkpoint holds how far each reader of the data was, and since then {changed}: the next "
                    "batches would not be those of the uninterrupted run. Resume with what was, or set "
                    "data.resume_approximately to go on with newly shuffled data."
                )
            warnings.warn(f"Resuming approximately: {changed}. The rest of the epoch is shuffled anew.", stacklevel=2)
            number = 1 + max(place.number for of in places.values() for place in of)
            fresh = (Place(number),) * len(self.dataset.sources)
            places = dict.fromkeys(range(self.dataset.rank.count * self._num_readers), fresh)
        self.progress = Progress(state["epoch"], state["delivered"], places)
