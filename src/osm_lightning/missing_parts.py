"""What a config names and this machine lacks: weights that were not fetched, shards that were not built."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jsonargparse import Namespace

from osm_lightning.shard_folder import is_url, open_folder
from osm_lightning.shard_index import INDEX_FILE
from osm_lightning.weights.registry import fetch_command


def refuse_missing(options: Namespace, with_shards: bool) -> None:
    """Refuses a config that this machine cannot work with.

    Raises:
        ValueError: lists all that is missing, each with the command that makes it.
    """
    missing = list(missing_parts(options, with_shards))
    if missing:
        raise ValueError("this machine lacks what the config names:\n  " + "\n  ".join(missing))


def missing_parts(options: Namespace, with_shards: bool) -> Iterator[str]:
    """Every shard set and weight that a config names and this machine lacks, each with the command that makes it."""
    vision, language = options.model.vision, options.model.language
    wanted = []
    if vision.architecture is None:
        setting = "pretrained" if vision.tower == "open_clip" else "name"
        wanted.append((f"model.vision.{setting}", getattr(vision, setting)))
    if language.architecture is None:
        wanted.append(("model.language.name", language.name))
    wanted.append(("model.language.tokenizer", language.tokenizer))
    wanted.append(("model.qformer.instruction_tokenizer", options.model.qformer.instruction_tokenizer))
    wanted.append(("model.weights", options.model.weights))
    for setting, name in wanted:
        if name is not None and name.startswith((".", "/", "weights/", "models/")) and not Path(name).exists():
            command = fetch_command(name)
            yield f"{setting}: {name}  ->  {command or 'no command makes it: give a folder that exists, or a hub id'}"
    for key, source in options.data.sources.items() if with_shards else ():
        folder = source.shards
        there = open_folder(folder).index.splits if is_url(folder) or (Path(folder) / INDEX_FILE).is_file() else {}
        for split in dict.fromkeys(filter(None, (source.train, source.val))):
            if split not in there:
                build = f"osm shards build {key} --src RAW_{key.upper()} --split {split} --out {folder}"
                yield f"data.sources.{key}: split {split} of {folder}  ->  {build}"
