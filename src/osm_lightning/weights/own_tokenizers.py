"""Tokenizers, and an LLM, that lie in a checkpoint's own folder, so that it can be used wherever it is moved.

Its config names them as `own:FOLDER`, which means a folder within the checkpoint's; whoever reads the checkpoint gets
the path in its place. Files are copied as they are: a tokenizer that is saved anew need not give the same ids.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from osm_lightning.data.text import BUILTIN, load_tokenizer
from osm_lightning.instructions import BOX_QUESTIONS, MASK_QUESTIONS, answer, prompt

OWN = "own:"
"""Prefix of what lies in the checkpoint's folder."""

FOLDERS = {("language", "tokenizer"): "tokenizer", ("qformer", "instruction_tokenizer"): "qformer_tokenizer"}
"""From a setting (below `model`) to the folder that its tokenizer is copied to."""

LANGUAGE_FOLDER = "language"
"""Folder of an LLM that `osm weights merge` made."""

USUAL_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",  # names the tokenizer's class where tokenizer_config.json does not
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""What tokenizers are made of, beside the files that a class names itself."""


def pointed(config: str) -> tuple[str, dict[str, str]]:
    """Lets a config name its tokenizers as the checkpoint's own.

    Returns:
        The config, and from folder to the name of the tokenizer that must be copied there. Built-in ones need no file;
        of one that this machine lacks a warning says that it stays where it is.
    """
    content = yaml.safe_load(config)
    copied: dict[str, str] = {}
    for part, setting, name in tokenizers_of(content["model"]):
        if name.startswith(BUILTIN):
            continue
        try:
            load_tokenizer(name)
        except ValueError as error:
            warnings.warn(f"{error} It is left out: the folder works where model.{part}.{setting} is.", stacklevel=2)
            continue
        folder = FOLDERS[part, setting]
        content["model"][part][setting] = OWN + folder
        copied[folder] = name
    return (yaml.safe_dump(content, sort_keys=False), copied) if copied else (config, copied)


def resolved(config: str, folder: Path) -> str:
    """The config with paths in place of its own parts.

    Args:
        config: as it stands in the folder.
        folder: the checkpoint's.

    Raises:
        ValueError: one is not there.
    """
    if OWN not in config:
        return config
    content = yaml.safe_load(config)
    for (part, setting), own in {**FOLDERS, ("language", "name"): LANGUAGE_FOLDER}.items():
        name = str((content["model"].get(part) or {}).get(setting))
        if name.startswith(OWN):
            if name != OWN + own or not (folder / own).is_dir():
                raise ValueError(f"model.{part}.{setting} is {name!r}, and there is no such folder in {folder}")
            content["model"][part][setting] = str((folder / own).resolve())
    return yaml.safe_dump(content, sort_keys=False)


def copy_tokenizer(name: str, folder: Path) -> None:
    """Copies a tokenizer's files, and its licence where there is one.

    Args:
        name: folder or hub id.
        folder: where they go; it is made.

    Raises:
        ValueError: the copy gives other ids, because it lacks a file.
    """
    from transformers.utils.hub import cached_file

    original = load_tokenizer(name)
    folder.mkdir(parents=True)
    names = {*USUAL_FILES, *getattr(original, "vocab_files_names", {}).values()}
    found = {file: cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in sorted(names)}
    paths = [Path(path) for path in found.values() if path is not None]
    if Path(name).is_dir():
        paths += sorted(Path(name).glob("LICENSE*"))
    for path in paths:
        shutil.copyfile(path, folder / path.name)
    if _behaviour(load_tokenizer(str(folder))) != _behaviour(original):
        raise ValueError(
            f"tokenizer {name!r} gives other ids when its files ({', '.join(path.name for path in paths)}) are copied, "
            "for it needs another file. Save it with transformers' save_pretrained, and train with that."
        )


def _behaviour(tokenizer: Any) -> tuple[Any, ...]:
    """What two tokenizers must have in common to be taken for the same."""
    texts = prompt(MASK_QUESTIONS[0]), prompt(BOX_QUESTIONS[0]), answer("café au lait, 12")
    ids = [tokenizer(text)["input_ids"] for text in texts]
    return len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, sorted(tokenizer.all_special_ids), ids


def tokenizers_of(model: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Part, setting and name of each tokenizer that a config names; the LLM's is its own where it names none."""
    for part, setting in FOLDERS:
        section = model.get(part) or {}
        name = section.get(setting) or (section.get("name") if part == "language" else None)
        if name is not None:
            yield part, setting, str(name)
