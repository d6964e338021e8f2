"""Checkpoints of all strategies: one content, two shapes on disk, and no kill that leaves half of one.

A process that holds everything writes a `.ckpt` file (`WholeFiles`), processes that hold parts write a folder
(`SavesTogether`). Resuming never uses an engine's own loading: whatever is given is read as a single process would have
saved it, and each strategy takes its parts of that. Frozen weights are neither written nor read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from osm_lightning.model.osm import OSM
from osm_lightning.training.optim import parameter_groups
from osm_lightning.weights.checkpoint import CONTENT_KEY, PREFIX, read_training_state
from osm_lightning.weights.sharded import Marker, partial_of, remove, seal


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Where to write a checkpoint; what was begun is removed if it fails, since the disk may be full.

    Raises:
        ValueError: it could not be written.
    """
    partial = partial_of(path)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
    except (OSError, RuntimeError) as error:
        remove(partial)
        raise ValueError(
            f"checkpoint {path} could not be written: {str(error).splitlines()[0]} The previous one is as it was. Make "
            "room (or give another --run), and go on with `osm fit --ckpt last`."
        ) from error


class WholeFiles(TorchCheckpointIO):
    """Files that are there whole or not at all; reads folders too."""

    def __init__(self, trusted: bool = False) -> None:
        """Takes whether folders without our marker may be unpickled."""
        super().__init__()
        self.trusted = trusted

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes beside, syncs, and renames.

        Raises:
            ValueError: it could not be written.
        """
        path = Path(path)
        with writing(path) as partial:
            if partial.is_dir():  # what another strategy was killed over
                remove(partial)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.is_dir():  # a folder of another strategy under the same name
                remove(path)
            partial.replace(path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a file or a folder."""
        return read_training_state(Path(path), self.trusted)


class WritesBeside(AsyncCheckpointIO):
    """Writes checkpoints in a thread, while training goes on; `teardown` waits for it, and raises its error."""

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Waits for the one before, since copies that wait for a slow disk would fill the memory.

        Raises:
            ValueError: the one before could not be written.
        """
        self.teardown()
        super().save_checkpoint(*args, **kwargs)


class SavesTogether(ParallelStrategy):
    """A strategy whose processes write their parts into one folder."""

    def save_parts(self, checkpoint: dict[str, Any], folder: Path) -> None:
        """Writes what the processes hold; all of them call it."""
        raise NotImplementedError

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes a folder, which takes the place of the previous one when it is whole.

        Raises:
            ValueError: it could not be written.
        """
        path = Path(self.broadcast(filepath))
        marker = self._marker(checkpoint)
        with writing(path) as partial:
            if self.is_global_zero:
                remove(partial)
                partial.mkdir()
            self.barrier()
            self.save_parts(checkpoint, partial)
            self.barrier()
            if self.is_global_zero:
                seal(path, marker)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a file or a folder of whichever strategy."""
        return read_training_state(Path(self.broadcast(checkpoint_path)), self._task.trust_checkpoint)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands the optimizer's state over as it does without shards."""
        return True

    def _marker(self, checkpoint: Mapping[str, Any]) -> Marker:
        osm, content = self.osm, checkpoint[CONTENT_KEY]
        shapes = {f"{PREFIX}{name}": list(shape) for name, shape in osm.kept_shapes().items()}
        groups = optimizer_groups(osm, self.optimizers[0]) if self.optimizers else []
        return Marker(
            type(self).__name__, self.world_size, checkpoint["global_step"], content["config"], content["frozen"],
            shapes, groups,
        )  # fmt: skip

    @property
    def osm(self) -> OSM:
        """The model of the task that is trained."""
        return cast("OSM", self._task.osm)

    @property
    def _task(self) -> Any:
        return self.lightning_module  # OSMTask, which stands above


def ordered_parameters(osm: OSM) -> list[list[tuple[str, nn.Parameter]]]:
    """Names (in the LightningModule) and parameters, in the order in which the optimizer numbers them, by group."""
    names = {id(parameter): f"{PREFIX}{name}" for name, parameter in osm.trained()}
    return [[(names[id(p)], p) for p in group["params"]] for group in parameter_groups(osm, 0.0)]


def optimizer_groups(osm: OSM, optimizer: Optimizer) -> list[dict[str, Any]]:
    """The optimizer's groups with names in place of parameters, as JSON may hold them."""
    return [
        {key: value for key, value in group.items() if isinstance(value, int | float | str | list | tuple | None)}
        | {"params": [name for name, _ in named]}
        for group, named in zip(optimizer.param_groups, ordered_parameters(osm), strict=True)
    ]


def saved_states(osm: OSM, saved: Mapping[str, Any]) -> Iterator[tuple[nn.Parameter, dict[str, Tensor]]]:
    """Parameters, and what a saved optimizer remembers of each."""
    flat = [parameter for group in ordered_parameters(osm) for _, parameter in group]
    return ((flat[number], state) for number, state in sorted(saved["state"].items()))


def take_settings(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Gives the optimizer's groups the saved settings, the learning rate of the moment among them."""
    for group, of in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in of.items() if key != "params"})
