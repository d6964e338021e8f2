"""Putting trained tensors into a model: exactly those it trains, of its shapes, over the frozen parts it expects."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from osm_lightning.batch import AGNOSTIC
from osm_lightning.model.load_report import LoadReport
from osm_lightning.model.osm import OSM
from osm_lightning.weights.checkpoint import Checkpoint

MODE_TABLES = ("modes.query", "modes.embedding")
"""Tables with one row per mode."""


def check_tensors(model: OSM, tensors: Mapping[str, Tensor], frozen: Mapping[str, str]) -> LoadReport:
    """Checks that tensors are exactly what the model trains, and that its frozen parts are the expected ones.

    Returns:
        What is loaded.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape (a checkpoint of another model size), or a
            frozen part has other weights.
    """
    report = LoadReport.compare("trained parts", "the checkpoint", tensors, model.trained_shapes())
    problems = report.problems()
    if problems:
        raise ValueError(
            f"the checkpoint is of another model ({problems}). Use the config that it carries (leave out "
            "--config), or a checkpoint of this model."
        )
    here = model.frozen_identity()
    for part, identity in frozen.items():
        if here[part] != identity:
            raise ValueError(
                f"the checkpoint was trained with another frozen {part} part ({identity}, here {here[part]}). Give "
                f"model.{part} the weights that it was trained with."
            )
    return report


def load_trained(model: OSM, checkpoint: Checkpoint) -> LoadReport:
    """Copies a checkpoint's trained tensors into a model.

    Modes go by name, not by place; one that the checkpoint lacks starts as its agnostic one, with a warning.

    Returns:
        What was loaded.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    tensors = dict(checkpoint.tensors)
    if checkpoint.modes != model.modes.names:
        rows = [_row(name, checkpoint.modes) for name in model.modes.names]
        for table in MODE_TABLES:
            if table in tensors and len(tensors[table]) == len(checkpoint.modes):
                tensors[table] = tensors[table][rows]
    report = check_tensors(model, tensors, checkpoint.frozen)
    parameters = dict(model.trained())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    return report


def _row(mode: str, modes: Sequence[str]) -> int:
    if mode in modes:
        return list(modes).index(mode)
    warnings.warn(f"mode {mode!r} is not in the checkpoint: it starts as a copy of the agnostic one.", stacklevel=3)
    return AGNOSTIC
