"""Putting trained tensors into a model: exactly those it trains, of its shapes, over the frozen parts it expects."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from osm_lightning.batch import AGNOSTIC
from osm_lightning.model.osm import OSM
from osm_lightning.weights.checkpoint import Checkpoint

MODE_TABLES = ("modes.query", "modes.embedding")
"""Tables with one row per mode."""

SHOWN = 5
"""Examples of each kind of problem that an error shows."""


def check_tensors(model: OSM, tensors: Mapping[str, Tensor], frozen: Mapping[str, str]) -> None:
    """Checks that tensors are exactly what the model trains, and that its frozen parts are the expected ones.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape (a checkpoint of another model size), or a
            frozen part has other weights.
    """
    wanted = model.trained_shapes()
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted]
    reshaped = [
        f"{name} {tuple(tensors[name].shape)} for {shape}"
        for name, shape in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    problems = [
        f"{len(found)} {kind}: {_some(found)}"
        for kind, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if found
    ]
    if problems:
        raise ValueError(
            f"the checkpoint is of another model ({'; '.join(problems)}). Use the config that it carries (leave out "
            "--config), or a checkpoint of this model."
        )
    here = model.frozen_identity()
    for part, identity in frozen.items():
        if here[part] != identity:
            raise ValueError(
                f"the checkpoint was trained with another frozen {part} part ({identity}, here {here[part]}). Give "
                f"model.{part} the weights that it was trained with."
            )


def load_trained(model: OSM, checkpoint: Checkpoint) -> None:
    """Copies a checkpoint's trained tensors into a model.

    Modes go by name, not by place; one that the checkpoint lacks starts as its agnostic one, with a warning.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    tensors = dict(checkpoint.tensors)
    if checkpoint.modes != model.modes.names:
        rows = [_row(name, checkpoint.modes) for name in model.modes.names]
        for table in MODE_TABLES:
            if table in tensors and len(tensors[table]) == len(checkpoint.modes):
                tensors[table] = tensors[table][rows]
    check_tensors(model, tensors, checkpoint.frozen)
    parameters = dict(model.trained())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def _row(mode: str, modes: Sequence[str]) -> int:
    if mode in modes:
        return list(modes).index(mode)
    warnings.warn(f"mode {mode!r} is not in the checkpoint: it starts as a copy of the agnostic one.", stacklevel=3)
    return AGNOSTIC


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest
