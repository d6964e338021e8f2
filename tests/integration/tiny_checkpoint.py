"""An exported folder of a tiny model that nobody trained, for tests of what is done with one.

Its frozen parts are random, drawn from the seed that its config carries, so that whoever loads it draws the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml

from osm_lightning.data.text import TextCodec, builtin_tokenizer
from osm_lightning.model.config import LanguageConfig, QFormerConfig, VisionConfig
from osm_lightning.model.lora import is_adapter
from osm_lightning.weights.build import build_model
from osm_lightning.weights.checkpoint import CONTENT_KEY, PREFIX
from osm_lightning.weights.export import export

ROOT = Path(__file__).parents[2]
MODES = ("agnostic", "coco", "mine")


def write_checkpoint(folder: Path, qformer: Mapping[str, Any] = MappingProxyType({}), **language: Any) -> Path:
    """Writes `folder/last.ckpt`; its tokenizers are folders beside it."""
    tiny = yaml.safe_load((ROOT / "configs" / "model" / "tiny.yaml").read_text(encoding="utf-8"))["model"]
    for name, size in (("llm", 512), ("bert", 300)):
        builtin_tokenizer(size).save_pretrained(folder / name)
    tiny["qformer"] |= {"instruction_tokenizer": str(folder / "bert"), **qformer}
    tiny["language"] = {**tiny["language"], "tokenizer": str(folder / "llm"), **language}
    parts = VisionConfig(**tiny["vision"]), QFormerConfig(**tiny["qformer"]), LanguageConfig(**tiny["language"])
    # With the defaults that the run's own config would spell out.
    vision, bridge, llm = map(asdict, parts)
    config = {
        "seed_everything": 3,
        "trainer": {"precision": "32-true"},
        "model": {"vision": vision, "qformer": bridge, "language": llm, "modes": list(MODES[1:]), "max_new_tokens": 6},
        "data": {"sources": {}, "num_workers": 0},
    }
    torch.manual_seed(3)
    codec = TextCodec(str(folder / "llm"), str(folder / "bert"))
    model = build_model(*parts, MODES[1:], codec)
    with torch.no_grad():
        for name, parameter in model.trained():
            if name.startswith("modes."):
                parameter.normal_()  # so that modes say different things
            if ".cross_attention." in name and parameter.ndim == 2:
                parameter.mul_(10)  # and masks
            if is_adapter(name):
                parameter.normal_(std=0.1)  # as if they were trained
    path = folder / "last.ckpt"
    state = {PREFIX + name: parameter.detach() for name, parameter in model.kept()}
    ours = {"config": yaml.safe_dump(config), "frozen": model.frozen_identity()}
    torch.save({"state_dict": state, CONTENT_KEY: ours}, path)
    return path


def write_exported(folder: Path, scratch: Path) -> Path:
    """Exports such a checkpoint to a folder."""
    scratch.mkdir(parents=True)
    export(str(write_checkpoint(scratch)), folder)
    return folder
