"""What is known of an imported model before its weights are: its sizes, out of the files, and the config it carries."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import yaml

from osm_lightning.datasets import DATASETS
from osm_lightning.model.config import LanguageConfig, Precision, QFormerConfig, VisionConfig
from osm_lightning.model.frozen import is_local
from osm_lightning.model.instructblip import QFORMER_TOKENIZER, InstructBlip
from osm_lightning.weights.released import Released

WINDOWS_A_SIDE = 5
"""Of the input, where no released checkpoint says: 1120 px of 224 in the paper."""

MAX_NEW_TOKENS = 12
"""The released evaluation's."""


@dataclass(frozen=True)
class Settings:
    """The model's part of the config."""

    vision: VisionConfig
    qformer: QFormerConfig
    language: LanguageConfig
    modes: tuple[str, ...]


def settings_of(
    folder: InstructBlip, name: str, released: Released | None, modes: tuple[str, ...], dtype: Precision
) -> Settings:
    """Sizes out of the files.

    Raises:
        ValueError: they contradict each other, or the Q-Former is another one than ours.
    """
    tower, bert = folder.config.vision_config, folder.config.qformer_config
    window_px, patch_px = int(tower.image_size), int(tower.patch_size)
    side = WINDOWS_A_SIDE if released is None else _windows_a_side(released, window_px, patch_px)
    if bert.hidden_act != "gelu":
        raise ValueError(f"the Q-Former of {folder.path} uses {bert.hidden_act!r}, but InstructBLIP's uses 'gelu'.")
    vision = VisionConfig(
        tower="instructblip",
        name=name,
        image_size_px=side * window_px,
        window_size_px=window_px,
        patch_size_px=patch_px,
        dtype=dtype,
    )
    qformer = QFormerConfig(
        num_layers=bert.num_hidden_layers,
        width=bert.hidden_size,
        num_heads=bert.num_attention_heads,
        ffn_width=bert.intermediate_size,
        num_queries=int(folder.config.num_query_tokens),
        cross_attention_every=bert.cross_attention_frequency,
        mask_rule="touched" if released is None else "nearest",
        instruction_tokenizer=f"{name}/{QFORMER_TOKENIZER}",
        instruction_vocabulary=bert.vocab_size,
        max_instruction_tokens=bert.max_position_embeddings,
        dropout=float(bert.hidden_dropout_prob),
        layer_norm_eps=bert.layer_norm_eps,
    )
    vision.check()
    qformer.check()
    return Settings(vision, qformer, LanguageConfig(name, dtype=dtype), modes if released is None else released.modes)


def _windows_a_side(released: Released, window_px: int, patch_px: int) -> int:
    """Windows along a side of the input: every window has its CLS token and its patches in the position embedding."""
    position = released.tensors.get("window_pos_embed")
    if position is None:
        return WINDOWS_A_SIDE
    num_tokens, of_window = int(position.shape[-2]), (window_px // patch_px) ** 2 + 1
    side = isqrt(num_tokens // of_window)
    if side < 1 or side**2 * of_window != num_tokens:
        raise ValueError(
            f"window_pos_embed has {num_tokens} positions, which is no square of windows of {of_window} tokens each "
            f"(one CLS, and {window_px} px in patches of {patch_px} px). The checkpoint is of another InstructBLIP."
        )
    return side


def reference(name: str) -> str:
    """How the config names the folder: as it was given, if that means the same from anywhere or plainly is a path."""
    return str(Path(name).resolve()) if Path(name).is_dir() and not is_local(name) else name


def config_text(settings: Settings, seed: int) -> str:
    """The config of a run that would have ended with these weights, with the rules that their outputs depend on."""
    model: dict[str, Any] = {
        "vision": asdict(settings.vision),
        "qformer": asdict(settings.qformer),
        "language": asdict(settings.language),
        "modes": list(settings.modes),
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    sources = {key: {"shards": f"data_shards/{key}"} for key in settings.modes if key in DATASETS}
    content = {"seed_everything": seed, "model": model, "data": {"sources": sources}, "trainer": {"precision": 32}}
    return yaml.safe_dump(content, sort_keys=False)
