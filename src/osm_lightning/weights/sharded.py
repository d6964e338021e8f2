"""Checkpoints that several processes wrote together: a folder with a part of each, and our marker beside the parts.

The marker (`osm.json`) holds all that one wants to know before anything is unpickled, since the parts, DeepSpeed's and
torch's alike, are pickles that could hold any code. It is written last, so that a folder that bears it is whole.

Whatever wrote it, a folder is read as what a single process would have saved (`read_sharded`): full tensors by name,
and the optimizer's state in torch's own form. That is how every strategy opens the checkpoints of every other one.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osm_lightning.whole_file import write_whole

MARKER = "osm.json"
"""Name of our file in the folder."""

DEEPSPEED_TAG = "checkpoint"
"""Folder of DeepSpeed's own files."""

REST = "rest"
"""Key (DeepSpeed) or file (torch) of what is no tensor of the model or the optimizer: loops, schedules, places."""

BESIDE = "beside"
"""Key in DeepSpeed's rest of the tensors that nobody trains."""

WEIGHTS, OPTIMIZER = "state_dict", "optimizer"
"""Parts of torch's distributed checkpoints."""


@dataclass(frozen=True)
class Marker:
    """What is known of a folder before it is read."""

    strategy: str
    """Class of the strategy that wrote it."""
    world_size: int
    """Processes that wrote it."""
    step: int
    """Optimizer steps that it has behind it."""
    config: str
    """Resolved config of the run, YAML."""
    frozen: Mapping[str, str]
    """Fingerprints of the frozen parts."""
    trained: Mapping[str, Sequence[int]]
    """Shape of every tensor that it holds, by its name in the LightningModule."""
    groups: Sequence[Mapping[str, Any]]
    """The optimizer's groups: their settings, and in `params` their tensors' names in order."""


