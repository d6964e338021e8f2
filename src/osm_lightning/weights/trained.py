"""Putting trained tensors into a model: exactly those it trains, of its shapes, over the frozen parts it expects."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
import yaml
from torch import Tensor, nn

from osm_lightning.batch import AGNOSTIC
from osm_lightning.model.load_report import LoadReport
from osm_lightning.model.lora import is_adapter, plain_name
from osm_lightning.model.osm import OSM
from osm_lightning.weights.checkpoint import Checkpoint

MODE_TABLES = ("modes.query", "modes.embedding")
"""Tables with one row per mode."""

Fill = Callable[[nn.Parameter, Tensor], None]
"""Gives a parameter its value."""


def copy_into(parameter: nn.Parameter, value: Tensor) -> None:
    """Gives a parameter its value, where this process holds all of it."""
    parameter.copy_(value)


def check_tensors(
    model: OSM,
    tensors: Mapping[str, Tensor],
    frozen: Mapping[str, str],
    fresh: Container[str] = (),
    allow: Sequence[str] = (),
) -> LoadReport:
    """Checks that tensors are exactly what the model trains, and that its frozen parts are the expected ones.

    Args:
        model: that is to take them.
        tensors: trained ones by name.
        frozen: fingerprints of the frozen parts that they were trained with.
        fresh: names that stay as they were drawn.
        allow: patterns of names, of frozen parts too, that are let through although they don't fit.

    Returns:
        What is loaded.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape (a checkpoint of another model size), or a
            frozen part has other weights.
    """
    wanted = {name: shape for name, shape in model.kept_shapes().items() if name not in fresh}
    report = LoadReport.compare("trained parts", "the checkpoint", tensors, wanted)
    problems = report.problems(allow)
    if problems:
        raise ValueError(
            f"the checkpoint is of another model ({problems}). Use the config that it carries (leave out "
            "--config), or a checkpoint of this model. What a new run may begin without is named by model.allow."
        )
    here = model.frozen_identity()
    for part, identity in frozen.items():
        if here[part] == identity:
            continue
        said = f"the checkpoint was trained with another frozen {part} part ({identity}, here {here[part]})"
        if not any(fnmatchcase(part, pattern) for pattern in allow):
            raise ValueError(f"{said}. Give model.{part} the weights that it was trained with.")
        warnings.warn(f"{said}, which model.allow lets through.", stacklevel=3)
    return report


def load_trained(model: OSM, checkpoint: Checkpoint, fill: Fill = copy_into, allow: Sequence[str] = ()) -> LoadReport:
    """Copies a checkpoint's trained tensors into a model.

    Modes go by name, not by place; one that the checkpoint lacks starts as its agnostic one, with a warning. Adapters
    of a part whose checkpoint has none there start anew, without effect on what it names; a warning says so too.

    Args:
        model: that takes them.
        checkpoint: trained parts, and identities of the frozen ones.
        fill: puts a tensor into a parameter.
        allow: patterns of names that are let through although they don't fit: they stay as they were drawn.

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
    check_adapters(model, checkpoint)
    fresh = _fresh_adapters(model, tensors)
    tensors = _beside_adapters(model, tensors)
    report = check_tensors(model, tensors, checkpoint.frozen, fresh, allow)
    parameters = dict(model.kept())
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name not in report.surprises:
                fill(parameters[name], tensor)
    return report


def check_adapters(model: OSM, checkpoint: Checkpoint) -> None:
    """Checks that adapters add as much as they did when they were trained, which no shape tells.

    Raises:
        ValueError: alpha / rank is another one.
    """
    parts = (yaml.safe_load(checkpoint.config) or {}).get("model") or {}
    for part, here in (("qformer", model.qformer.config.lora), ("language", model.language.config.lora)):
        before = (parts.get(part) or {}).get("lora") if isinstance(parts, dict) else None
        if here is None or before is None:
            continue
        scale, was = here.alpha / here.rank, before["alpha"] / before["rank"]
        if scale != was:
            raise ValueError(
                f"model.{part}.lora multiplies what its adapters add by alpha / rank = {scale:g}, but those of the "
                f"checkpoint were trained with {was:g}. Set model.{part}.lora.alpha to {was * here.rank:g}."
            )


def _fresh_adapters(model: OSM, tensors: Mapping[str, Tensor]) -> set[str]:
    """Names of the adapters that nobody has trained yet: those of parts of which the checkpoint has none."""
    adapters = {name for name, _ in model.trained() if is_adapter(name)}
    known = {_part(name) for name in tensors if is_adapter(name)}
    fresh = {name for name in adapters if _part(name) not in known}
    for part in sorted(set(map(_part, fresh))):
        warnings.warn(
            f"the checkpoint has no LoRA adapters of the {part} part: they start anew, without effect.", stacklevel=3
        )
    return fresh


def _part(name: str) -> str:
    return name.partition(".")[0]


def _beside_adapters(model: OSM, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names that they have where adapters stand beside them, which a checkpoint without has not."""
    names = {plain_name(name): name for name, _ in model.kept()}
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def _row(mode: str, modes: Sequence[str]) -> int:
    if mode in modes:
        return list(modes).index(mode)
    warnings.warn(f"mode {mode!r} is not in the checkpoint: it starts as a copy of the agnostic one.", stacklevel=3)
    return AGNOSTIC
