"""What a run leaves behind: trained tensors, the resolved config, and the identity of the frozen parts.

Two forms hold the same: Lightning's `.ckpt` file (with optimizer state beside, to resume), and a folder of
`model.safetensors`, `config.yaml`, `frozen.json` and tokenizers (to share). Nothing is unpickled but plain tensors and
numbers.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from osm_lightning.batch import mode_names
from osm_lightning.weights.own_tokenizers import copy_tokenizer, resolved
from osm_lightning.weights.sharded import MARKER, is_sharded, partial_of, read_marker, read_sharded, whole

CONTENT_KEY = "osm"
"""Key of our entry in a Lightning checkpoint."""

PREFIX = "osm."
"""Where the model hangs in the LightningModule, and with it the prefix of its keys in a `.ckpt`."""

KEPT_TRAINER_SETTINGS = ("precision",)
"""Settings of the trainer that belong to the model. The others belong to the run and its machine: a model of eight GPUs
names masks on a laptop, and one that was fitted without validation can be validated."""


@dataclass(frozen=True)
class Checkpoint:
    """One run's result."""

    tensors: Mapping[str, Tensor]
    """Trained tensors by their name in the model."""
    config: str
    """Resolved config, YAML."""
    frozen: Mapping[str, str]
    """Fingerprints of the frozen parts it was trained with."""

    @property
    def modes(self) -> tuple[str, ...]:
        """Its modes in the order of its tables, agnostic first.

        Raises:
            ValueError: the config does not say.
        """
        try:
            return mode_names(yaml.safe_load(self.config)["model"]["modes"])
        except (yaml.YAMLError, KeyError, TypeError) as error:
            raise ValueError(f"the checkpoint's config names no model.modes ({error!r}). Export it again.") from error

    def config_elsewhere(self) -> str:
        """The config without what belongs to the run that it was trained in.

        Raises:
            ValueError: it is not a run's config.
        """
        try:
            content = yaml.safe_load(self.config)
            trainer = {key: value for key, value in content["trainer"].items() if key in KEPT_TRAINER_SETTINGS}
        except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the checkpoint's config is not a run's ({error!r}). Export it again.") from error
        return yaml.safe_dump({**content, "trainer": trainer}, sort_keys=False)


def read_checkpoint(path: str | Path, trusted: bool = False) -> Checkpoint:
    """Reads a `.ckpt` file, a folder of parts that several processes wrote, or a folder of safetensors.

    Args:
        path: the checkpoint, or `last`.
        trusted: unpickle a folder of parts although it does not bear our marker.

    Raises:
        ValueError: there is nothing at the path, or it is not one of ours; a missing path is answered with the
            checkpoints that there are.
    """
    path = find_checkpoint(str(path))
    if path.is_dir() and not is_sharded(path):
        return _read_folder(path)
    content = read_training_state(path, trusted)
    try:
        ours = content[CONTENT_KEY]
        tensors = {key.removeprefix(PREFIX): value for key, value in content["state_dict"].items()}
        return Checkpoint(tensors, str(ours["config"]), dict(ours["frozen"]))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"checkpoint {path} was not written by `osm fit` ({error!r}).") from error


def read_training_state(path: Path, trusted: bool = False) -> dict[str, Any]:
    """Reads all of a checkpoint, whatever strategy wrote it, as a single process would have saved it.

    Args:
        path: a `.ckpt` file, or a folder of parts.
        trusted: unpickle a folder although it does not bear our marker.

    Raises:
        ValueError: it is broken, or may hold code.
    """
    if path.is_dir():
        return read_sharded(path, trusted)
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint {path} was not written by `osm fit` ({error!r}).") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise ValueError(
            f"checkpoint {path} cannot be read: {str(error).splitlines()[0]} It is broken, or holds code, which is "
            "never run."
        ) from error


