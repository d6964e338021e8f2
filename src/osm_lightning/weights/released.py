"""Names of the authors' checkpoint (`osm_final.pt`) and ours, both ways; no value changes, and a round trip is exact.

Theirs keeps a tensor per mode under its key, where ours has a table; `any` is the agnostic mode. It holds what was
trained, as ours does: everything frozen is InstructBLIP's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from osm_lightning.batch import AGNOSTIC_NAME
from osm_lightning.model.load_report import LoadReport, is_known_extra
from osm_lightning.model.lora import is_adapter
from osm_lightning.model.mapped import read_file, read_pickle
from osm_lightning.weights.checkpoint import Checkpoint
from osm_lightning.weights.qformer_names import our_name, their_name
from osm_lightning.whole_file import open_whole

WRAPPER = "model_state_dict"
"""Key under which a training script keeps the weights."""

RESUME_EXTRAS = ("epoch*", "*optimizer*", "*scheduler*", "*scaler*", "*step*", "args")
"""What it keeps beside them to go on training."""

AGNOSTIC_KEY = "any"

PLAIN = {
    "vision.position_NE": "window_pos_embed",
    "qformer.mask_query_QD": "mask_query",
    "qformer.context_query_QD": "context_query",
}
"""Ours to theirs; theirs have a leading axis of one."""

TABLES = {"modes.query": "qformer_mode_query.", "modes.embedding": "mode_query."}
"""Our tables to the prefix of their tensors, one per mode: [1, 1, width]."""

QFORMER, PROJECTION = "base_model.qformer.", "base_model.language_projection."

CONTEXT_TWIN = "base_model.query_tokens"
"""The context queries are InstructBLIP's own parameter, and stand in the file under both names."""


@dataclass(frozen=True)
class Released:
    """A released checkpoint as it was read."""

    tensors: Mapping[str, Tensor]
    """By the authors' names, without a prefix."""
    extras: Sequence[str]
    """What stood beside the weights and is known."""
    strangers: Sequence[str]
    """What stood beside the weights and is not known."""

    @property
    def modes(self) -> tuple[str, ...]:
        """Keys of its modes but the agnostic one, in its order."""
        keys = dict.fromkeys(
            name.removeprefix(prefix) for prefix in TABLES.values() for name in self.tensors if name.startswith(prefix)
        )
        return tuple(key for key in keys if key != AGNOSTIC_KEY)


