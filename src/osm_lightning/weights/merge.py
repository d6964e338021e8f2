"""A checkpoint with adapters as a folder without: they are folded into the Q-Former, and into a copy of the LLM.

The LLM lies in the folder, if it had any; the vision tower stays where it is. The merged LLM is an LLM like any other,
with its tokenizer and an identity of its own: transformers opens it, and a run may begin from it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import yaml

from osm_lightning.data.text import BUILTIN
from osm_lightning.model.frozen import fingerprint
from osm_lightning.model.lora import fold_adapters, is_adapter
from osm_lightning.model.osm import OSM
from osm_lightning.weights.checkpoint import Checkpoint, write_folder
from osm_lightning.weights.export import model_card
from osm_lightning.weights.own_tokenizers import LANGUAGE_FOLDER, OWN, copy_tokenizer, pointed, tokenizers_of


def check_mergeable(checkpoint: Checkpoint, out: Path) -> None:
    """Checks what can be checked before anything is loaded.

    Raises:
        ValueError: the checkpoint has no adapters, or the folder exists.
    """
    if out.exists():
        raise ValueError(f"{out} exists. Remove it, or give another --out.")
    if not any(map(is_adapter, checkpoint.tensors)):
        raise ValueError(
            "the checkpoint has no LoRA adapters, so that there is nothing to merge. `osm weights export` makes a "
            "folder of it."
        )


def merge(model: OSM, checkpoint: Checkpoint, out: Path) -> Checkpoint:
    """Folds the adapters of a model into what they are beside, and writes it; the folder appears whole or not at all.

    Args:
        model: built of the checkpoint; it is changed.
        checkpoint: with adapters.
        out: the new folder.

    Returns:
        What was written, without adapters.

    Raises:
        ValueError: there are no adapters, the folder exists, or a tokenizer cannot be copied.
    """
    check_mergeable(checkpoint, out)
    model.eval()
    llm = model.language.llm
    config, tokenizers = pointed(checkpoint.config)
    content, frozen, fill = yaml.safe_load(config), dict(checkpoint.frozen), None
    fold_adapters(model.qformer)
    content["model"]["qformer"]["lora"] = None
    if fold_adapters(llm):
        own = {"name": OWN + LANGUAGE_FOLDER, "architecture": None, "lora": None, "quantize": None}
        content["model"]["language"] |= own
        frozen["language"] = fingerprint(llm)
        used = tokenizers_of(yaml.safe_load(checkpoint.config)["model"])
        tokenizer = next(name for part, _, name in used if part == "language")
        fill = partial(_write_llm, llm, tokenizer)
    tensors = {name: parameter.detach() for name, parameter in model.kept()}
    merged = Checkpoint(tensors, yaml.safe_dump(content, sort_keys=False), frozen)
    write_folder(merged, out, model_card(merged, out), tokenizers, fill=fill)
    return merged


def _write_llm(llm: Any, tokenizer: str, folder: Path) -> None:
    """Writes the LLM as transformers reads it. Its config.json takes the place of what came with the tokenizer."""
    target = folder / LANGUAGE_FOLDER
    if not tokenizer.startswith(BUILTIN):
        copy_tokenizer(tokenizer, target)
    llm.save_pretrained(target)
