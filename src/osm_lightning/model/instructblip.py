"""InstructBLIP's folder as the hub has it: what is in it, and its vision tower and LLM as modules.

Any transformers since 4.28 may have written it: names are brought to one form, shards and both file formats are read.
Weights stay pages of their files (`mapped.py`). Its Q-Former is trained and becomes ours (`weights/`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from osm_lightning.model.frozen import first_line
from osm_lightning.model.load_report import LoadReport
from osm_lightning.model.mapped import read_folder

MODEL_TYPE = "instructblip"

QFORMER_TOKENIZER = "qformer_tokenizer"
"""Subfolder of the Q-Former's own tokenizer."""

FILES = ("*.json", "*.model", "*.txt", f"{QFORMER_TOKENIZER}/*")
"""What is fetched from the hub beside the weights."""

PARTS = ("vision_model.", "qformer.", "query_tokens", "language_projection.", "language_model.")

BASE_PREFIX = re.compile(rf"^(?:model|blip)\.(?={'|'.join(re.escape(part) for part in PARTS)})")
"""Prefix of a model inside a model with heads."""


@dataclass(frozen=True)
class InstructBlip:
    """An opened folder."""

    path: Path
    config: Any
    """transformers' InstructBlipConfig."""
    tensors: Mapping[str, Tensor]
    """All weights, as pages of their files."""

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose names begin with a prefix, without it."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def strangers(self) -> list[str]:
        """Names that belong to no part of an InstructBLIP."""
        return [name for name in self.tensors if not name.startswith(PARTS)]

    def vision_model(self) -> tuple[nn.Module, LoadReport]:
        """The vision tower with its weights.

        Raises:
            ValueError: tensors are missing or have another shape.
        """
        from transformers import InstructBlipVisionModel

        config = self.config.vision_config
        return self._build(InstructBlipVisionModel, config, self.part("vision_model."), "vision tower", "vision_model.")

    def language_model(self) -> tuple[nn.Module, LoadReport]:
        """The LLM with its weights.

        Raises:
            ValueError: it is no decoder-only one, or tensors are missing or have another shape.
        """
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        config = self.config.text_config
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(
                f"the LLM of {self.path} is a {config.model_type}, which is no decoder-only causal LM. Use an "
                "InstructBLIP over Vicuna."
            )
        source = self.part("language_model.")
        return self._build(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config, source, "LLM", "language_model.")

    def _build(
        self, kind: Any, config: Any, source: dict[str, Tensor], part: str, prefix: str
    ) -> tuple[nn.Module, LoadReport]:
        """A model of transformers whose weights are the given tensors themselves."""
        with torch.device("meta"):
            skeleton = kind(config).state_dict(keep_vars=True)
        # A decoder that was saved without its head lacks the level at which it hangs there.
        source = {name if name in skeleton else _below_head(name, skeleton): tensor for name, tensor in source.items()}
        present = {id(skeleton[name]) for name in source if name in skeleton}
        wanted = {
            prefix + name: tensor.shape
            for name, tensor in skeleton.items()
            if name in source or id(tensor) not in present  # the other name of tied weights need not be there
        }
        named = {prefix + name: tensor for name, tensor in source.items()}
        report = LoadReport.compare(part, str(self.path), named, wanted)
        problems = report.problems(report.unexpected)
        if problems:
            raise ValueError(
                f"the {part} of {self.path} does not fit its config.json ({problems}). The folder is incomplete, or of "
                "two models: download it again."
            )
        fitting = {name: tensor for name, tensor in source.items() if name in skeleton}
        return cast("nn.Module", kind.from_pretrained(None, config=config, state_dict=fitting, dtype="auto")), report


def is_instructblip(name: str) -> bool:
    """Whether a folder or hub id is an InstructBLIP; False for whatever cannot be told."""
    from transformers.utils.hub import cached_file

    local = Path(name)
    try:
        path = local / "config.json" if local.is_dir() else cached_file(name, "config.json")
        return path is not None and json.loads(Path(path).read_text(encoding="utf-8")).get("model_type") == MODEL_TYPE
    except (OSError, ValueError, AttributeError):
        return False


def open_instructblip(name: str, setting: str) -> InstructBlip:
    """Opens a folder, or fetches a hub id's.

    Args:
        name: folder or hub id.
        setting: what a message calls the place where the name was given.

    Raises:
        ValueError: it is not there, cannot be fetched, is of another model, or its files are broken.
    """
    path = _folder_of(name, setting)
    config = _config(path, setting)
    tensors = {_plain_name(name): tensor for name, tensor in read_folder(path).items()}
    return InstructBlip(path, config, tensors)


def _folder_of(name: str, setting: str) -> Path:
    """The folder itself, or the hub's in the local cache."""
    from huggingface_hub import snapshot_download

    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ValueError(
            f"{setting} is {name!r}, but there is no such folder. Give an InstructBLIP's folder or hub id."
        )
    try:
        fetched = Path(snapshot_download(name, allow_patterns=[*FILES, "*.safetensors"]))
        if not any(fetched.glob("*.safetensors")):
            fetched = Path(snapshot_download(name, allow_patterns=[*FILES, "*.bin"]))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{setting} is {name!r}, which is no folder here, and the hub does not give it ({type(error).__name__}: "
            f"{first_line(error)}). Without a network, download it elsewhere and give its folder."
        ) from error
    return fetched


def _config(path: Path, setting: str) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import InstructBlipConfig

    try:
        content = dict(json.loads((path / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{setting}: {path} has no readable config.json ({first_line(error)}).") from error
    if content.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"{setting}: {path} is a {content.get('model_type')!r} by its config.json, but must be an {MODEL_TYPE!r}."
        )
    try:
        return InstructBlipConfig.from_dict(content)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{setting}: the config.json of {path} cannot be used ({first_line(error)}).") from error


def _plain_name(name: str) -> str:
    """A tensor's name as the oldest writers have it."""
    name = BASE_PREFIX.sub("", name)
    return f"language_model.{name}" if name.startswith("lm_head.") else name


def _below_head(name: str, names: Mapping[str, Any]) -> str:
    return f"model.{name}" if f"model.{name}" in names else name