def find_checkpoint(name: str, root: Path = Path("runs")) -> Path:
    """The path of a checkpoint: as given, or the newest `last.ckpt` under a folder for the name `last`.

    Raises:
        ValueError: it does not exist; the answer names the checkpoints that do.
    """
    if name == "last":
        found = {path.with_name("last.ckpt") for path in root.rglob("*last.ckpt*")} if root.is_dir() else set()
        newest = sorted(filter(None, map(whole, found)), key=_written_at)
        if newest:
            return newest[-1]
    elif (path := whole(Path(name))) is not None:
        return path
    elif Path(name).exists():
        return Path(name)  # a folder of parts without our marker: reading it says what that means
    raise ValueError(f"checkpoint {name!r} does not exist. {found_checkpoints(root)}")


def config_of(path: Path, trusted: bool = False) -> Checkpoint:
    """The config that a checkpoint carries; of a folder of parts that bears our marker, nothing else is opened.

    Returns:
        The checkpoint, in that case without its tensors.

    Raises:
        ValueError: as `read_checkpoint`.
    """
    marker = read_marker(path) if path.is_dir() else None
    return read_checkpoint(path, trusted) if marker is None else Checkpoint({}, marker.config, marker.frozen)


def consolidate(path: Path, out: Path, trusted: bool = False) -> int:
    """Makes one `.ckpt` file of a folder of parts, with all that it takes to go on from it.

    Returns:
        Number of trained tensors.

    Raises:
        ValueError: the folder cannot be read, or the file exists.
    """
    if out.exists():
        raise ValueError(f"{out} exists. Remove it, or give another --out.")
    content = read_training_state(path, trusted)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(out)
    with partial.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(out)
    return len(content["state_dict"])


def _written_at(path: Path) -> float:
    """When it became whole: a folder's own time changes with its name."""
    return ((path / MARKER) if path.is_dir() else path).stat().st_mtime


def write_folder(
    checkpoint: Checkpoint,
    folder: Path,
    card: str,
    tokenizers: Mapping[str, str] = MappingProxyType({}),
    files: Mapping[str, str] = MappingProxyType({}),
    fill: Callable[[Path], None] | None = None,
) -> None:
    """Writes the shareable form; the folder appears whole or not at all.

    Args:
        checkpoint: its content.
        folder: the new folder.
        card: its README.md.
        tokenizers: from folders in it to the tokenizers that are copied there.
        files: further texts by file name.
        fill: writes what else belongs into the folder, while it grows.

    Raises:
        ValueError: the folder exists or cannot be written, or a tokenizer cannot be copied.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists. Remove it, or give another --out.")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if fill is not None:
            fill(partial)
        _fill(checkpoint, partial, {"README.md": card, **files}, tokenizers)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(folder)


def _fill(checkpoint: Checkpoint, partial: Path, files: Mapping[str, str], tokenizers: Mapping[str, str]) -> None:
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in checkpoint.tensors.items()}
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "config.yaml").write_text(checkpoint.config, encoding="utf-8")
    (partial / "frozen.json").write_text(json.dumps(dict(checkpoint.frozen), indent=1) + "\n", encoding="utf-8")
    for name, text in files.items():
        (partial / name).write_text(text, encoding="utf-8")
    for written in partial.rglob("*.safetensors"):
        written.chmod(0o644)  # safetensors writes for its owner alone
    for name, tokenizer in tokenizers.items():
        copy_tokenizer(tokenizer, partial / name)
    for file in filter(Path.is_file, partial.rglob("*")):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def found_checkpoints(root: Path = Path("runs"), most: int = 8) -> str:
    """One sentence that names the checkpoints under a folder, newest first."""
    found = sorted(root.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True) if root.is_dir() else []
    if not found:
        return f"There are none under {root}/ either: `osm fit` makes them."
    shown = ", ".join(str(path) for path in found[:most])
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return f"Under {root}/ there are: {shown}{more}."


def _read_folder(folder: Path) -> Checkpoint:
    try:
        tensors = load_file(folder / "model.safetensors")
        config = resolved((folder / "config.yaml").read_text(encoding="utf-8"), folder)
        frozen: dict[str, str] = dict(json.loads((folder / "frozen.json").read_text(encoding="utf-8")))
    except (OSError, SafetensorError, yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"folder {folder} is no checkpoint ({error}). It must hold model.safetensors, config.yaml and frozen.json, "
            f"as `osm weights export` writes them. {found_checkpoints()}"
        ) from error
    return Checkpoint(tensors, config, frozen)