def read_marker(folder: Path) -> Marker | None:
    """The marker of a folder; None if it bears none.

    Raises:
        ValueError: it bears one that says something else.
    """
    path = folder / MARKER
    if not path.is_file():
        return None
    try:
        return Marker(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not as `osm fit` writes it ({error}). Use another checkpoint.") from error


def is_sharded(path: Path) -> bool:
    """Whether a folder holds parts of several processes, ours or anybody's."""
    return (path / MARKER).is_file() or (path / DEEPSPEED_TAG).is_dir() or (path / ".metadata").is_file()


def read_sharded(folder: Path, trusted: bool = False) -> dict[str, Any]:
    """Reads a folder as a single process would have saved it: the content of a Lightning checkpoint.

    Args:
        folder: the checkpoint.
        trusted: unpickle it although it does not bear our marker.

    Raises:
        ValueError: it does not bear our marker, parts are missing, or it is not what its marker says.
    """
    marker = read_marker(folder)
    if marker is None and not trusted:
        raise ValueError(
            f"{folder} is a folder of parts without our {MARKER}. Its files are pickles, which run the code that they "
            "hold when they are opened, and nothing says that `osm fit` wrote them; a save that was cut short has no "
            f"{MARKER} either. If you know where it comes from, add --trust-checkpoint."
        )
    try:
        content, states = _deepspeed(folder) if (folder / DEEPSPEED_TAG).is_dir() else _distributed(folder)
    except (OSError, RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"checkpoint {folder} cannot be read: {reason} It is broken.") from error
    if marker is None:
        return content
    shapes = {name: list(tensor.shape) for name, tensor in content["state_dict"].items()}
    if shapes != {name: list(shape) for name, shape in marker.trained.items()}:
        wrong = sorted(shapes.keys() ^ marker.trained.keys()) or "their shapes"
        raise ValueError(f"checkpoint {folder} holds other tensors than its {MARKER} says ({wrong}). It is broken.")
    return {**content, "optimizer_states": [_by_number(states, marker.groups)]}


def _by_number(states: Mapping[str, Mapping[str, Tensor]], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """An optimizer's state in torch's form, in which parameters are numbered through the groups."""
    names = [name for group in groups for name in group["params"]]
    number = {name: index for index, name in enumerate(names)}
    return {
        "state": {number[name]: dict(state) for name, state in states.items()},
        "param_groups": [{**group, "params": [number[name] for name in group["params"]]} for group in groups],
    }


# torch's distributed checkpoints (FSDP2) ------------------------------------------------------------------------------

Read = tuple[dict[str, Any], dict[str, dict[str, Tensor]]]
"""A checkpoint's content, and the optimizer's state by name."""


def _distributed(folder: Path) -> Read:
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    _load_state_dict(state, storage_reader=FileSystemReader(folder), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    rest = torch.load(folder / REST, map_location="cpu", weights_only=True)
    return {**rest, "state_dict": state[WEIGHTS]}, state.get(OPTIMIZER, {})


# DeepSpeed ------------------------------------------------------------------------------------------------------------


def _deepspeed(folder: Path) -> Read:
    from deepspeed.utils import zero_to_fp32 as zero

    inner = str(folder / DEEPSPEED_TAG)
    said = io.StringIO()  # it prints every step, and draws bars
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        model_files, optim_files = zero.get_model_state_files(inner), zero.get_optim_files(inner)
        shapes = zero.parse_model_states(model_files)
        stage, world_size, flat_weights, paddings = zero.parse_optim_states(optim_files, inner)
        optimizers = [_load(file)["optimizer_state_dict"] for file in optim_files]
        inner_states = [
            one["optimizer_state_dict"] if stage == 3 else one["base_optimizer_state"] for one in optimizers
        ]

        def merged(flat: list[list[Tensor]]) -> dict[str, Tensor]:
            """Full tensors by name, of flat parts [process][group]."""
            found: dict[str, Any] = {}
            if stage <= 2:
                zero._zero2_merge_trainable_params(found, world_size, flat, shapes, paddings)
            else:
                zero._zero3_merge_trainable_params(found, world_size, flat, shapes)
            # DeepSpeed saves its flat copies as parameters, so that what is cut out of them would have a gradient.
            return {name: tensor.contiguous().detach() for name, tensor in found.items()}

        weights = merged(flat_weights)
        moments = {key: merged(_flat(inner_states, key)) for key in ("exp_avg", "exp_avg_sq")}
    step = next(iter(inner_states[0]["state"].values()))["step"]
    content = _load(model_files[0])
    rest = dict(content.get(REST, content))
    beside = rest.pop(BESIDE, {})
    states = {name: {key: moments[key][name] for key in moments} | {"step": step.clone()} for name in weights}
    return {**rest, "state_dict": {**weights, **beside}}, states


def _load(file: str) -> dict[str, Any]:
    return dict(torch.load(file, map_location="cpu", weights_only=False, mmap=True))


def _flat(states: Sequence[Mapping[str, Any]], key: str) -> list[list[Tensor]]:
    """[process][group] of one of the optimizer's moments."""
    return [[of[key].flatten() for _, of in sorted(state["state"].items())] for state in states]


# Writing --------------------------------------------------------------------------------------------------------------


def partial_of(path: Path) -> Path:
    """Where a checkpoint grows until it is whole."""
    return path.with_name(f".{path.name}.partial")


def previous_of(path: Path) -> Path:
    """Where the previous checkpoint of a name waits until the new one has taken its place."""
    return path.with_name(f".{path.name}.previous")


def seal(path: Path, marker: Marker) -> None:
    """Declares what has grown in `partial_of(path)` whole, and puts it where it belongs.

    Whenever this is stopped, `whole` finds the new checkpoint or the previous one.
    """
    partial, previous = partial_of(path), previous_of(path)
    for file in partial.rglob("*"):
        if file.is_file():
            with file.open("rb") as written:
                os.fsync(written.fileno())
    write_whole(partial / MARKER, json.dumps(asdict(marker), indent=1) + "\n")
    remove(previous)
    if path.exists():
        path.rename(previous)
    partial.rename(path)
    remove(previous)


def remove(path: Path) -> None:
    """Removes a checkpoint, file or folder, if it is there; other ranks may be about the same."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def whole(path: Path) -> Path | None:
    """The newest whole checkpoint of a name: itself, or what a save that was stopped while renaming left of it."""
    if path.is_file() or (path.is_dir() and (read_marker(path) is not None or not is_sharded(path))):
        return path
    return next((other for other in (partial_of(path), previous_of(path)) if (other / MARKER).is_file()), None)