def read_released(path: Path) -> Released:
    """Reads `osm_final.pt`, or the same tensors as safetensors.

    Raises:
        ValueError: it is not there, is broken, holds code, or holds no weights of OSM.
    """
    if not path.is_file():
        raise ValueError(f"--released is {path}, but there is no such file.")
    content = read_file(path) if path.suffix == ".safetensors" else read_pickle(path)
    beside: list[str] = []
    if isinstance(content, dict) and isinstance(content.get(WRAPPER), dict):
        beside = [str(key) for key in content if key != WRAPPER]
        content = content[WRAPPER]
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no checkpoint of OSM: it holds a {type(content).__name__}, no names and tensors.")
    tensors = {str(name).removeprefix("module."): t for name, t in content.items() if isinstance(t, Tensor)}
    beside += [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if not {*PLAIN.values()} & tensors.keys():
        found = ", ".join(list(tensors)[:3]) or "nothing"
        raise ValueError(
            f"{path} is no checkpoint of OSM: none of {', '.join(PLAIN.values())} is in it, but {found}. Give the "
            "authors' osm_final.pt."
        )
    known = [name for name in beside if any(fnmatchcase(name, pattern) for pattern in RESUME_EXTRAS)]
    return Released(tensors, known, [name for name in beside if name not in known])


def to_released(tensors: Mapping[str, Tensor], modes: Sequence[str]) -> dict[str, Tensor]:
    """From our names to theirs.

    Args:
        tensors: all trained tensors of a model with context queries, modes and an instruction.
        modes: names of its modes, the agnostic one first.

    Raises:
        ValueError: the model has parts that theirs has no place for, or lacks some.
    """
    theirs: dict[str, Tensor] = {}
    try:
        for name, plain in PLAIN.items():
            theirs[plain] = tensors[name].unsqueeze(0)
        theirs[CONTEXT_TWIN] = theirs["context_query"]
        for name, prefix in TABLES.items():
            for mode, row in zip(modes, tensors[name], strict=True):
                theirs[f"{prefix}{AGNOSTIC_KEY if mode == AGNOSTIC_NAME else mode}"] = row.view(1, 1, -1)
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            if name not in PLAIN and name not in TABLES:
                theirs[PROJECTION + rest if part == "projection" else QFORMER + their_name(rest)] = tensor
    except KeyError as error:
        raise ValueError(
            f"the released format has no place for this model, or this model lacks a part of it ({error}): it needs "
            "context queries, modes, and an instruction that the Q-Former reads."
        ) from error
    return theirs


def from_released(theirs: Mapping[str, Tensor], modes: Sequence[str]) -> dict[str, Tensor]:
    """From their names to ours; the inverse of `to_released`.

    Args:
        theirs: all of their tensors, and none besides.
        modes: names of the modes, the agnostic one first.
    """
    keys = [AGNOSTIC_KEY if mode == AGNOSTIC_NAME else mode for mode in modes]
    ours = {name: theirs[plain].squeeze(0) for name, plain in PLAIN.items()}
    for name, prefix in TABLES.items():
        ours[name] = torch.cat([theirs[prefix + key].view(1, -1) for key in keys])
    for name, tensor in theirs.items():
        if name.startswith(PROJECTION):
            ours[f"projection.{name.removeprefix(PROJECTION)}"] = tensor
        elif name.startswith(QFORMER):
            ours[f"qformer.{our_name(name.removeprefix(QFORMER))}"] = tensor
    return ours


def lay_over(
    start: Mapping[str, Tensor], modes: Sequence[str], released: Released, origin: str
) -> tuple[dict[str, Tensor], LoadReport]:
    """Puts a released checkpoint's tensors over those that a model starts with.

    Args:
        start: all trained tensors by our names.
        modes: names of the model's modes, the agnostic one first.
        released: what was read.
        origin: where from, for the report.

    Returns:
        All trained tensors by our names, those that don't fit as they were, and the report by their names.

    Raises:
        ValueError: the context queries stand in the file twice and differ.
    """
    wanted = to_released(start, modes)
    given = dict(released.tensors)
    for name, twin in (("context_query", CONTEXT_TWIN), (CONTEXT_TWIN, "context_query")):
        if name not in given and twin in given:
            given[name] = given[twin]
    if CONTEXT_TWIN in given and not torch.equal(given[CONTEXT_TWIN], given["context_query"]):
        raise ValueError(
            f"{origin}: context_query and {CONTEXT_TWIN} are one parameter in the released model, but differ here. "
            "Which are the context queries? Remove the other ones."
        )
    report = LoadReport.compare(
        "trained parts",
        origin,
        given,
        {name: tensor.shape for name, tensor in wanted.items()},
        unplaced=released.strangers,
        extras=released.extras,
    )
    fitting = {
        name: tensor
        for name, tensor in given.items()
        if name in wanted and name not in report.reshaped and not is_known_extra(name)
    }
    return from_released(wanted | fitting, modes), report


def write_released(checkpoint: Checkpoint, path: Path) -> int:
    """Writes a checkpoint's trained parts in the authors' format; the file appears whole or not at all.

    Returns:
        Number of tensors.

    Raises:
        ValueError: the file exists, or the format has no place for the model.
    """
    if path.exists():
        raise ValueError(f"{path} exists. Remove it, or give another --out.")
    if any(map(is_adapter, checkpoint.tensors)):
        raise ValueError(
            "the checkpoint has LoRA adapters, for which the released format has no place. Fold them into the LLM with "
            "`osm weights merge` first: the authors' code then needs that LLM too."
        )
    theirs = to_released(checkpoint.tensors, checkpoint.modes)
    path.parent.mkdir(parents=True, exist_ok=True)
    copies = {name: tensor.detach().clone() for name, tensor in theirs.items() if name != CONTEXT_TWIN}
    copies[CONTEXT_TWIN] = copies["context_query"]
    with open_whole(path) as file:
        torch.save({WRAPPER: copies}, file)
    return len(copies)
