"""What a checkpoint's config says of its model, for whoever builds it without the command line.

The command line parses the same settings into the same classes, and links those of the data that are the model's by the
table that stands here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from osm_lightning.data.sample import View
from osm_lightning.data.text import TextCodec
from osm_lightning.missing_parts import refuse_missing
from osm_lightning.model.config import LanguageConfig, QFormerConfig, VisionConfig
from osm_lightning.model.osm import OSM
from osm_lightning.naming.greedy import MAX_NEW_TOKENS
from osm_lightning.weights.build import build_model
from osm_lightning.weights.checkpoint import Checkpoint

LINKS = (
    ("model.vision.image_size_px", "data.image_size_px"),
    ("model.vision.patch_size_px", "data.patch_size_px"),
    ("model.qformer.context", "data.context"),
    ("model.qformer.mask_rule", "data.mask_rule"),
    ("model.qformer.instruction_tokenizer", "data.instruction_tokenizer"),
    ("model.language.chat_template", "data.chat_template"),
    ("model.modes", "data.modes"),
)
"""Settings of the data that are the model's."""


def language_tokenizer(tokenizer: str | None, name: str) -> str:
    """The LLM's tokenizer: its own where no other is named."""
    return tokenizer or name


@dataclass
class ModelSection:
    """What names depend on in a config's `model`."""

    vision: VisionConfig
    """Vision tower and input size."""
    qformer: QFormerConfig
    """MaskQ-Former and its queries."""
    language: LanguageConfig
    """LLM."""
    modes: list[str]
    """Modes of the vocabularies, beside the agnostic one."""
    max_new_tokens: int = MAX_NEW_TOKENS
    """Ids per name at most."""
    allow: list[str] | None = None
    """Trained tensors that may not fit."""


@dataclass(frozen=True)
class ModelSettings:
    """A config, as far as names depend on it."""

    model: ModelSection
    """Its `model`."""
    data: Mapping[str, Any]
    """Its `data`, with what is linked to the model."""
    precision: str
    """Its `trainer.precision`."""
    seed: int | None
    """What frozen parts with random weights are drawn from."""

    def view(self) -> View:
        """How images and masks are turned into what the model sees."""
        return View(**{field.name: self.data[field.name] for field in fields(View) if field.name in self.data})

    def codec(self) -> TextCodec:
        """The tokenizers.

        Raises:
            ValueError: one is missing.
        """
        language = self.model.language
        name = language_tokenizer(language.tokenizer, language.name)
        limit, chat = self.data.get("max_text_tokens"), self.data["chat_template"]
        return TextCodec(name, self.data["instruction_tokenizer"], limit, chat)

    def build(self, codec: TextCodec, checkpoint: Checkpoint) -> OSM:
        """Builds the model; random frozen parts are drawn as the run drew them, and nobody else's numbers change.

        Raises:
            ValueError: the frozen weights are not those that the checkpoint was trained with.
        """
        model = self.model
        with torch.random.fork_rng(devices=[]):
            if self.seed is not None:
                torch.default_generator.manual_seed(self.seed)
            parts = model.vision, model.qformer, model.language, model.modes
            return build_model(*parts, codec, checkpoint, allow=model.allow or ())


def settings_of(checkpoint: Checkpoint, changes: Mapping[str, object]) -> ModelSettings:
    """Reads a checkpoint's config.

    Args:
        checkpoint: trained by a run whose config it carries.
        changes: settings that win over the config's, as `{"model.vision.name": "/data/vit"}`.

    Raises:
        ValueError: there is no such setting, it cannot have that value, or this machine lacks what it names.
    """
    content = yaml.safe_load(checkpoint.config_elsewhere())
    known = {field.name for field in fields(ModelSection)}
    section = {name: value for name, value in content["model"].items() if name in known}
    for setting, value in changes.items():
        _change(section, setting, value)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=ModelSection)
    try:
        options = parser.parse_object({"model": section})
        model: ModelSection = parser.instantiate(options).model
    except (ArgumentError, TypeError, KeyError) as error:
        raise ValueError(f"the model's settings cannot be used: {error}") from error
    refuse_missing(Namespace(model=Namespace(**vars(model), weights=None)), with_shards=False)
    linked = {target.removeprefix("data."): _at(model, source) for source, target in LINKS}
    seed = content.get("seed_everything")
    return ModelSettings(
        model,
        data={**content["data"], **linked},
        precision=str(content["trainer"].get("precision") or "32-true"),
        seed=seed if isinstance(seed, int) else None,
    )


def _change(section: dict[str, Any], setting: str, value: object) -> None:
    """Sets `model.part.name` in a config's `model`."""
    model, *parts = setting.split(".")
    inside: Any = section
    for part in parts[:-1]:
        inside = inside.get(part) if isinstance(inside, dict) else None
    of = {(): ModelSection, ("vision",): VisionConfig, ("qformer",): QFormerConfig, ("language",): LanguageConfig}
    kind = of.get(tuple(parts[:-1]))
    # A checkpoint older than a setting does not have it.
    known = {*(inside if isinstance(inside, dict) else ()), *(field.name for field in (fields(kind) if kind else ()))}
    if model != "model" or not parts or not isinstance(inside, dict) or parts[-1] not in known:
        raise ValueError(
            f"settings names {setting!r}, which is no setting of the model. Name one of its config.yaml, as "
            "model.vision.name."
        )
    inside[parts[-1]] = value


def _at(model: ModelSection, source: str) -> Any:
    """The value of a setting, as `model.vision.name`."""
    found: Any = model
    for part in source.split(".")[1:]:
        found = getattr(found, part)
    return found
